"""Pre-training: from files to a model folder, resumed bit for bit, its settings checked."""

import errno
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from train.loop.tiny_pretrain import settings

import deepseek
from deepseek.checkpoint import store
from deepseek.data import RowLoader, TokenShards
from deepseek.errors import ConfigError, DataError, TrainError
from deepseek.text.tokenizer import train_tokenizer
from deepseek.train.jobs import pretrain
from deepseek.train.jobs.pretrain import PretrainRun, mixed_texts
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.loop import loop
from deepseek.train.loop.backends import Backend
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.progress import ProgressBar


@pytest.fixture(scope="module")
def whole(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    deepseek.pretrain(settings(domains, folder), quiet=True)
    return folder


def test_from_files_to_a_model_that_loads(whole: Path) -> None:
    model, tokenizer = deepseek.load(whole / "model", dtype="float32")
    assert len(tokenizer) == 300 and model.config.num_experts == 4
    assert tokenizer.decode(tokenizer("alpha ∑\n\tβ").input_ids) == "alpha ∑\n\tβ"
    assert model(torch.tensor([tokenizer("alpha beta").input_ids])).logits.isfinite().all()


def test_the_run_folder_tells_the_run(whole: Path) -> None:
    records = read_metrics(whole / "run" / "training" / "metrics.jsonl")
    evaluations = [record for record in records if "held_out_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 5, 10, 12]
    assert evaluations[-1]["held_out_loss"] < evaluations[0]["held_out_loss"] - 0.5
    assert {
        "held_out_loss.words",
        "held_out_loss.code",
        "held_out_max_violation",
        "idle_experts",
    } <= set(evaluations[0])
    last = evaluations[-1]
    of_the_mix = (2 * last["held_out_loss.words"] + last["held_out_loss.code"]) / 3
    assert last["held_out_loss"] == pytest.approx(of_the_mix)
    assert sum("max_violation" in record for record in records) == 12
    samples = json.loads((whole / "run" / "samples" / "step-00000012.json").read_text())
    assert samples[0].startswith("alpha")
    result = json.loads((whole / "run" / "result.json").read_text())
    assert result["figures"]["held_out_loss"] == evaluations[-1]["held_out_loss"]
    assert set(result["data"]) == {"words", "code"}


def test_routers_move_once_a_step_and_are_restored(whole: Path) -> None:
    tensors, _ = store.load_state(whole / "run" / "training" / "checkpoints" / "step-00000012")
    biases = {name: value for name, value in tensors.items() if name.endswith("balance.bias")}
    assert len(biases) == 2
    for bias in biases.values():  # twelve steps of at most 1e-2, centred
        assert 0 < bias.abs().max() <= 12 * 2e-2 + 1e-6


def test_stopped_and_called_again_ends_with_the_same_bits(
    whole: Path, domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(domains, tmp_path)
    step = loop._Run.step

    def stop_at_7(run: loop._Run) -> None:
        if run.position.step == 7:
            raise KeyboardInterrupt
        step(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Run, "step", stop_at_7)
        deepseek.pretrain(config, quiet=True)
    assert not (tmp_path / "model").exists()
    deepseek.pretrain(config, quiet=True)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), (
            name
        )


def test_a_misspelt_key_is_one_sentence_with_the_right_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ntokens: 1000\nlearning_rat: 1\ndomains: {a: {folder: .}}\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml: .*'learning_rat' is no field here; perhaps 'learning_rate'"
    ):
        PretrainArguments.read(path)
    path = tmp_path / "run.toml"
    path.write_text('name = "x"\ntokens = 1000\n[domains.a]\nfolde = "."\n')
    with pytest.raises(
        ConfigError, match=r"domains\.a: 'folde' is no field here; perhaps 'folder'"
    ):
        PretrainArguments.read(path)
    with pytest.raises(ConfigError, match=r"tokens .* must be a whole number"):
        PretrainArguments.read({"name": "x", "tokens": "many", "domains": {"a": {"folder": "."}}})
    path.write_text("name = = 3")
    with pytest.raises(ConfigError, match="neither YAML nor TOML"):
        PretrainArguments.read(path)


def test_no_secret_becomes_a_token(tmp_path: Path) -> None:
    secret = "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"part {number} has hf_{secret} as its token")
    domains = {"words": {"folder": str(tmp_path)}}
    arguments = PretrainArguments.read(name="x", vocab_size=400, domains=domains, tokens=1000)
    vocabulary = train_tokenizer(mixed_texts(arguments), 400).get_vocab()
    assert not any(secret[:8] in token for token in vocabulary)


def test_a_damaged_shard_is_named_before_training_goes_on(
    whole: Path, domains: Path, tmp_path: Path
) -> None:
    config = settings(domains, tmp_path, steps=2)
    deepseek.pretrain(config, quiet=True)
    (tmp_path / "run" / "result.json").unlink()
    tokens = tmp_path / "run" / "corpus" / "code" / "train" / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[8] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(DataError, match=r"corpus/code/train are damaged; delete"):
        deepseek.pretrain(config, quiet=True)


def test_a_dry_run_estimates_and_writes_nothing(
    domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deepseek.pretrain(settings(domains, tmp_path), dry_run=True)
    assert "12 steps of 128 tokens; memory 0.0 GB, about" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    huge = settings(domains, tmp_path, model={"preset": "deepseek-175b"})
    deepseek.pretrain(huge, dry_run=True)
    assert "more than this machine has free" in capsys.readouterr().err


def test_a_full_disk_stops_with_a_sentence_and_costs_nothing(
    whole: Path, domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, save = settings(domains, tmp_path), store.save_state

    def full(folder: Path, *arguments: object) -> None:
        if folder.name == "step-00000009":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainError, match="checkpoint step-00000009 was not written"),
    ):
        patch.setattr(store, "save_state", full)
        deepseek.pretrain(config, quiet=True)
    deepseek.pretrain(config, quiet=True)
    same = [(f / "model" / "model.safetensors").read_bytes() for f in (tmp_path, whole)]
    assert same[0] == same[1]


def backend_of(world: int) -> Backend:
    """Return a backend that only knows the number of processes."""
    backend = Backend()
    backend.world = world
    return backend


def test_more_processes_than_rows_in_a_batch_are_refused_at_once(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "current", lambda _: nullcontext(backend_of(16)))
    with pytest.raises(ConfigError, match=r"batch_rows=4 is too small for 16 .* at least 16"):
        deepseek.pretrain(settings(domains, tmp_path), quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "world", "expected"), [(3, 8, 9), (1, 2, 2), (8, 8, 8)])
def test_each_process_has_held_out_rows_and_each_row_counts_the_same(
    whole: Path, domains: Path, tmp_path: Path, rows: int, world: int, expected: int
) -> None:
    arguments = PretrainArguments.read(settings(domains, tmp_path, batch_rows=8))
    with ProgressBar(quiet=True) as progress:
        run = PretrainRun(arguments, tmp_path, tmp_path, progress, backend_of(world))
    shards = TokenShards(whole / "run" / "corpus" / "code" / "train")
    loader = RowLoader(shards, rows=8, length=32).first(rows)
    (batch,) = run.held_out_batches(loader)
    assert len(batch.row_ids) == expected
    _, counts = batch.row_ids.unique(return_counts=True)
    assert counts.tolist() == [expected // rows] * rows
