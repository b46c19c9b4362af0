"""Adaptation: each mode lowers the held-out loss, trains only its parameters, and writes a folder
that other libraries can read.
"""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deepseek
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.licence import read_licence, write_card
from deepseek.checkpoint.store import read_json, write_json
from deepseek.errors import ConfigError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates import public_text
from deepseek.train.jobs.adapt import adapt_request, largest_rank
from deepseek.train.jobs.arguments import AdaptArguments
from deepseek.train.jobs.plan import TrainingPlan


@pytest.fixture(scope="session")
def llama(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as written by another library: a Llama with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_base / name).read_bytes())
    return folder


def adapted(base: Path, text: Path, folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    given = {"epochs": 4, "row_length": 64, "learning_rate": 1e-2, "quiet": True, **changes}
    out = deepseek.adapt(
        str(base),
        name="x",
        from_folder=text,
        out=folder / "out",
        run_folder=folder / "run",
        **given,
    )
    return out, json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.parametrize("mode", ["last-n", "full"])
def test_a_mode_learns_and_stock_transformers_read_the_result(
    mode: str, llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    write_card(base, "gemma", "https://example.org/terms", "A model.")
    out, result = adapted(base, text_folder, tmp_path, mode=mode)
    figures = result["figures"]
    assert figures["held_out_loss"] < figures["held_out_loss_before"] - 0.5
    assert read_licence(out) == read_licence(base)
    ids = torch.tensor([deepseek.load(llama).tokenizer("alpha beta gamma").input_ids])
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert type(stock) is LlamaForCausalLM
    ours = deepseek.load(out, dtype="float32").model
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, stock(ids).logits, atol=1e-5)


def test_a_tied_head_that_is_stored_twice_is_written_once(
    llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    out, _ = adapted(base, text_folder, tmp_path, mode="full", epochs=1)
    ids = torch.tensor([[3, 4, 5]])
    ours = deepseek.load(out, dtype="float32").model
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert torch.allclose(ours(ids).logits, stock, atol=1e-5)


@pytest.mark.parametrize("mode", ["last-n", "full"])
def test_rows_of_a_long_message_are_no_test(
    mode: str, llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)
    asked = [path.read_text() for path in sorted(text_folder.iterdir())]
    answer = {"role": "assistant", "content": "alpha beta"}
    chats = [{"messages": [{"role": "user", "content": text}, answer]} for text in asked]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    deepseek.adapt(
        str(base),
        name="x",
        mode=mode,
        from_jsonl=source,
        out=tmp_path / "out",
        run_folder=tmp_path / "run",
        row_length=16,
        held_out_tokens=16,
        quiet=True,
    )
    figures = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    assert figures["held_out_loss_before"] > 0 and figures["best_step"] > 0


def test_last_n_leaves_everything_below_as_it_was(
    llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    out, result = adapted(llama, text_folder, tmp_path, last=1, epochs=1)
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if name.startswith("model.layers.3.") or name == "model.norm.weight"
    }
    assert result["figures"]["trained_parameters"] == sum(before[name].numel() for name in changed)
    assert not (tmp_path / "run" / "trunk").exists()


def test_last_n_computes_what_the_whole_model_does(
    llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Before the first step, the loss on cached hidden states is that of the base."""
    losses = [
        adapted(llama, text_folder, tmp_path / mode, mode=mode, epochs=1)[1]["figures"][
            "held_out_loss_before"
        ]
        for mode in ("last-n", "full")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.fixture(scope="session")
def mixture(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four layers, in which pairs of layers share experts."""
    folder = tmp_path_factory.mktemp("mixture")
    dense, tokenizer = deepseek.load(tiny_base, dtype="float32")
    config = copy.deepcopy(dense.config)
    config.update({"num_experts": 4, "expert_dim": 16, "max_experts": 2, "expert_sharing": 2})
    torch.manual_seed(0)
    DeepSeekModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("mode", "last"), [("last-n", 1), ("last-n", 2), ("full", 3)])
def test_a_mixture_is_adapted_with_its_pools_and_its_balance(
    mode: str, last: int, mixture: Path, text_folder: Path, tmp_path: Path
) -> None:
    out, _ = adapted(mixture, text_folder, tmp_path, mode=mode, epochs=1, last=last)
    before, after = load_file(mixture / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    pools = {name for name in before if name.startswith("expert_pools.")}
    if mode == "last-n":
        # Pools shared by layers below do not change.
        own = "expert_pools.1." if last == 2 else "none"
        assert changed & pools == {name for name in pools if name.startswith(own)}
        assert not any(name.startswith(("layers.0.", "layers.1.")) for name in changed)
    else:
        assert changed >= pools
        assert any(".balance." in name for name in changed)
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_is_merged(llama: Path, text_folder: Path, tmp_path: Path, rank: int) -> None:
    out, result = adapted(llama, text_folder, tmp_path, mode="lora", rank=rank, learning_rate=3e-2)
    figures = result["figures"]
    assert figures["trained_parameters"] == rank * 832
    assert figures["held_out_loss"] < figures["held_out_loss_before"] - 0.1
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"v_proj", "o_proj", "down_proj"}


def plan_of(rows: int, steps: int) -> TrainingPlan:
    return TrainingPlan(rows, 1, 1, steps, 2, 1.0)


@pytest.mark.parametrize(
    ("mode", "asked", "little", "enough"),
    [
        ("last-n", None, 5e-4, 1e-3),
        ("lora", None, 8e-3, 8e-3),
        ("full", None, 2e-4, 2e-4),
        ("last-n", 1e-2, 1e-2, 1e-2),
    ],
)
def test_the_rate_follows_from_the_text_unless_it_is_asked_for(
    llama: Path, mode: str, asked: float | None, little: float, enough: float
) -> None:
    arguments = {"base": str(llama), "name": "words", "from_folder": ".", "row_length": 100}
    request = adapt_request(AdaptArguments(**arguments, mode=mode, learning_rate=asked))
    rates = [request.peak_rate(plan_of(rows, steps=rows // 2)) for rows in (2, 398, 400)]
    assert rates == [little, little, enough]


@pytest.mark.parametrize(("rank", "rate"), [(None, 8e-3), (1, 8e-3), (5, 8e-3), (20, 4e-3)])
def test_the_rate_of_adapters_falls_with_their_rank(
    llama: Path, rank: int | None, rate: float
) -> None:
    arguments = AdaptArguments(base=str(llama), name="x", from_folder=".", mode="lora", rank=rank)
    assert adapt_request(arguments).learning_rate == rate


def test_the_rank_of_lora_stays_within_its_share(llama: Path) -> None:
    model = deepseek.load(llama, dtype="float32").model
    total = sum(parameter.numel() for parameter in model.parameters())
    each = 4 * ((32 + 16) + (32 + 32) + (64 + 32))  # v, o and down of four layers at rank 1
    for share in (0.02, 0.05, 0.1):
        assert (
            largest_rank(model, share) * each
            <= share * total
            < (largest_rank(model, share) + 1) * each
        )
    with pytest.raises(ConfigError, match="LoRA of rank 1 has 832 parameters"):
        largest_rank(model, 1e-3)


def test_experts_beside_an_adapted_model_also_replay_what_it_was_adapted_to(
    llama: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        public_text,
        "kept_rows",
        lambda *_: torch.zeros(4, public_text.ROW_LENGTH, dtype=torch.long),
    )
    once, _ = adapted(llama, text_folder, tmp_path / "once", epochs=1)
    twice, _ = adapted(once, text_folder, tmp_path / "twice", epochs=1, learning_rate=1e-3)
    model, tokenizer = deepseek.load(twice, dtype="float32")
    own = [
        row
        for kept in (once, twice)
        for row in public_text._adapted_rows(fingerprint(kept).weights)
    ]
    assert [
        len(public_text._adapted_rows(fingerprint(kept).weights)) for kept in (llama, once, twice)
    ] == [0, 80, 160]
    assert "alpha" in tokenizer.decode(own[0])
    assert torch.equal(public_text.training_rows(model, tokenizer)[2:], torch.stack(own[80:]))
    # The rows of the first adaptation.
    assert torch.equal(torch.stack(own[80:160]), torch.stack(own[:80]))


def test_the_same_call_again_changes_nothing(
    llama: Path, text_folder: Path, tmp_path: Path
) -> None:
    out, _ = adapted(llama, text_folder, tmp_path, epochs=1)
    time = (out / "model.safetensors").stat().st_mtime_ns
    adapted(llama, text_folder, tmp_path, epochs=1)
    assert (out / "model.safetensors").stat().st_mtime_ns == time


def test_mistakes_are_one_sentence(llama: Path, text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode 'lorra' is unknown; perhaps 'lora'"):
        adapted(llama, text_folder, tmp_path, mode="lorra")
    with pytest.raises(ConfigError, match="last=4 is impossible; the model has 4 layers"):
        adapted(llama, text_folder, tmp_path, last=4)


def test_by_default_rows_are_no_longer_than_the_context(
    llama: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(llama, text_folder, tmp_path, epochs=1, row_length=None, quiet=False)
    stored = read_json(tmp_path / "run" / "request.json")
    assert stored["row_length"] == 128
    line = f"rows have 128 tokens, the whole context of {llama}"
    assert line in " ".join(capsys.readouterr().err.split())
    adapted(llama, text_folder, tmp_path, epochs=1, row_length=128)  # the same run
    with pytest.raises(ConfigError, match=r"row_length=512 is impossible; .* a context of 128"):
        adapted(llama, text_folder, tmp_path / "other", row_length=512)


def test_the_default_of_a_begun_run_stays(llama: Path, tmp_path: Path) -> None:
    """Earlier versions used 512 tokens for every context."""
    places = {"from_folder": tmp_path, "run_folder": tmp_path}
    asked = AdaptArguments(base=str(llama), name="x", **places)
    lengths = []
    for stored in (None, 512, 64):
        if stored:
            write_json(tmp_path / "request.json", {"row_length": stored})
        lengths.append(adapt_request(asked).row_length)
    assert lengths == [128, 512, 128]


def test_a_dry_run_estimates_and_writes_nothing(
    llama: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deepseek.adapt(
        str(llama),
        name="x",
        from_folder=text_folder,
        out=tmp_path / "o",
        run_folder=tmp_path / "r",
        row_length=64,
        dry_run=True,
    )
    assert re.search(r"trainable parameters, about \d+\.\d minutes", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
