"""An exported GGUF file computes what the model computes, in transformers and in llama.cpp."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_gguf
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_expert import save_base
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deepseek.checkpoint.gguf.config import generation_config
from deepseek.checkpoint.gguf.convert import convert_gguf
from deepseek.checkpoint.gguf.reader import GgufFile, read_gguf
from deepseek.checkpoint.gguf.tokenizer import gguf_tokenizer
from deepseek.checkpoint.licence import write_card
from deepseek.checkpoint.store import read_json, write_json
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export import gguf
from deepseek.export.export import export_model
from deepseek.export.gguf_tokenizer import tokenizer_facts

TOKENIZER = tiny_tokenizer()
IDS = torch.arange(2, 82).reshape(2, 40)


def stock(architecture: str, tmp_path: Path, **fields: object) -> Path:
    """Return a folder with a tiny model of an architecture and its tokenizer."""
    model = tiny_gguf.tiny_model(architecture, **fields)
    file = tiny_gguf.write_gguf(model, tmp_path / "source.gguf", architecture)
    folder = tmp_path / "stock"
    folder.mkdir()
    convert_gguf(file, folder)
    model.save_pretrained(folder)
    return folder


def logits(source: Path) -> torch.Tensor:
    """Return the logits of a folder, or of a GGUF file as `transformers` reads it."""
    is_file = source.suffix == ".gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source.parent if is_file else source,
        gguf_file=source.name if is_file else None,
        dtype=torch.float32,
        attn_implementation="eager",  # other implementations do not cap scores
    )
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3"]
)
def test_transformers_reads_the_same_model(architecture: str, tmp_path: Path) -> None:
    folder = stock(architecture, tmp_path)
    out = tmp_path / "out.gguf"
    assert export_model(folder, out, "gguf", dtype="float32") < 1e-6
    assert torch.allclose(logits(out), logits(folder), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "source.gguf", "stock"]


@pytest.mark.parametrize("dtype", gguf.ENCODINGS)
def test_weights_are_quantised_on_request(dtype: str, tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    out = tmp_path / "out.gguf"
    error = export_model(folder, out, "gguf", dtype=dtype)
    kinds = {name: tensor.kind for name, tensor in read_gguf(out).tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == gguf.ENCODINGS[dtype][0]
    assert kinds["output_norm.weight"].name == "F32"
    largest = logits(folder).abs().max()
    assert (logits(out) - logits(folder)).abs().max() / largest < max(3 * error, 1e-6)
    assert error == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_tokenizer_goes_along(architecture: str, tmp_path: Path) -> None:
    folder = stock(architecture, tmp_path)
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf")
    ours = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "back").mkdir()
    convert_gguf(out, tmp_path / "back")
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "the ape  had 12 bad\ngems<|im_end|>"
    assert back(text).input_ids == ours(text).input_ids
    assert back.chat_template == ours.chat_template == tiny_gguf.TEMPLATE
    assert read_gguf(out).facts["tokenizer.ggml.token_type"][:3] == [3, 3, 3]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_space_before_the_text_goes_along(scheme: str, tmp_path: Path) -> None:
    pieces = ["\u2581", "a", "b", "c", "\u2581a", "ab"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = [("\u2581", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    ours = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    folder = tmp_path / "stock"
    tiny_gguf.tiny_model("llama", vocab_size=len(texts)).save_pretrained(folder)
    ours.save_pretrained(folder)
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf")
    assert read_gguf(out).facts["tokenizer.ggml.add_space_prefix"] is (scheme != "never")
    back = gguf_tokenizer(read_gguf(out))
    for text in ("ab c", "a b", "c"):
        ids = back(text, add_special_tokens=False).input_ids
        assert ids == ours(text).input_ids
        assert back.decode(ids) == text


def test_a_tokenizer_that_makes_other_tokens_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "1", "2", "12", "a1"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(
        models.BPE(vocabulary, [("1", "2"), ("a", "1")], byte_fallback=True, unk_token="<unk>")
    )
    out = tmp_path / "out.gguf"

    def export(name: str) -> None:
        folder = tmp_path / name
        tiny_gguf.tiny_model("llama", vocab_size=len(texts)).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        tokenizer.save_pretrained(folder)
        export_model(folder, out, "gguf")

    backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    with pytest.raises(ConfigError, match=r"other tokens of .* of \d+ texts, such as '(12|a1)'"):
        export("digits")
    assert not out.exists()
    backend.pre_tokenizer = None
    export("plain")


@pytest.mark.parametrize("whole_words", [True, False])
def test_words_that_no_merge_makes_are_compared(whole_words: bool, tmp_path: Path) -> None:
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "stock"
    tiny_gguf.tiny_model("llama", vocab_size=len(texts)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!").save_pretrained(folder)
    out = tmp_path / "out.gguf"
    if whole_words:
        with pytest.raises(ConfigError, match=r"other tokens of \d of \d+ texts, such as 'abc'"):
            export_model(folder, out, "gguf")
    else:
        export_model(folder, out, "gguf")
    assert out.exists() is not whole_words


def test_marks_that_join_the_letter_before_are_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.export.gguf_tokenizer.JOINED", 1)
    accent = "".join(bytes_to_unicode()[byte] for byte in "\u0301".encode())
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ee", accent]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(vocabulary, [("e", "e"), (accent[0], accent[1])]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "stock"
    tiny_gguf.tiny_model("llama", vocab_size=len(texts)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!").save_pretrained(folder)
    export_model(folder, tmp_path / "out.gguf", "gguf")


def ends(tokenizer: PreTrainedTokenizerFast, stops: list[int]) -> tuple[dict[str, int], object]:
    """Return the end tokens in the metadata of a tokenizer, and the stop tokens read from it."""
    facts = tokenizer_facts(tokenizer, len(tokenizer), stops)
    file = GgufFile(Path("t.gguf"), {"general.architecture": "llama", **facts}, {})
    found = {role: file.token_id(role) for role in ("eos", "eot", "eom")}
    return {k: v for k, v in found.items() if v is not None}, generation_config(file).eos_token_id


@given(stops=st.lists(st.integers(0, 399), max_size=5))
def test_generation_stops_where_it_did(stops: list[int]) -> None:
    eos = TOKENIZER.eos_token_id
    others = [end for end in dict.fromkeys(stops) if end < len(TOKENIZER) and end != eos]
    found, back = ends(TOKENIZER, stops)
    assert found == dict(zip(("eos", "eot", "eom"), [eos, *others], strict=False))
    assert back == (list(found.values()) if others else eos)


@pytest.mark.parametrize("eos", ["<|end_of_text|>", "<|eot_id|>"])
def test_the_ends_of_llama_3_have_their_roles(eos: str) -> None:
    texts = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    tokenizer = tiny_tokenizer(texts)
    tokenizer.eos_token = eos
    document, message, turn = tokenizer.convert_tokens_to_ids(list(texts))
    found, back = ends(tokenizer, [document, message, turn])
    # If EOS ends a turn, the end-of-document token takes the other slot, so that it stops too.
    turn = turn if eos == texts[0] else document
    assert found == {"eos": tokenizer.eos_token_id, "eot": turn, "eom": message}
    assert set(back) == {document, message, tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    assert ends(tokenizer, [message])[0]["eom"] == message


@pytest.mark.parametrize("stops", [5, [2, 5], [2, 7, 5], 2])
def test_the_stops_of_a_folder_go_along(stops: int | list[int], tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    write_json(folder / "generation_config.json", {"eos_token_id": stops})
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf")
    written = generation_config(read_gguf(out)).eos_token_id
    expected = [2, stops] if stops == 5 else stops
    assert written == expected


def test_the_stops_of_a_folder_without_a_generation_config_go_along(tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    (folder / "generation_config.json").unlink()
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"eos_token_id": [2, 7, 5]})
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf")
    assert generation_config(read_gguf(out)).eos_token_id == [2, 7, 5]


@pytest.mark.parametrize("stops", ["2", ["x"], 2.5, {"a": 1}])
def test_stops_that_are_no_tokens_are_named(stops: object, tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    write_json(folder / "generation_config.json", {"eos_token_id": stops})
    with pytest.raises(CheckpointError, match=r"generation_config.json has an eos_token_id"):
        export_model(folder, tmp_path / "out.gguf", "gguf")


def test_a_tokenizer_that_does_not_split_is_refused(tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    write_json(
        folder / "tokenizer.json", read_json(folder / "tokenizer.json") | {"pre_tokenizer": None}
    )
    with pytest.raises(ConfigError, match=r"rule that llama\.cpp has no known name for"):
        export_model(folder, tmp_path / "out.gguf", "gguf")


def test_an_added_token_without_a_row_is_left_out(tmp_path: Path) -> None:
    folder = stock("gemma3", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert len(tokenizer) == 261
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out.gguf"
    assert export_model(folder, out, "gguf") < 1e-2
    assert len(read_gguf(out).facts["tokenizer.ggml.tokens"]) == 260


def test_a_pad_token_without_a_row_is_left_out(tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad_new>"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out.gguf"
    assert export_model(folder, out, "gguf") < 1e-2
    assert read_gguf(out).token_id("padding") is None
    assert gguf_tokenizer(read_gguf(out)).pad_token == tokenizer.eos_token


def test_computed_tensors_of_older_checkpoints_are_left_out(tmp_path: Path) -> None:
    folder = stock("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert export_model(folder, tmp_path / "out.gguf", "gguf") < 1e-2


def test_scaled_positions_and_the_licence_go_along(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000.0,
    }
    folder = stock("llama", tmp_path, rope_parameters=scaling)
    write_card(folder, "llama3.2", "https://example.org", "A model.")
    out = tmp_path / "out.gguf"
    assert export_model(folder, out, "gguf", dtype="float32") < 1e-6
    facts = read_gguf(out).facts
    assert facts["general.license"] == "LicenseRef-Llama3.2"
    assert facts["general.license.link"] == "https://example.org"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_bias", True, "attention_bias=True"),
        ("mlp_bias", True, "mlp_bias=True"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        (
            "rope_parameters",
            {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            r"'original_max_position_embeddings'\]=64, only Llama 3's 8192",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    folder = stock("llama", tmp_path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {field: value})
    with pytest.raises(ConfigError, match=message):
        export_model(folder, tmp_path / "out.gguf", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf", "stock"]


def test_a_scale_of_queries_that_llama_cpp_does_not_use_is_refused(tmp_path: Path) -> None:
    folder = stock("gemma3", tmp_path, query_pre_attn_scalar=64)
    with pytest.raises(ConfigError, match="query_pre_attn_scalar=64"):
        export_model(folder, tmp_path / "out.gguf", "gguf")


def test_wrong_requests_are_one_sentence(tmp_path: Path) -> None:
    folder = stock("phi3", tmp_path)
    with pytest.raises(ConfigError, match="'phi3' are not written as GGUF"):
        export_model(folder, tmp_path / "out.gguf", "gguf")
    with pytest.raises(ConfigError, match=r"end it in \.gguf"):
        export_model(folder, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(folder, tmp_path / "source.gguf", "gguf")
    with pytest.raises(ConfigError, match="no plugged experts"):
        export_model(folder, tmp_path / "out.gguf", "gguf", experts=["x"])
    with pytest.raises(ConfigError, match=r"dtype of gguf 'q8'.*'q8_0'"):
        export_model(folder, tmp_path / "out.gguf", "gguf", dtype="q8")
    with pytest.raises(ConfigError, match=r"'ggml' is unknown.* gguf"):
        export_model(folder, tmp_path / "out.gguf", "ggml")


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stock("llama", tmp_path)
    monkeypatch.setattr(gguf, "_in_their_order", lambda name, tensor, config: tensor.numpy())
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_model(folder, tmp_path / "out.gguf", "gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_llama_cpp_computes_the_same(architecture: str, tmp_path: Path) -> None:
    import llama_cpp

    fields = {
        "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0},
        "gemma3": {"num_hidden_layers": 6},
    }
    folder = stock(architecture, tmp_path, **fields.get(architecture, {}))
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf", dtype="q8_0")
    model = llama_cpp.Llama(str(out), logits_all=True, verbose=False, n_ctx=64)
    model.eval(IDS[0].tolist())
    theirs = torch.tensor(model.scores[: len(IDS[0])]).log_softmax(-1)
    ours = logits(folder)[0].log_softmax(-1)
    assert torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="batchmean") < 1e-3


MALICE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()
"""


@pytest.mark.parametrize("own_code", [False, True])
def test_a_type_that_transformers_does_not_know_is_refused_unread(
    own_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stock("llama", tmp_path)
    fields: dict[str, object] = {"model_type": "unheard-of"}
    if own_code:
        (folder / "malice.py").write_text(MALICE)
        fields["auto_map"] = {"AutoConfig": "malice.Config", "AutoModelForCausalLM": "malice.Model"}
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match=r"'unheard-of' are not written as GGUF; .*llama"):
        export_model(folder, tmp_path / "out.gguf", "gguf")
    assert not (folder / "ran").exists()


def record_trust(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Return a list that records each call that could run a folder's code, and whether it may."""
    calls: list[tuple[str, object]] = []

    def record(reader: type, method: str) -> None:
        original = getattr(reader, method)

        def recorded(*args: object, **options: object) -> object:
            calls.append((reader.__name__, options.get("trust_remote_code")))
            return original(*args, **options)

        monkeypatch.setattr(reader, method, recorded)

    for reader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        record(reader, "from_pretrained")
    record(AutoModelForCausalLM, "from_config")
    return calls


def test_code_of_a_known_type_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stock("llama", tmp_path)
    (folder / "malice.py").write_text(MALICE)
    fields = {"auto_map": {"AutoConfig": "malice.Config", "AutoModelForCausalLM": "malice.Model"}}
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)

    def ask(*_: object) -> str:
        raise AssertionError("a question")

    monkeypatch.setattr("builtins.input", ask)
    calls = record_trust(monkeypatch)
    with pytest.raises(ConfigError, match=r"A GGUF file cannot say auto_map="):
        export_model(folder, tmp_path / "out.gguf", "gguf")
    # Nor is the code run when the export goes on to compare the models.
    monkeypatch.setattr(gguf, "UNREAD", gguf.UNREAD | {"auto_map"})
    export_model(folder, tmp_path / "out.gguf", "gguf")
    assert {name for name, _ in calls} == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert [call for call in calls if call[1] is not False] == []
    assert not (folder / "ran").exists()


def test_a_model_of_our_own_class_keeps_name_and_licence(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "ours")
    write_card(folder, "gemma", "https://example.org/terms", "A model.")
    out = tmp_path / "out.gguf"
    export_model(folder, out, "gguf", dtype="float32")
    facts = read_gguf(out).facts
    assert facts["general.name"] == "ours"
    assert facts["general.license"] == "LicenseRef-Gemma"
    assert facts["general.license.link"] == "https://example.org/terms"


def test_a_model_of_the_hub_is_not_named_by_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = save_base(tmp_path / "models--someone--fine-model" / "snapshots" / commit)
    export_model(folder, tmp_path / "out.gguf", "gguf", dtype="float32")
    assert read_gguf(tmp_path / "out.gguf").facts["general.name"] == "fine-model"
