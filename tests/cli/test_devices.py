"""A wrong device, dtype or format on the command line gives one sentence and exit code 2."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek.cli.main import main
from deepseek.device.choose import choose_device
from deepseek.errors import DataError
from deepseek.train.jobs import merge, watch

EXPERT = ["expert", "train", "--name", "x", "--from-folder", "."]

NEVER = [
    ["generate", "hello", "--device", "gpu"],
    ["generate", "hello", "--device", "cuda:x"],
    ["generate", "hello", "--device", "cuda:-1"],
    ["generate", "hello", "--device", ""],
    ["generate", "hello", "--device", "cpu\n"],
    ["generate", "hello", "--dtype", "fp8"],
    ["chat", "--device", "tpu"],
    ["chat", "--dtype", "int8"],
    ["eval", "--device", "CPU"],
    ["run", "--device", "cuda:"],
    ["serve", "--device", "nvidia"],
    ["serve", "--dtype", "half"],
    ["quantize", "smollm2-135m", "--out", "/tmp/x", "--device", "none"],
    [*EXPERT, "--device", "gpu0"],
    [*EXPERT, "--dtype", "float16"],
    [*EXPERT, "--dtype", "bf16"],
    ["adapt", "--from-folder", ".", "--device", "cuda:1:2"],
    ["adapt", "--from-folder", ".", "--dtype", "float16"],
    ["align", "--dtype", "float64"],
    ["align", "--device", "cuda 0"],
    ["distill-hash", "--device", "xla"],
    ["expert", "merge", "a", "b", "--out", "c", "--device", "gpu"],
    ["expert", "merge", "a", "b", "--out", "c", "--dtype", "fp8"],
    ["watch", "x", "--device", "gpu"],
    ["watch", "x", "--dtype", "float16"],
    ["inspect", "attention", "--device", "disk"],
    ["export", "smollm2-135m", "/tmp/x", "--to", "onyx"],
]
"""Commands that are refused on every machine."""

WITHOUT_A_GPU = [
    ["generate", "hello", "--device", "cuda"],
    ["generate", "hello", "--device", "cuda:7"],
    ["serve", "--device", "cuda:1"],
    [*EXPERT, "--device", "cuda"],
    ["align", "--device", "cuda:0"],
    ["expert", "merge", "a", "b", "--out", "c", "--device", "cuda"],
    ["watch", "x", "--device", "cuda"],
]


@pytest.mark.parametrize("words", NEVER, ids=" ".join)
def test_a_wrong_value_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(words, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", WITHOUT_A_GPU, ids=" ".join)
def test_a_missing_gpu_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "take cpu, or auto" in assert_refused(words, capsys)


def assert_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with one sentence, and return it."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    written = capsys.readouterr()
    assert stop.value.code == 2
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    assert written.out == ""
    return written.err


def test_watch_computes_updates_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Changed:
        """A trained expert with something new in its source."""

        name = "shop"

        def state(self) -> str:
            return "new"

        def learnt_states(self) -> frozenset[str]:
            return frozenset()

    monkeypatch.setattr(watch.TrainedExpert, "find", lambda _: Changed())
    monkeypatch.setattr(watch, "check_key", lambda *_: None)
    monkeypatch.setattr(watch, "train_signed", lambda **options: asked.append(options))
    whole = watch.watch_expert
    monkeypatch.setattr(watch, "watch_expert", lambda *a, **b: whole(*a, **{**b, "rounds": 1}))
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    words = ["watch", "shop", "--minutes", "2", "--device", "cpu", "--dtype", "bfloat16"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    budget = {"minutes": 2.0, "device": "cpu", "dtype": "bfloat16"}
    assert asked == [{"key": None, "update": "shop", "quiet": True, **budget}]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [([], torch.float32), (["--device", "cpu", "--dtype", "bfloat16"], torch.bfloat16)],
)
def test_merge_loads_the_base_as_it_is_told_to(
    options: list[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(_: object, **given: Any) -> None:
        loaded.append(given)
        raise DataError("It is loaded.")

    trained = SimpleNamespace(request=SimpleNamespace(base="a", dtype="float32"))
    monkeypatch.setattr(merge.TrainedExpert, "find", lambda _: trained)
    monkeypatch.setattr(merge, "resolve", lambda base: base)
    monkeypatch.setattr(merge, "load_language_model", load)
    with pytest.raises(SystemExit) as stop:
        main(["expert", "merge", "greek", "stars", "--out", "both", *options])
    assert stop.value.code == 2
    assert [given["dtype"] for given in loaded] == [dtype]


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_the_device_of_a_tensor_may_be_passed_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert choose_device(torch.device(kind, 0)) == torch.device(kind)
