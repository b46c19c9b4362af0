"""From pairs to an aligned model: reward model, synthetic pairs, the stage, resumed or not."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.checkpoint.licence import Licence, read_licence, write_card
from deepseek.checkpoint.store import read_object
from deepseek.data.preferences.database import Preference, PreferenceDatabase
from deepseek.data.text.loader import endless
from deepseek.engine.load import load
from deepseek.errors import ConfigError, DataError, TrainError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import encode_plain
from deepseek.train.jobs.align import align, warmup
from deepseek.train.jobs.align_trl import (
    MINIBATCH,
    dpo_trainer,
    grouped_by_length,
    pair_tokens,
    twin_of,
)
from deepseek.train.jobs.arguments import UNUSED, AlignArguments
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.optim import OptimConfig, learning_rate
from deepseek.train.rl import judge
from deepseek.train.rl.judge import generate_pairs, prompt_of
from deepseek.train.rl.pairs import answer_ids
from deepseek.train.rl.reward import RIDGES, RewardModel, features_of
from deepseek.train.rl.rollout import given as given_responses

CHATML = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a chat template."""
    folder = tmp_path_factory.mktemp("chat-base")
    model, tokenizer = load(tiny_base)
    tokenizer.chat_template = CHATML
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, "gemma", "https://example.org/terms", "A model.")
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which the answer about `alpha` is preferred to the one about `omicron`."""
    path = tmp_path_factory.mktemp("prefs") / "pairs.db"
    store = PreferenceDatabase(path)
    names = ("beta", "gamma", "delta", "zeta", "eta", "theta", "iota", "kappa")
    for number in range(120):
        ask = (
            {"role": "user", "content": f"{names[number % 8]} {names[number // 8 % 8]} {number}"},
        )
        store.add(
            Preference(
                ask, f"alpha alpha {names[number % 7]}", f"omicron omicron {names[number % 5]}"
            )
        )
    store.set_eval_share(0.3)
    store.close()
    return path


def test_a_separable_preference_is_learnt_and_stated_with_the_right_certainty() -> None:
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=draw)
    chosen, rejected = torch.randn(2, 4000, 16, generator=draw)
    prefers = torch.rand(4000, generator=draw) < torch.sigmoid(
        (chosen - rejected) @ direction * 0.5
    )
    best, worst = (
        torch.where(prefers[:, None], chosen, rejected),
        torch.where(prefers[:, None], rejected, chosen),
    )
    fitted = RewardModel.fit(None, 0, best[:3000], worst[:3000])
    assert torch.nn.functional.cosine_similarity(fitted.weight_D, direction, dim=0) > 0.98
    quality = fitted.quality(best[3000:], worst[3000:])
    ideal = RewardModel(None, 0, direction * 0.5).quality(best[3000:], worst[3000:])
    assert quality.pairs == 1000 and quality.accuracy > ideal.accuracy - 0.02
    assert quality.calibration_error < 0.06 and quality.loss < ideal.loss + 0.02


def test_the_penalty_is_chosen_on_prompts_that_were_not_fitted_to() -> None:
    """With few noisy pairs of many features, the smallest penalty would overfit."""
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(64, generator=draw)
    chosen, rejected = torch.randn(2, 1100, 64, generator=draw)
    prefers = torch.rand(1100, generator=draw) < torch.sigmoid(
        (chosen - rejected) @ direction * 0.2
    )
    best, worst = (
        torch.where(prefers[:, None], chosen, rejected),
        torch.where(prefers[:, None], rejected, chosen),
    )
    prompts = [pair // 2 for pair in range(100)]
    picked = RewardModel.choose(None, 0, best[:100], worst[:100], prompts)
    losses = [
        RewardModel.fit(None, 0, best[:100], worst[:100], ridge)
        .quality(best[100:], worst[100:])
        .loss
        for ridge in RIDGES
    ]
    assert picked.quality(best[100:], worst[100:]).loss < min(losses) + 0.05 < losses[0] - 0.1
    alone = RewardModel.choose(None, 0, best[:100], worst[:100], [0] * 100)
    assert torch.equal(alone.weight_D, RewardModel.fit(None, 0, best[:100], worst[:100]).weight_D)


@pytest.mark.parametrize("rows", [1, 2, 32])
def test_features_do_not_depend_on_padding_or_on_the_batch(base: Path, rows: int) -> None:
    model, _ = load(base, dtype="float32")
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    together = features_of(model, 2, prompts, answers, rows)
    alone = torch.cat(
        [features_of(model, 2, [p], [a]) for p, a in zip(prompts, answers, strict=True)]
    )
    assert torch.allclose(together, alone, atol=0.02), "bf16 rounding apart"
    assert given_responses(model, prompts, answers).answers() == answers


def test_an_empty_answer_has_features_even_alone(base: Path) -> None:
    model, _ = load(base, dtype="float32")
    assert not features_of(model, 2, [[5, 6]], [[]]).any()
    assert given_responses(model, [[5, 6]], [[]]).answers() == [[]]


def test_the_reward_model_is_kept(base: Path, tmp_path: Path) -> None:
    model, _ = load(base)
    fitted = RewardModel(model, 2, torch.randn(32))
    fitted.save(tmp_path / "reward")
    again = RewardModel.load(model, tmp_path / "reward")
    assert again.layer == 2 and torch.equal(again.weight_D, fitted.weight_D)


def test_the_best_answer_meets_the_worst_and_both_scores_are_kept(base: Path) -> None:
    model, tokenizer = load(base)
    prompts = [({"role": "user", "content": name},) for name in ("alpha", "beta", "gamma")]
    judges = {
        "long": lambda asked, texts: [len(text) / 10 for text in texts],
        "varied": judge.varied,
    }
    pairs = list(
        generate_pairs(
            model, tokenizer, prompts, judges, answers=5, new_tokens=8, source="test", seed=1
        )
    )
    assert [pair.prompt for pair in pairs] == prompts
    for pair in pairs:
        assert pair.scores["long"] == (len(pair.chosen) / 10, len(pair.rejected) / 10)
        totals = [sum(scores[side] for scores in pair.scores.values()) for side in (0, 1)]
        assert totals[0] >= totals[1] + 0.1


def test_a_good_answer_meets_a_refusal_too(base: Path) -> None:
    model, tokenizer = load(base)
    prompts = [({"role": "user", "content": name},) for name in ("alpha", "beta", "gamma")]
    judges = {"willing": judge.willing, "short": lambda _, texts: [0.5 for _ in texts]}
    sampled = {"answers": 3, "new_tokens": 8, "seed": 1}
    assert list(generate_pairs(model, tokenizer, prompts, judges, **sampled)) == []
    pairs = list(generate_pairs(model, tokenizer, prompts, judges, refusals=True, **sampled))
    assert [(pair.prompt, pair.rejected) for pair in pairs] == [
        (prompt, judge.REFUSALS[place]) for place, prompt in enumerate(prompts)
    ]
    assert all(pair.scores == {"willing": (1.0, 0.0), "short": (0.5, 0.5)} for pair in pairs)
    assert all(pair.labels == ("refusal",) for pair in pairs)
    judges["short"] = lambda _, texts: [0.4 for _ in texts]
    assert list(generate_pairs(model, tokenizer, prompts, judges, refusals=True, **sampled)) == []


def test_a_prompt_beyond_the_context_is_named_before_sampling(base: Path) -> None:
    model, tokenizer = load(base, dtype="float32")
    prompts = [[{"role": "user", "content": text}] for text in ("alpha", "alpha beta " * 200)]
    pairs = generate_pairs(model, tokenizer, prompts * 40, {"varied": judge.varied}, new_tokens=4)
    with pytest.raises(ConfigError, match=r"Prompt 2 has .* shorten it"):
        next(pairs)


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("Sorry, but I can't answer that.", True),
        ("I'd rather not say.", True),
        ("I would rather not talk about it.", True),
        ("I cannot recommend that.", True),
        ("I’m afraid I can’t do that.", True),
        ("We are unable to discuss it.", True),
        ("I'm so sorry!", True),
        ("That is a hard one. I won't go into it.", True),
        ("I'm sorry your tyre is flat! First, loosen the nuts.", False),
        ("I can't help but smile: whisk the eggs.", False),
        ("You can't do that with a fork; take a whisk.", False),
        ("Heat the pan. Add oil. Wait a minute. If it smokes, I can't eat it.", False),
        ("Sorry is the hardest word. It is a song by Elton John.", False),
        ("I can wait.", False),
    ],
)
def test_a_refusal_is_told_from_an_answer(answer: str, declines: bool) -> None:
    assert judge.is_refusal(answer) is declines
    assert judge.willing([""], [answer]) == [float(not declines)]


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, float("nan")], [1.0, "good"]])
def test_a_judge_gives_each_answer_a_finite_number(scores: list[object]) -> None:
    with pytest.raises(ConfigError, match="strict"):
        judge.scored(lambda *_: scores, ["a", "b"], ["a", "b"], "strict")


def test_an_answer_ends_as_the_model_ends_it(base: Path) -> None:
    _, tokenizer = load(base)
    short, long = answer_ids(tokenizer, ["alpha", "alpha " * 40], 12)
    assert short[-1] == tokenizer.eos_token_id and len(short) <= 12
    assert len(long) == 12 and tokenizer.eos_token_id not in long


def test_the_policy_begins_below_its_peak_where_values_learn_first() -> None:
    for value_steps, steps in ((4, 96), (4, 480), (0, 96), (4, 8)):
        optim = OptimConfig(learning_rate=1.0, warmup=warmup(value_steps, steps))
        first = learning_rate(optim, value_steps, steps)
        assert first <= (1 / 3 if value_steps and steps > 30 else 1.0)
        assert max(learning_rate(optim, step, steps) for step in range(steps)) == pytest.approx(1.0)


def test_a_reward_for_all_layers_knows_order_and_prompt(
    base: Path, database: Path, tmp_path: Path
) -> None:
    request = {"layers": "all", "rollouts": 1, "rollout_size": 4, "new_tokens": 4}
    folder = tmp_path / "run"
    align(str(base), prefs=database, out=tmp_path / "out", run_folder=folder, quiet=True, **request)
    model = DeepSeekModel.from_pretrained(base)
    fitted = RewardModel.load(model, folder / "reward")
    assert fitted.layer == len(model.layers) // 2 > 0
    orders = features_of(model, fitted.layer, [[5, 6]] * 2, [[7, 8, 9], [9, 8, 7]])
    assert not torch.allclose(orders[0], orders[1], atol=1e-3)


def test_refusals_are_refusals() -> None:
    assert set(judge.willing([], judge.REFUSALS)) == {0.0}
    assert judge.willing([], ["I’m sorry, I can’t help with that."]) == [0.0]


def test_prompts_are_read_from_records() -> None:
    assert prompt_of({"prompt": "Hello"}, "line 1") == [{"role": "user", "content": "Hello"}]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert prompt_of({"prompt": turns}, "line 1") == turns
    with pytest.raises(DataError, match="line 7 has no prompt"):
        prompt_of({"text": "Hello"}, "line 7")


def test_judges_tell_good_from_bad() -> None:
    asked = ["?"] * 2
    assert judge.willing(
        asked, ["Paris is the capital.", "I'm sorry, but I can't help with that."]
    ) == [1.0, 0.0]
    assert judge.varied(asked, ["one two three four", "a b c a b c a b c"]) == [
        1.0,
        pytest.approx(3 / 7),
    ]
    polite, rude = judge.clean(asked, ["Have a lovely day.", "You stupid idiot, shut the hell up."])
    assert polite > 0.9 and rude < 0.1


def run(base: Path, database: Path, folder: Path, **changes: object) -> Path:
    small: dict[str, Any] = {
        "rollouts": 6,
        "rollout_size": 16,
        "new_tokens": 6,
        "layers": "last:2",
        "learning_rate": 3e-3,
        "quiet": True,
    }
    arguments = small | changes
    for name in UNUSED.get(arguments.get("method", "ppo"), ()):
        arguments.pop(name, None)
    return align(
        str(base),
        prefs=database,
        name="x",
        out=folder / "model",
        run_folder=folder / "run",
        **arguments,
    )


def test_a_full_disk_is_named_where_no_checkpoint_is_written_yet(
    base: Path, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patched,
        pytest.raises(TrainError, match="is full; free some space"),
    ):
        patched.setattr(RewardModel, "save", full)
        run(base, database, tmp_path)
    assert run(base, database, tmp_path).is_dir()


@pytest.mark.parametrize("method", ["ppo", "grpo", "gspo"])
def test_the_stage_raises_the_reward_and_leaves_a_model(
    base: Path, database: Path, tmp_path: Path, method: str
) -> None:
    asked = {"method": method, "rollouts": 20, "target_kl": 20.0}
    folder = run(base, database, tmp_path, **asked)
    records = read_metrics(tmp_path / "run" / "training" / "metrics.jsonl")
    scores = [record["held_out_score"] for record in records if "held_out_score" in record]
    assert scores[-1] > scores[0]
    assert read_licence(folder) == read_licence(base) != Licence()
    aligned, before = load(folder).model.state_dict(), load(base).model.state_dict()
    changed = {name for name in before if not torch.equal(aligned[name], before[name])}
    assert changed and all(name.startswith(("layers.2", "layers.3", "norm")) for name in changed)
    assert run(base, database, tmp_path, **asked) == folder, "a finished run is not repeated"


@pytest.mark.parametrize("reward", ["model", "willing"])
def test_prompts_beyond_the_context_are_left_out(
    base: Path, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: str
) -> None:
    prefs = tmp_path / "long.db"
    shutil.copyfile(database, prefs)
    store = PreferenceDatabase(prefs)
    for number in range(40):
        ask = ({"role": "user", "content": f"{number} " + "alpha beta " * 200},)
        store.add(Preference(ask, "alpha", "omicron"))
    store.close()
    asked = {"rollouts": 2, "reward": reward, "quiet": False}
    assert run(base, prefs, tmp_path, **asked).is_dir()
    assert "pairs are left out" in capsys.readouterr().err


def test_errors_name_the_mend(base: Path, tmp_path: Path, database: Path) -> None:
    with pytest.raises(DataError, match="prefs import"):
        run(base, tmp_path / "none.db", tmp_path)
    PreferenceDatabase(tmp_path / "empty.db").close()
    with pytest.raises(DataError, match="0 pairs to learn from"):
        run(base, tmp_path / "empty.db", tmp_path)
    with pytest.raises(ConfigError, match="method 'pro' is unknown; perhaps 'ppo'"):
        run(base, database, tmp_path, method="pro")
    with pytest.raises(ConfigError, match="rollout_size=18 must be a multiple of 4"):
        run(base, database, tmp_path, method="grpo", rollout_size=18)
    with pytest.raises(ConfigError, match="perhaps 'clean'"):
        run(base, database, tmp_path, reward="claen")


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=400),
    steps=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_pairs_of_like_length_share_a_minibatch(lengths: list[int], steps: int, seed: int) -> None:
    order = grouped_by_length(lengths, steps, seed)
    drawn = endless(0, steps * MINIBATCH, len(lengths), seed).tolist()
    assert sorted(order) == sorted(drawn), "each pair as often as in whole epochs"

    def padded(rows: list[int]) -> int:
        starts = range(0, len(rows), MINIBATCH)
        return sum(max(lengths[row] for row in rows[start : start + MINIBATCH]) for start in starts)

    assert padded(order) <= padded(drawn)


def test_dpo_learns_from_whole_answers_behind_long_prompts(base: Path, tmp_path: Path) -> None:
    """Regression: TRL cut the rows at 1,024 tokens, and of long prompts no answer was left."""
    _, tokenizer = load(base)
    long = "beta gamma " * 600
    questions = [({"role": "user", "content": text},) for text in (long, "alpha")]
    pairs = [Preference(questions[0], "alpha", "omicron"), Preference(questions[1], long, "beta")]
    asked = AlignArguments(method="dpo", rollouts=1, rollout_size=MINIBATCH)
    run: Any = SimpleNamespace(tokenizer=tokenizer, pairs=pairs, arguments=asked)
    common = {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": MINIBATCH,
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    twin = twin_of(hugging_face_twin(base, tmp_path / "twin"), "last:2")
    batch = next(iter(dpo_trainer(run, twin, common).get_train_dataloader()))
    longest = max(pair_tokens(tokenizer, pair) for pair in pairs)
    assert longest > 1024
    assert batch["input_ids"].shape[1] >= longest
    learnt_from = batch["completion_mask"].sum(1)
    assert int(learnt_from.min()) > 0
    assert int(learnt_from.max()) >= len(encode_plain(tokenizer, [long])[0])


@pytest.mark.parametrize("method", ["dpo", "rloo"])
def test_trl_trains_the_twin_of_a_checkpoint(
    database: Path, base: Path, tmp_path: Path, method: str
) -> None:
    twin = hugging_face_twin(base, tmp_path / "twin")
    folder = run(twin, database, tmp_path, method=method, rollouts=2, rollout_size=16)
    aligned, before = (DeepSeekModel.from_pretrained(f).state_dict() for f in (folder, twin))
    changed = {name for name in before if not torch.equal(aligned[name], before[name])}
    assert "norm.weight" in changed  # as in RLPO
    assert all(name.startswith(("layers.2", "layers.3", "norm.")) for name in changed)
    figures = read_object(tmp_path / "run" / "result.json")["trl"]
    assert method != "rloo" or {"kl", "reward", "completions/mean_length"} <= figures.keys()
    assert read_licence(folder) == read_licence(twin) != Licence()


def hugging_face_twin(base: Path, folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = load(base)
    torch.manual_seed(0)
    folder.mkdir()
    write_card(folder, "gemma", "https://example.org/terms", "A model.")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder
