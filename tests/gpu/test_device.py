"""The model, its experts, the engine and training on an accelerator, against the same on the
processor.

`pytest -m gpu` runs them where there is a CUDA device; elsewhere they are skipped.
`pytest -m gpu --device cpu` runs them on the processor, which shows that they can pass.
"""

from pathlib import Path

import pytest
import torch
from tiny_expert import save_base, save_expert
from torch import Tensor

from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import Responses
from deepseek.train.rl.update import RLPOState, rlpo_update

pytestmark = pytest.mark.gpu

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """The device to test on."""
    wanted = str(request.config.getoption("--device"))
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and an expert `one` beside it."""
    place = save_base(tmp_path_factory.mktemp("gpu") / "base")
    save_expert(load(place), "one", place.parent)
    return place


@pytest.fixture
def loaded(folder: Path, device: str) -> Loaded:
    return load(folder, dtype="float32", device=device)


def logits_of(loaded: Loaded) -> Tensor:
    with torch.no_grad():
        return loaded.model(IDS.to(loaded.model.device)).logits.float().cpu()


def test_a_forward_pass_gives_the_logits_of_the_processor(
    folder: Path, loaded: Loaded, device: str
) -> None:
    assert loaded.model.device.type == torch.device(device).type
    torch.testing.assert_close(
        logits_of(loaded), logits_of(load(folder, dtype="float32")), atol=1e-4, rtol=1e-4
    )


def test_bf16_stays_near(folder: Path, device: str) -> None:
    rounded, exact = (
        logits_of(load(folder, dtype="bfloat16", device=device)),
        logits_of(load(folder, dtype="float32")),
    )
    assert float((rounded - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_an_expert_is_plugged_and_leaves_no_trace(folder: Path, loaded: Loaded) -> None:
    before = logits_of(loaded)
    loaded.model.experts.plug(folder.parent / "one.safetensors")
    plugged = logits_of(loaded)
    assert not torch.equal(plugged, before)
    on_processor = load(folder, dtype="float32", experts=[folder.parent / "one.safetensors"])
    torch.testing.assert_close(plugged, logits_of(on_processor), atol=1e-4, rtol=1e-4)
    loaded.model.experts.unplug("one")
    assert torch.equal(logits_of(loaded), before)


def test_a_request_is_served(folder: Path, loaded: Loaded) -> None:
    request = Request(
        tuple(IDS[0].tolist()), Sampling(max_new_tokens=6, temperature=0.0), ignore_end=True
    )
    written = []
    for one in (loaded, load(folder, dtype="float32")):
        with Engine(one.model, one.tokenizer) as engine:
            written.append([event.token_id for event in engine.submit(request)])
    assert written[0] == written[1]


def test_training_steps_lower_the_loss(loaded: Loaded) -> None:
    model = loaded.model.train()
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters, OptimConfig(learning_rate=1e-2))
    ids = IDS.to(model.device)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(parameters.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_alignment_makes_a_step(loaded: Loaded) -> None:
    def even(responses: Responses) -> Tensor:
        return (responses.mask_BT * (responses.targets_BT % 2 == 0)).sum(1)

    config = RLPOConfig(new_tokens=3, minibatch=4, epochs=1, value_rollouts=0)
    state = RLPOState(loaded.model, even, config)
    metrics = rlpo_update(loaded.model, even, {"prompts": [[3, 4]] * 8}, state=state)
    assert metrics["skipped"] == 0
    assert torch.isfinite(torch.tensor([metrics["loss"], metrics["kl"]])).all()
