"""RLPO learns small tasks from scratch; with routing replay the first update has a ratio of exactly
1.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_fixtures import VOCABULARY, learner, prompts, share_of_sevens, tiny
from torch import Tensor

from deepseek.checkpoint import store
from deepseek.errors import ConfigError, TrainError
from deepseek.model.context import ForwardContext
from deepseek.model.precision import autocast
from deepseek.train.loop.loop import Hooks, LoopConfig, train
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.optim import OptimConfig, clip_gradients
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.rl.policy import VALUE_PACES, Policy
from deepseek.train.rl.ppo import penalty_coefficient
from deepseek.train.rl.rlpo import Minibatch, RolloutBatches, RunningMoments
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import Responses, generate
from deepseek.train.rl.update import RLPOState, rlpo_update

MOE = {"num_experts": 16, "expert_dim": 8, "routing_strategy": "dynamic"}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"baseline": "group", "group_size": 8},
        {"baseline": "group", "group_size": 8, "ratio": "sequence"},
    ],
    ids=["ppo", "grpo", "gspo"],
)
def test_a_bandit_is_solved(kind: dict[str, Any]) -> None:
    """One token, one rewarded answer: it becomes nearly certain."""
    config = RLPOConfig(
        new_tokens=1,
        minibatch=32,
        epochs=4,
        beta=0.0,
        target_kl=None,
        kl_stop=1.0,
        entropy_floor=0.0,
        **kind,
    )
    state = RLPOState(tiny(), share_of_sevens, config, optim=OptimConfig(learning_rate=1e-2))
    batch = {"prompts": [[3, 4]] * (64 // config.answers)}
    scores = [
        rlpo_update(state.learner.policy.model, share_of_sevens, batch, state=state)["score"]
        for _ in range(12)
    ]
    assert scores[0] < 0.5 and scores[-1] > 0.95


@pytest.mark.parametrize(("configured", "ends"), [(2, [2]), ([2, 5], [2, 5]), (None, [])])
def test_the_ends_of_a_response_are_those_of_the_model_by_default(
    configured: Any, ends: list[int]
) -> None:
    """Tokens past the end would be scored as part of the answer."""
    model = tiny()
    model.generation_config.eos_token_id = configured
    state = RLPOState(model, share_of_sevens, RLPOConfig(new_tokens=2))
    assert list(state.learner.ends) == ends
    assert RLPOState(model, share_of_sevens, RLPOConfig(), ends=()).learner.ends == ()


def test_the_policy_is_scored_at_the_temperature_at_which_it_answers() -> None:
    config = RLPOConfig(new_tokens=4, temperature=0.25)
    state = RLPOState(tiny(), share_of_sevens, config)
    assert state.learner.policy.temperature == 0.25


def test_an_update_that_is_not_finite_moves_nothing_and_ten_in_a_row_end_it() -> None:
    """The same guards as in the loop."""

    def broken(responses: Responses) -> Tensor:
        return torch.zeros(len(responses.targets_BT))

    state = RLPOState(
        tiny(), broken, RLPOConfig(new_tokens=2, minibatch=4, epochs=1, value_rollouts=0)
    )
    for parameter in state.learner.parameters.values():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: one.detach().clone() for name, one in state.learner.parameters.items()}
    metrics = rlpo_update(
        state.learner.policy.model, broken, {"prompts": [[3, 4]] * 8}, state=state
    )
    assert metrics["skipped"] == 2
    assert all(torch.equal(before[name], one) for name, one in state.learner.parameters.items())
    with pytest.raises(TrainError, match="not finite"):
        rlpo_update(state.learner.policy.model, broken, {"prompts": [[3, 4]] * 32}, state=state)


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([0.0, float("nan")]),
        torch.tensor([0.0, float("inf")]),
        torch.zeros(3),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        [0.0, True],
        ["a", "b"],
        None,
    ],
    ids=str,
)
def test_a_reward_returns_a_finite_number_for_each_response(scores: Any) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="scores of the reward"):
        rlpo_update(model, lambda responses: scores, {"prompts": [[3], [4]]})


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"prompts": []},
        {"prompts": [[]]},
        {"prompts": [[3], [10_000]]},
        {"prompts": [[-1]]},
        {"prompts": [[True]]},
        {"prompts": torch.zeros(2, 3)},
        {"prompts": torch.zeros(0, 3, dtype=torch.long)},
        {"prompts": "text"},
        {"prompts": [[3] * 10_000]},
        [[3]],
    ],
    ids=lambda batch: str(batch)[:40],
)
def test_prompts_are_ids_of_the_vocabulary(batch: Any) -> None:
    with pytest.raises(ConfigError):
        rlpo_update(tiny(), lambda responses: torch.zeros(1), batch)


def test_without_a_state_the_policy_learns_too() -> None:
    model = tiny()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    metrics = rlpo_update(model, share_of_sevens, {"prompts": [[3, 4]] * 8})
    changed = {name for name, one in model.named_parameters() if not one.equal(before[name])}
    assert metrics["skipped"] == 0 and changed


@pytest.mark.parametrize("other", ["model", "reward_model"])
def test_a_state_is_of_one_model_and_one_reward(other: str) -> None:
    given = {"model": tiny(), "reward_model": share_of_sevens}
    state = RLPOState(**given)
    given[other] = tiny() if other == "model" else lambda responses: share_of_sevens(responses)
    with pytest.raises(ConfigError, match="another model or reward"):
        rlpo_update(**given, data_batch={"prompts": [[3, 4]] * 8}, state=state)


def test_copying_is_learnt_from_reward_alone() -> None:
    """The answer to two tokens is these two tokens."""

    def copied(responses: Responses) -> Tensor:
        return (responses.targets_BT == responses.input_ids_BS[:, :2]).float().mean(1)

    config = RLPOConfig(
        new_tokens=2,
        minibatch=64,
        epochs=4,
        beta=0.0,
        target_kl=None,
        kl_stop=0.2,
        entropy_floor=0.0,
    )
    state = RLPOState(tiny(), copied, config, optim=OptimConfig(learning_rate=5e-3))
    draw = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(20):
        batch = {"prompts": torch.randint(2, 8, (128, 2), generator=draw)}
        scores.append(rlpo_update(state.learner.policy.model, copied, batch, state=state)["score"])
    assert scores[0] < 0.3 and sum(scores[-5:]) / 5 > 0.85, scores[::4]


@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("changes", [{}, MOE, MOE | {"routing_strategy": "topk", "max_experts": 2}])
def test_the_first_update_starts_at_a_ratio_of_exactly_one(
    changes: dict[str, object], layers: str
) -> None:
    trained = learner(tiny(**changes), layers)
    rollout, metrics = trained.collect(prompts(), torch.Generator().manual_seed(1))
    assert metrics["kl"] == 0.0, "the policy is still its reference"
    for place in range(2):
        rows = rollout.rows(8 * place, 8 * place + 8)
        assert trained.loss(Minibatch(rows, place, True), 0).metrics["ratio"] == 0.0


def drifted_ratio(replay: bool) -> float:
    """Return the deviation of ratios from 1 before any update, if the routers' biases change after
    the rollout.
    """
    trained = learner(tiny(**MOE), replay_routing=replay)
    rollout, _ = trained.collect(prompts(), torch.Generator().manual_seed(1))
    for layer in trained.policy.model.layers:
        layer.feed_forward.router.balance.bias += torch.linspace(-0.5, 0.5, 16)
    trained.streams.clear()
    return trained.loss(Minibatch(rollout.rows(0, 8), 0, True), 0).metrics["ratio"]


def test_without_replay_a_change_of_routing_moves_the_ratio() -> None:
    assert drifted_ratio(replay=True) == 0.0
    assert drifted_ratio(replay=False) > 0.0


class ByWords:
    """An armed expert that fires where token 7 was just read, and everywhere if it does not get the
    token ids.
    """

    adapts = False

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        ids_BT = ctx.input_ids_BT
        return y_BTD + 1.0 if ids_BT is None else y_BTD + (ids_BT == 7)[..., None]

    def with_rows(self, change: object) -> "ByWords":
        return self


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_experts_are_judged_by_the_words_as_in_the_rollout(
    layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    monkeypatch.setattr(model.experts, "armed", ByWords)
    policy = Policy(model, layers)
    responses = generate(model, [[2, 3, 7], [5, 7, 4]], 6, (), torch.Generator().manual_seed(0))
    with torch.no_grad(), autocast(model, cached=False):
        output = model(
            responses.input_ids_BS[:, :-1],
            attention_mask=responses.real_BS[:, :-1],
            use_cache=False,
        )
    log_p_BTV = output.logits[:, -6:].float().log_softmax(-1)
    expected_BT = log_p_BTV.gather(-1, responses.targets_BT[..., None])[..., 0]
    found = policy.score(responses, policy.trunk(responses)).logprobs_BT
    torch.testing.assert_close(found, expected_BT, atol=0.02, rtol=0)


def test_the_recorded_experts_are_those_of_a_whole_pass() -> None:
    """The experts recorded token by token are those the router chooses over the whole sequence."""
    model = tiny(**MOE).float()
    responses = generate(model, [[2, 3, 4], [5]], 6, (), torch.Generator().manual_seed(0))
    real = responses.real_BS[:, :-1]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        output = model(responses.input_ids_BS[:, :-1], attention_mask=real)
    for place, stats in enumerate(output.router_stats):
        choice = stats.dispatch.choice
        same = (choice.ids_NC.view(*real.shape, -1) == responses.choices_BLSC[:, place])[real]
        assert same.float().mean() > 0.95, "bf16 may swap neighbours"


def test_responses_end_at_an_end_token_and_do_not_depend_on_padding() -> None:
    model, prompt = tiny(), [3, 4, 5]
    ends = (1, 2, 6)
    alone = generate(model, [prompt], 12, ends, torch.Generator().manual_seed(3))
    padded = generate(model, [prompt], 12, ends, torch.Generator().manual_seed(3), prompt_width=9)
    assert alone.answers() == padded.answers() and padded.prompts() == [prompt]
    many = generate(model, [prompt] * 200, 12, ends, torch.Generator().manual_seed(4))
    for answer in many.answers():
        assert len(answer) == 12 or answer[-1] in ends
        assert not set(answer[:-1]) & set(ends)


@pytest.mark.parametrize("sizes", [{}, MOE])
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    more=st.integers(0, 5),
    new_tokens=st.integers(1, 4),
)
def test_columns_of_padding_alone_are_not_computed_and_change_nothing(
    sizes: dict[str, Any], lengths: list[int], more: int, new_tokens: int
) -> None:
    model = tiny(**sizes).float()
    policy = Policy(model, "last:1")
    asked = [[3 + column % 5 for column in range(length)] for length in lengths]
    width = max(lengths)

    def responses(prompt_width: int) -> Responses:
        draw = torch.Generator().manual_seed(0)
        return generate(model, asked, new_tokens, (), draw, prompt_width=prompt_width)

    narrow, wide = responses(width), responses(width + more)
    assert wide.input_ids_BS.shape[1] == width + more + new_tokens
    for name, tensor in wide.trimmed().tensors().items():
        assert torch.equal(tensor, getattr(narrow, name)), name
    first, second = (policy.score(r, policy.trunk(r)).logprobs_BT for r in (narrow, wide))
    torch.testing.assert_close(first, second, atol=0.02, rtol=0)


def test_sampling_follows_the_distribution() -> None:
    model = tiny()
    expected = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1].detach() / 0.7, -1)
    sampled = generate(
        model, [[3, 4]] * 4000, 1, (), torch.Generator().manual_seed(0), temperature=0.7
    )
    share = torch.bincount(sampled.targets_BT[:, 0], minlength=VOCABULARY) / 4000
    assert (share - expected).abs().max() < 0.03


def test_learning_values_never_changes_the_policy() -> None:
    trained = learner(tiny(), value_rollouts=10)
    before = {name: p.detach().clone() for name, p in trained.policy.parameters.items()}
    batches = RolloutBatches(trained, prompts(), 16, seed=0)
    optimizer = torch.optim.AdamW(trained.policy.parameters.values(), lr=0.01, weight_decay=0.1)
    for _ in range(6):
        trained.loss(batches.next(), 0).loss.backward()
        optimizer.step()
    changed = {
        name for name, p in trained.policy.parameters.items() if not torch.equal(p, before[name])
    }
    assert changed == {"value_head.weight", "value_head.bias"}


def test_a_rollout_is_left_once_the_policy_has_moved() -> None:
    trained = learner(tiny(), kl_stop=-1.0, epochs=4)
    batches = RolloutBatches(trained, prompts(), 16, seed=0)
    for made in (1, 2, 3):
        trained.loss(batches.next(), 0)
        assert (batches.made, batches.used) == (made, 1)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_distance_is_told_by_token_whatever_the_ratio(ratio: str) -> None:
    trained = learner(tiny(), ratio=ratio, kl_stop=0.05, epochs=4)
    batches = RolloutBatches(trained, prompts(), 16, seed=0)
    minibatch = batches.next()
    torch.manual_seed(0)
    noise_BT = 0.5 * torch.randn_like(minibatch.rows.logprobs_BT)
    moved = replace(minibatch.rows, logprobs_BT=minibatch.rows.logprobs_BT + noise_BT)
    metrics = trained.loss(replace(minibatch, rows=moved), 0).metrics
    assert metrics["step_kl"] > 0.05 and bool(trained.scalars["stop"])


def test_a_minibatch_that_shows_too_large_a_step_does_not_train_the_policy() -> None:
    trained = learner(tiny(), kl_stop=0.05, epochs=4)
    minibatch = RolloutBatches(trained, prompts(), 16, seed=0).next()
    torch.manual_seed(0)
    noise_BT = 0.5 * torch.randn_like(minibatch.rows.logprobs_BT)
    moved = replace(minibatch.rows, logprobs_BT=minibatch.rows.logprobs_BT + noise_BT)
    for rows, learns in ((minibatch.rows, True), (moved, False)):
        for parameter in trained.parameters.values():
            parameter.grad = None
        trained.loss(replace(minibatch, rows=rows), 0).loss.backward()
        touched = {name for name, p in trained.parameters.items() if p.grad is not None}
        assert touched > {"value_head.bias"} if learns else touched <= set(VALUE_PACES)


def test_poor_values_hardly_shorten_the_step_of_the_policy() -> None:
    """All gradients are clipped by their joint norm."""
    norms = {}
    for weight in (0.0, RLPOConfig().value_weight):
        trained = learner(tiny(), value_weight=weight)
        minibatch = RolloutBatches(trained, prompts(), 16, seed=0).next()
        far = replace(minibatch.rows, returns_BT=minibatch.rows.returns_BT + 5.0)
        trained.loss(replace(minibatch, rows=far), 0).loss.backward()
        clip_gradients(trained.parameters.values(), 1e-2)
        layers = [p.grad for name, p in trained.parameters.items() if name not in VALUE_PACES]
        norms[weight] = float(torch.nn.utils.get_total_norm(layers))
    with_values, without = norms[RLPOConfig().value_weight], norms[0.0]
    assert with_values > 0.9 * without


def test_scores_are_standardised_by_all_that_were_seen() -> None:
    moments, scores = RunningMoments(), torch.randn(3, 20) * 4 + 9
    for part in scores:
        last = moments.standardised(part)
    every = scores.flatten()
    expected = (scores[-1] - every.mean()) / every.std(correction=0)
    assert torch.allclose(last, expected.clamp(-5, 5), atol=1e-4)


def test_the_penalty_of_a_rollout_is_that_of_its_own_kl() -> None:
    trained, generator = learner(tiny(), target_kl=1.0, beta=0.1), torch.Generator().manual_seed(0)
    metrics = trained.collect(prompts(), generator)[1]
    assert metrics["beta"] == pytest.approx(0.1) == float(trained.scalars["beta"])
    with torch.no_grad():
        for parameter in trained.policy.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    metrics = trained.collect(prompts(), generator)[1]
    assert metrics["kl"] > 2.0
    assert metrics["beta"] == penalty_coefficient(0.1, metrics["kl"], target=1.0)
    assert float(trained.scalars["beta"]) == metrics["beta"]


def test_a_collapsed_policy_is_reported() -> None:
    trained = learner(tiny())
    trained.check_entropy(2.0)
    trained.check_entropy(0.5)
    with pytest.raises(TrainError, match=r"entropy fell from 2\.00 to 0\.30"):
        trained.check_entropy(0.3)


def test_layers_that_share_experts_with_the_trunk_are_refused() -> None:
    shared = MOE | {"expert_sharing": 2, "num_hidden_layers": 4}
    with pytest.raises(ConfigError, match="multiple of 2"):
        Policy(tiny(**shared), "last:1")
    policy = Policy(tiny(**shared), "last:2")
    assert {
        name.split(".")[1] for name in policy.parameters if name.startswith("expert_pools")
    } == {"1"}


def run(folder: Path, stop_after: int = 0) -> None:
    """Train 14 steps on the loop, or be interrupted in the middle of a rollout."""
    trained = learner(tiny(**MOE), epochs=3, target_kl=1.0, beta=0.1, value_rollouts=1)
    batches = RolloutBatches(trained, prompts(40), 16, seed=3)
    config = LoopConfig(
        OptimConfig(learning_rate=2e-3), steps=14, evaluate_every=5, checkpoint_every=4
    )
    trained.evaluate = lambda: {"held_out_loss": float(trained.scalars["mean"])}
    if stop_after:
        original = trained.loss

        def loss(batch: Minibatch, step: int) -> object:
            if step == stop_after:
                raise KeyboardInterrupt
            return original(batch, step)

        trained.loss = loss  # type: ignore[method-assign]
    train(
        trained,
        batches,
        config,
        folder,
        progress=ProgressBar(quiet=True),
        hooks=Hooks(buffers=batches.buffers),
    )


def test_a_run_stopped_within_a_rollout_ends_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=9)
    run(tmp_path / "cut")
    (tensors, meta), (others, other_meta) = (
        store.load_state(tmp_path / name / "checkpoints" / "step-00000014")
        for name in ("whole", "cut")
    )
    assert meta == other_meta and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    records = [
        [
            {k: v for k, v in r.items() if k != "tokens_per_second"}
            for r in read_metrics(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("whole", "cut")
    ]
    assert records[0] == records[1] and any("score" in record for record in records[0])
