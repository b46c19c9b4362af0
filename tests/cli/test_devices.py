"""A wrong device, dtype or format is one sentence on the command line, with exit code 2."""

import pytest
import torch

from deepseek.cli.main import main

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
    ["inspect", "attention", "--device", "disk"],
    ["export", "smollm2-135m", "/tmp/x", "--to", "onyx"],
]
"""Commands that are wrong on every machine."""

WITHOUT_A_GPU = [
    ["generate", "hello", "--device", "cuda"],
    ["generate", "hello", "--device", "cuda:7"],
    ["serve", "--device", "cuda:1"],
    [*EXPERT, "--device", "cuda"],
    ["align", "--device", "cuda:0"],
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
