"""PEFT's adapter folders: what is read, and 40 hostile ones that are refused in one sentence."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pack_fixtures import BASE, is_one_sentence
from safetensors.torch import load_file, save_file
from tiny_adapter import write_adapter

from deepseek.errors import PackError
from deepseek.packs import peft
from deepseek.packs.peft import read_adapter

LAYERS = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (48, 32)}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Spoil = Callable[[Path], object]


def config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def cut(size: int) -> Spoil:
    return lambda folder: os.truncate(folder / WEIGHTS, size)


def with_value(value: float) -> Spoil:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[A][1, 2] = value

    return tensors(change)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def fifo(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"holds no {CONFIG}"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "pickle": (pickled, "save it again, with safe_serialization=True"),
    "pickle in disguise": (written(WEIGHTS, pickle.dumps({"a": 1})), "damaged"),
    "pipe": (fifo, f"holds no {WEIGHTS}"),
    "empty weights": (written(WEIGHTS, b""), "damaged"),
    "cut in the header": (cut(20), "damaged"),
    "cut in the data": (cut(2000), "damaged"),
    "noise": (written(WEIGHTS, os.urandom(4096)), "damaged"),
    "huge header": (written(WEIGHTS, (1 << 60).to_bytes(8, "little") + b"{}"), "damaged"),
    "config is a list": (written(CONFIG, b"[]"), "not a table"),
    "config is text": (written(CONFIG, b"LORA"), "malformed"),
    "config is latin-1": (written(CONFIG, b'{"peft_type": "\xe9"}'), "UTF-8"),
    "config is nested": (written(CONFIG, b"[" * 100_000), "nested too deeply"),
    "config repeats a key": (written(CONFIG, b'{"r": 1, "r": 2}'), "repeated"),
    "config with NaN": (written(CONFIG, b'{"r": NaN}'), "NaN"),
    "config of 2 MB": (written(CONFIG, b'"' + b"a" * (2 << 20) + b'"'), "bytes"),
    "other type": (config(peft_type="IA3"), "only LORA"),
    "no type": (config(peft_type=None), "only LORA"),
    "type is a list": (config(peft_type=["LORA"]), "only LORA"),
    "DoRA": (config(use_dora=True), "use_dora=True"),
    "modules to save": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (config(bias="all"), "bias=all"),
    "bias of the change": (config(lora_bias=True), "lora_bias"),
    "transposed": (config(fan_in_fan_out=True), "fan_in_fan_out"),
    "replicated layers": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "activated": (config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "parameters": (config(target_parameters=["experts"]), "target_parameters"),
    "field of the future": (config(use_magic=True), "use_magic"),
    "changed base": (config(init_lora_weights="pissa"), "init_lora_weights=pissa"),
    "rank is text": (config(r="8"), "no number"),
    "rank is true": (config(r=True), "no number"),
    "rank is huge": (config(r=10**9), "no number"),
    "rank is another": (config(r=8), "rank 4 and its config says 8"),
    "alpha is a list": (config(lora_alpha=[1]), "no number"),
    "rslora is a number": (config(use_rslora=1), "use_rslora"),
    "pattern is a list": (config(rank_pattern=["q_proj"]), "not a table"),
    "pattern is no regex": (config(alpha_pattern={"(": 1}), "no regular expression"),
    "pattern never ends": (config(alpha_pattern={r"(.|..|...)*[A-Z]": 1}), "longer than 1 s"),
    "pattern is long": (config(alpha_pattern={"a" * 501: 1}), "too long"),
    "targets are a number": (config(target_modules=3), "target_modules"),
    "targets are numbers": (config(target_modules=[3]), "target_modules"),
    "A is missing": (tensors(lambda found: found.pop(A)), "lora_A.weight is missing"),
    "B is missing": (tensors(lambda found: found.pop(B)), "lora_B.weight is missing"),
    "no tensors": (tensors(dict.clear), "no tensors"),
    "A is a vector": (tensors(lambda found: found.update({A: torch.ones(4)})), "two factors"),
    "B is of another rank": (
        tensors(lambda found: found.update({B: torch.ones(32, 3)})),
        "two factors",
    ),
    "A is empty": (tensors(lambda found: found.update({A: torch.ones(4, 0)})), "two factors"),
    "B is empty": (tensors(lambda found: found.update({B: torch.ones(0, 4)})), "two factors"),
    "rank beyond the limit": (
        tensors(lambda found: found.update({A: torch.ones(1025, 2), B: torch.ones(2, 1025)})),
        "1024 is allowed",
    ),
    "fp64": (tensors(lambda found: found.update({A: found[A].double()})), "float64"),
    "integers": (tensors(lambda found: found.update({A: found[A].int()})), "int32"),
    "an embedding": (
        tensors(
            lambda found: found.update(
                {"base_model.model.embed.lora_embedding_A": torch.ones(4, 4)}
            )
        ),
        "not a matrix of a linear layer",
    ),
    "a path": (
        tensors(lambda found: found.update({"../../etc.lora_A.weight": torch.ones(4, 4)})),
        "not a matrix of a linear layer",
    ),
    "an escape code": (
        tensors(lambda found: found.update({"\x1b[31m.lora_A.weight": torch.ones(4, 4)})),
        "not a matrix of a linear layer",
    ),
    "NaN": (with_value(float("nan")), "NaN or infinity"),
    "infinity": (with_value(float("inf")), "NaN or infinity"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS)
    read_adapter(folder)
    spoil, reason = HOSTILE[name]
    spoil(folder)
    started = time.monotonic()
    with pytest.raises(PackError, match=r"^adapter .* is refused: ") as refused:
        read_adapter(folder)
    assert reason in str(refused.value)
    assert is_one_sentence(str(refused.value))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("length", [199, 200, 201, 1000])
def test_a_long_name_of_the_base_fits_into_a_manifest(length: int, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS)
    config(base_model_name_or_path="x" * length)(folder)
    assert BASE.model_validate(BASE.model_dump() | {"name": read_adapter(folder).base})


def test_targets_are_never_evaluated(tmp_path: Path) -> None:
    """The layers are taken from the tensors' names, so a slow regular expression costs nothing."""
    folder = write_adapter(tmp_path / "adapter", LAYERS, target_modules=r"(.|..|...)*[A-Z]")
    assert list(read_adapter(folder).changes) == sorted(LAYERS)


