"""A fingerprint depends only on the names, dtypes, shapes and values of the weights, and on the
tokenizer.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.errors import CheckpointError

WEIGHTS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.zeros(5).bfloat16(),
    "c": torch.tensor(7),
}
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 2, "content": "ab", "special": True}],
}


def save(
    folder: Path,
    weights: dict[str, Tensor],
    tokenizer: object = None,
    shards: int = 1,
    note: str = "",
) -> Path:
    """Write a model folder whose weights are split over `shards` files."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"note": note})
    else:
        home = {
            name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(names)
        }
        for file in set(home.values()):
            save_file({name: weights[name] for name in names if home[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_sharding_metadata_and_folder_do_not_matter(tmp_path: Path) -> None:
    one = fingerprint(save(tmp_path / "one", WEIGHTS, TOKENIZER))
    two = fingerprint(save(tmp_path / "two", WEIGHTS, TOKENIZER, shards=2))
    noted = fingerprint(save(tmp_path / "noted", WEIGHTS, TOKENIZER, note="other"))
    assert one == two == noted


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"a": WEIGHTS["a"] + torch.eye(3, 4) * 1e-6}, id="value"),
        pytest.param({"a": WEIGHTS["a"].reshape(4, 3)}, id="shape"),
        pytest.param({"b": torch.zeros(5).half()}, id="dtype"),
        pytest.param({"b": -torch.zeros(5).bfloat16()}, id="sign of zero"),
        pytest.param({"d": torch.tensor(0)}, id="another tensor"),
    ],
)
def test_weights_matter(tmp_path: Path, change: dict[str, Tensor]) -> None:
    before = fingerprint(save(tmp_path / "before", WEIGHTS, TOKENIZER))
    after = fingerprint(save(tmp_path / "after", WEIGHTS | change, TOKENIZER))
    assert before.weights != after.weights
    assert before.tokenizer == after.tokenizer


def test_swapped_names_matter(tmp_path: Path) -> None:
    x, y = torch.ones(2), torch.zeros(2)
    before, after = ({"a": x, "b": y}, {"a": y.clone(), "b": x.clone()})
    assert fingerprint(save(tmp_path / "1", before)) != fingerprint(save(tmp_path / "2", after))


def test_the_old_spelling_of_merges_is_the_same_tokenizer(tmp_path: Path) -> None:
    old = {
        "model": {"merges": ["a b"], "vocab": {"ab": 2, "b": 1, "a": 0}},
        "added_tokens": TOKENIZER["added_tokens"],
    }
    assert fingerprint(save(tmp_path / "1", WEIGHTS, TOKENIZER)) == fingerprint(
        save(tmp_path / "2", WEIGHTS, old)
    )


def test_tokenizers_differ_and_may_be_missing(tmp_path: Path) -> None:
    more = {**TOKENIZER, "added_tokens": []}
    first, second = (
        fingerprint(save(tmp_path / str(i), WEIGHTS, t)) for i, t in enumerate([TOKENIZER, more])
    )
    assert first.tokenizer != second.tokenizer
    assert fingerprint(save(tmp_path / "none", WEIGHTS)).tokenizer == ""


def test_the_cache_notices_a_changed_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", WEIGHTS)
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    save(folder, WEIGHTS | {"c": torch.tensor(8)})
    assert fingerprint(folder) != before


@pytest.mark.parametrize("content", ["{}", "[]", '{"weights": "a"}', '{"sha256": "a"}', "{"])
def test_a_spoilt_cache_is_written_anew(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = save(tmp_path / "model", WEIGHTS)
    expected = fingerprint(folder)
    (cache,) = (tmp_path / "home" / "fingerprints").iterdir()
    kept = cache.read_text()
    cache.write_text(content)
    assert fingerprint(folder) == expected
    assert cache.read_text() == kept


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../model.safetensors"}}'
    )


def forget_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )


def break_off_before_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def break_off_before_the_first_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


def write_text(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs\n")


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        point_outside,
        forget_a_shard,
        break_off_before_the_index,
        break_off_before_the_first_shard,
        write_text,
        spoil_tokenizer,
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = save(tmp_path / "model", WEIGHTS, TOKENIZER)
    damage(folder)
    with pytest.raises(CheckpointError, match="model"):
        fingerprint(folder)


def test_weights_held_twice_are_those_that_transformers_loads(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", WEIGHTS, TOKENIZER, shards=2)
    shards = fingerprint(folder)
    other = {**WEIGHTS, "c": torch.tensor(8)}
    save_file(other, folder / "model.safetensors")
    assert fingerprint(folder) != shards
    assert fingerprint(folder) == fingerprint(save(tmp_path / "other", other, TOKENIZER))


def test_weights_of_the_same_size_and_time_are_read_again(tmp_path: Path) -> None:
    """Container images with clamped file times have such files."""
    prints = set()
    for value in (7, 8):
        folder = save(tmp_path / "model", {"c": torch.tensor(value)}, TOKENIZER)
        os.utime(folder / "model.safetensors", ns=(0, 0))
        prints.add(fingerprint(folder))
    assert len(prints) == 2


def test_a_home_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(save(tmp_path / "model", WEIGHTS, TOKENIZER))
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "file"))
    assert fingerprint(tmp_path / "model") == expected