def test_links_as_in_a_download_cache_are_followed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "blobs", LAYERS)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(folder / name)
    assert read_adapter(snapshot).digest == read_adapter(folder).digest


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    patterns = {r"layers\.0\.self_attn\.q_proj": 8, "q_proj": 2, "down": 99}
    folder = write_adapter(tmp_path / "adapter", LAYERS, alpha_pattern=patterns)
    changes = read_adapter(folder).changes
    assert [changes[name].scaling for name in LAYERS] == [2.0, 1.0]


@pytest.mark.parametrize(
    "pattern", ["(?:q_proj){e<=1}", r"q_\p{L}roj", "((?:a*)*)*(?2)", "(?R)", "(q_proj"]
)
def test_patterns_that_peft_does_not_have_are_refused(pattern: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LAYERS, alpha_pattern={pattern: 8})
    with pytest.raises(PackError, match="no regular expression"):
        read_adapter(folder)


def test_many_slow_patterns_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for all patterns and layers together."""
    monkeypatch.setattr(peft, "PATTERN_SECONDS", 0.05)
    patterns = {rf"(.|..|...)*{number}": 1 for number in range(2048)}
    layers = {f"model.layers.{number}.{'a' * 40}": 4 for number in range(2048)}
    tried: list[float] = []

    class Slow:
        def match(self, _: str, timeout: float) -> None:
            assert timeout > 0
            tried.append(timeout)
            time.sleep(0.001)

    monkeypatch.setattr(peft.regex, "compile", lambda _: Slow())
    with pytest.raises(PackError, match="takes longer than"):
        peft._by_pattern({"alpha_pattern": patterns}, "alpha_pattern", 8, layers)
    assert len(tried) < 60
