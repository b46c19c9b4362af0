"""Packs that must be refused: quickly, with one sentence, and with the model untouched.

Each case forges a file from a good one. A `Draft` keeps manifest, header and bytes separate, so
that a case can falsify one of them and leave the rest valid (including digest and signature, unless
they are the point).
"""

import hashlib
import io
import json
import os
import pickle
import time

import pytest
import torch
from pack_fixtures import is_one_sentence

from deepseek.errors import ConfigError, PackError
from deepseek.packs.kinds import KEY
from deepseek.packs.manifest import Manifest
from deepseek.packs.pack import ExpertPack
from deepseek.packs.policy import PackPolicy
from deepseek.packs.signature import keygen, load_key, sign

BIG = 10**30
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Draft:
    """The parts of a pack: `manifest` and `header` as plain JSON values, `data` as the bytes of all
    tensors.
    """

    def __init__(self, pack: ExpertPack) -> None:
        self.pack = pack
        self.manifest = pack.manifest.model_dump(mode="json")
        self.header, self.data = {}, b""
        for name, tensor in pack.tensors.items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            offsets = [len(self.data), len(self.data) + len(raw)]
            self.header[name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            self.data += raw
        self.metadata = {}

    def reseal(self) -> "Draft":
        """Update the manifest's digest to match the manifest and the tensors."""
        self.pack = ExpertPack.seal(
            Manifest.model_validate_json(json.dumps(self.manifest)), self.pack.tensors
        )
        self.manifest = self.pack.manifest.model_dump(mode="json")
        return self

    def header_json(self) -> str:
        return json.dumps(
            {"__metadata__": {KEY: json.dumps(self.manifest)} | self.metadata} | self.header
        )

    def bytes(self, header: str | bytes | None = None) -> bytes:
        raw = self.header_json() if header is None else header
        raw = raw.encode() if isinstance(raw, str) else raw
        return len(raw).to_bytes(8, "little") + raw + self.data


CASES = {}


def case(message, policy=None):
    """Register a forger: given a draft and a path, it returns bytes or a draft to write, or writes
    the file itself and returns None.
    """

    def add(forge):
        CASES[forge.__name__] = (forge, message, policy or PackPolicy())
        return forge

    return add


# --- the file ---------------------------------------------------------------------------------------------------------


@case("no such file")
def missing(draft, path):
    pass


@case("not a regular file")
def directory(draft, path):
    path.mkdir()


@case("symbolic link")
def symlink(draft, path):
    target = path.with_name("real.safetensors")
    target.write_bytes(draft.bytes())
    path.symlink_to(target)


@case("symbolic link")
def symlink_to_nothing(draft, path):
    path.symlink_to("/nonexistent")


@case("not a regular file")
def fifo(draft, path):
    os.mkfifo(path)


@case("cut short")
def empty(draft, path):
    return b""


@case("cut short")
def seven_bytes(draft, path):
    return draft.bytes()[:7]


@case("cut short")
def truncated_in_header(draft, path):
    return draft.bytes()[:300]


@case("its tensors need")
def truncated_in_data(draft, path):
    return draft.bytes()[:-100]


@case("its tensors need")
def truncated_after_header(draft, path):
    return draft.bytes()[: -len(draft.data)]


@case("its tensors need")
def trailing_bytes(draft, path):
    return draft.bytes() + b"\0" * 4096


@case("the policy allows 1000", PackPolicy(max_bytes=1000))
def file_beyond_policy(draft, path):
    return draft


@case("header claims")
def oversized_header(draft, path):
    return draft.bytes(draft.header_json() + " " * (2 << 20))


@case("header claims")
def astronomical_header(draft, path):
    return (2**63).to_bytes(8, "little") + draft.bytes()[8:]


@case("zip or pickle")
def pickle_by_another_name(draft, path):
    return pickle.dumps({"weights": list(range(1000))}, protocol=4)


@case("zip or pickle")
def torch_save_by_another_name(draft, path):
    buffer = io.BytesIO()
    torch.save(draft.pack.tensors, buffer)
    return buffer.getvalue()


# --- the header -------------------------------------------------------------------------------------------------------


@case("not UTF-8")
def header_in_latin_1(draft, path):
    return draft.bytes(draft.header_json().replace("{", '{"\u00e9": 1, ', 1).encode("latin-1"))


@case("JSON is malformed")
def header_of_noise(draft, path):
    return draft.bytes("x" * 200)


@case("JSON is malformed")
def header_with_a_comma_too_many(draft, path):
    return draft.bytes(draft.header_json()[:-1] + ",}")


@case("not a table")
def header_is_a_list(draft, path):
    return draft.bytes("[]")


@case("nested too deeply")
def header_nested_deeply(draft, path):
    return draft.bytes('{"a":' * 100_000 + "1" + "}" * 100_000)


@case("a key is repeated")
def header_with_duplicate_tensor(draft, path):
    name = next(iter(draft.header))
    return draft.bytes(
        draft.header_json()[:-1] + f', "{name}": {json.dumps(draft.header[name])}' + "}"
    )


@case("a key is repeated")
def duplicate_manifest(draft, path):
    text = json.dumps(json.dumps(draft.manifest))
    return draft.bytes(draft.header_json().replace(f'"{KEY}": ', f'"{KEY}": {text}, "{KEY}": ', 1))


@case("no expert manifest")
def plain_safetensors(draft, path):
    return draft.bytes(json.dumps(draft.header))


@case("no expert manifest")
def another_metadata_key(draft, path):
    draft.metadata = {"format": "pt"}
    return draft


@case("table of strings")
def metadata_not_strings(draft, path):
    draft.metadata = {"format": 1}
    return draft


@case("table of strings")
def metadata_is_a_list(draft, path):
    return draft.bytes(json.dumps({"__metadata__": [1]} | draft.header))


# --- the tensor table -------------------------------------------------------------------------------------------------


SHOULD = "by its manifest should be"


def entry(draft, name="ffn.1.down_proj"):
    return draft.header[name]


def offsets_case(name, change):
    def forge(draft, path):
        entry(draft)["data_offsets"] = change(*entry(draft)["data_offsets"])
        return draft

    forge.__name__ = name
    case(SHOULD)(forge)


offsets_case("offsets_overlap", lambda start, stop: [start - 4, stop - 4])
offsets_case("offsets_leave_a_gap", lambda start, stop: [start + 4, stop + 4])
offsets_case("offsets_misaligned", lambda start, stop: [start + 1, stop + 1])
offsets_case("offsets_too_long", lambda start, stop: [start, stop + 4])
offsets_case("offsets_reversed", lambda start, stop: [stop, start])
offsets_case("offsets_negative", lambda start, stop: [-4, stop])
offsets_case("offsets_huge", lambda start, stop: [start, BIG])
offsets_case("offsets_float", lambda start, stop: [float(start), stop])
offsets_case("offsets_boolean", lambda start, stop: [True, stop])
offsets_case("offsets_three", lambda start, stop: [start, stop, stop])
offsets_case("offsets_null", lambda start, stop: None)
offsets_case("offsets_beyond_the_file", lambda start, stop: [start + (1 << 30), stop + (1 << 30)])


@case(SHOULD)
def two_tensors_on_the_same_bytes(draft, path):
    entry(draft, "ffn.3.down_proj")["data_offsets"] = entry(draft)["data_offsets"]
    return draft


@case("JSON is malformed")
def offset_of_ten_thousand_digits(draft, path):
    stop = str(entry(draft)["data_offsets"][1])
    return draft.bytes(draft.header_json().replace(stop, "9" * 10_000))


def shape_case(name, change):
    def forge(draft, path):
        entry(draft)["shape"] = change(entry(draft)["shape"])
        return draft

    forge.__name__ = name
    case(SHOULD)(forge)


shape_case("shape_transposed", lambda shape: shape[::-1])
shape_case("shape_flat", lambda shape: [shape[0] * shape[1]])
shape_case("shape_negative", lambda shape: [-shape[0], -shape[1]])
shape_case("shape_overflowing", lambda shape: [1 << 33, 1 << 33])
shape_case("shape_huge", lambda shape: [BIG, shape[1]])
shape_case("shape_float", lambda shape: [float(shape[0]), shape[1]])
shape_case("shape_scalar", lambda shape: [])
shape_case("shape_of_many_axes", lambda shape: shape + [1] * 1000)
shape_case("shape_text", str)


def dtype_case(code):
    def forge(draft, path):
        entry(draft)["dtype"] = code
        return draft

    forge.__name__ = f"dtype_{str(code)[:8]}"
    case(SHOULD)(forge)


for _code in ("F64", "I64", "F8_E4M3", "object", "\x1b[2J", "f32"):
    dtype_case(_code)
dtype_case("BF16")
dtype_case(7)
dtype_case(["F32"])


@case(SHOULD)
def dtype_other_than_promised(draft, path):
    for name in draft.header:
        raw = draft.pack.tensors[name].half()
        draft.pack.tensors[name] = raw
    return Draft(ExpertPack(draft.pack.manifest, draft.pack.tensors))


@case("is missing")
def tensor_missing(draft, path):
    del draft.pack.tensors["gate.3"]
    return Draft(draft.pack)


@case("does not call for")
def tensor_extra(draft, path):
    draft.pack.tensors["ffn.2.down_proj"] = torch.zeros(32, 24)
    return Draft(draft.pack)


@case(SHOULD)
def header_entry_with_another_key(draft, path):
    entry(draft)["code"] = "print()"
    return draft


@case(SHOULD)
def header_entry_without_offsets(draft, path):
    del entry(draft)["data_offsets"]
    return draft


@case(SHOULD)
def header_entry_is_text(draft, path):
    draft.header["ffn.1.down_proj"] = "F32"
    return draft


NAMES = {
    "climbing": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "with_nul": "ffn.1.down_proj\0",
    "long": "a" * 100_000,
    "cyrillic": "ffn.1.d\u043ewn_proj",
    "empty": "",
    "zero_led": "ffn.01.down_proj",
    "escaping": "\x1b]0;owned\x07",
    "two_lined": "ffn.1.down_proj\nerror: all is well",
    "full_width": "ffn.\uff11.down_proj",
    "windows": "C:\\x",
    "surrogate": "ffn.\ud800",
    "of_the_base": "layers.0.feed_forward.down_proj.weight",
    "upper": "FFN.1.down_proj",
}


def name_case(kind, name):
    def forge(draft, path):
        draft.header = {
            name if key == "ffn.1.down_proj" else key: value for key, value in draft.header.items()
        }
        return draft

    forge.__name__ = f"name_{kind}"
    case("does not call for")(forge)


for _kind, _name in NAMES.items():
    name_case(_kind, _name)


# --- the manifest -----------------------------------------------------------------------------------------------------


def manifest_case(title, message, policy=None, /, *, resealed=False, **changes):
    def forge(draft, path):
        for field, value in changes.items():
            if isinstance(value, dict) and isinstance(draft.manifest[field], dict):
                draft.manifest[field] |= value
            else:
                draft.manifest[field] = value
        return draft.reseal() if resealed else draft

    forge.__name__ = title
    case(message, policy)(forge)


manifest_case(
    "base_other_weights", "another base.*weights c", base={"weights": "c" * 64}, resealed=True
)
manifest_case(
    "base_other_tokenizer", "another base.*tokenizer c", base={"tokenizer": "c" * 64}, resealed=True
)
manifest_case("base_no_tokenizer", "tokenizer none", base={"tokenizer": ""}, resealed=True)
manifest_case("base_wider", "hidden_size 64", base={"hidden_size": 64}, resealed=True)
manifest_case("base_deeper", "num_layers 9", base={"num_layers": 9}, resealed=True)
manifest_case("base_digest_is_a_path", "base.weights", base={"weights": "../" * 21 + "x"})
manifest_case("layer_out_of_range", "layer 4 does not exist", layers=[1, 4])
manifest_case("layer_negative", "layers.0", layers=[-1, 3])
manifest_case("layer_huge", "layers.1", layers=[1, BIG])
manifest_case("layers_repeated", "without repetition", layers=[1, 1])
manifest_case("layers_unsorted", "layers must increase", layers=[3, 1])
manifest_case("layers_none", "layers", layers=[])
manifest_case("layers_too_many", "does not exist", layers=list(range(1000)))
manifest_case("layers_other", "does not call for", layers=[0, 3])
manifest_case("layers_text", "layers", layers="1,3")
manifest_case("width_other", SHOULD, width=25)
manifest_case("width_zero", "width", width=0)
manifest_case("width_huge", "width", width=BIG)
manifest_case("width_text", "width", width="24")
manifest_case("width_true", "width", width=True)
manifest_case("dtype_unknown", "dtype", dtype="float8")
manifest_case("format_of_the_future", "format", format=3)
manifest_case("format_of_the_past", "train the expert again", format=1)
manifest_case("name_reserved", "reserved word", name="auto")
manifest_case("name_is_a_path", "name", name="../../x")
manifest_case("name_is_unicode", "name", name="c\u043ede")
manifest_case("name_too_long", "name", name="x" * 65)
manifest_case("name_ends_in_newline", "name", name="code\n")
manifest_case("field_unknown", "hook", hook="import os")
manifest_case("domain_writes_to_the_terminal", "domain", domain="\x1b[31mcode")
manifest_case("licence_invented", "not an SPDX licence", licence="Free-For-All")
manifest_case("licence_of_parentheses", "not an SPDX licence", licence="(" * 100 + ")" * 100)
manifest_case("licence_missing", "licence", licence=None)
manifest_case(
    "licence_forbidden",
    "licence GPL-3.0-only is not accepted",
    PackPolicy(deny=frozenset({"GPL-3.0-only"})),
    licence="MIT OR (Apache-2.0 AND gpl-3.0-only)",
    resealed=True,
)
manifest_case(
    "licence_not_allowed",
    "licence Apache-2.0 is not accepted",
    PackPolicy(allow=frozenset({"MIT"})),
)
manifest_case("half_life_zero", "gate.half_life", gate={"half_life": 0.0})
manifest_case("half_life_infinite", "half_life|not JSON", gate={"half_life": float("inf")})
manifest_case("digest_absent", "does not match its digest", digest="")
manifest_case("digest_other", "does not match its digest", digest="0" * 64)
manifest_case("digest_upper_case", "digest", digest="A" * 64)
manifest_case(
    "metric_improved_afterwards", "does not match", metrics={"own": {"before": 9.0, "after": 1.0}}
)
manifest_case("domain_changed_afterwards", "does not match its digest", domain="medicine")


@case("JSON is malformed")
def manifest_of_noise(draft, path):
    return draft.bytes(json.dumps({"__metadata__": {KEY: "{"}} | draft.header))


@case("is of format 3 and this version of deepseek reads format 2; install a later version")
def later_format(draft, path):
    draft.manifest |= {"format": 3, "shiny": 1}
    return draft


@case("shiny: Extra inputs are not permitted; if a later version of deepseek wrote it, install")
def unknown_field(draft, path):
    draft.manifest |= {"shiny": 1}
    return draft


@case("manifest is invalid")
def manifest_is_a_number(draft, path):
    return draft.bytes(json.dumps({"__metadata__": {KEY: "7"}} | draft.header))


@case("nested too deeply")
def manifest_nested_deeply(draft, path):
    return draft.bytes(json.dumps({"__metadata__": {KEY: "[" * 200_000}} | draft.header))


@case("a key is repeated")
def manifest_with_two_licences(draft, path):
    text = json.dumps(draft.manifest)[:-1] + ', "licence": "MIT"}'
    return draft.bytes(json.dumps({"__metadata__": {KEY: text}} | draft.header))


@case("metrics.own.before")
def metric_infinite(draft, path):
    draft.manifest["metrics"] = {"own": {"before": 12345.0, "after": 1.0}}
    return draft.bytes(draft.header_json().replace("12345.0", "1e999"))


@case("base: Field required")
def manifest_without_base(draft, path):
    del draft.manifest["base"]
    return draft


# --- the values -------------------------------------------------------------------------------------------------------


def value_case(name, tensor, value):
    def forge(draft, path):
        draft.pack.tensors[tensor].view(-1)[5] = value
        return Draft(draft.reseal().pack)

    forge.__name__ = name
    case(f"{tensor} holds NaN or infinity")(forge)


value_case("nan_in_a_weight", "ffn.3.gate_up_proj", float("nan"))
value_case("infinity_in_a_weight", "ffn.1.down_proj", float("inf"))
value_case("infinity_in_a_gate", "gate.1", -float("inf"))
value_case("nan_in_a_gate", "gate.3", float("nan"))
value_case("infinity_in_moments", "moments.3", float("inf"))


@case("does not match its digest")
def one_bit_flipped(draft, path):
    raw = bytearray(draft.bytes())
    raw[-1000] ^= 1
    return bytes(raw)


# --- the signature ----------------------------------------------------------------------------------------------------


def signed(draft, name="mine"):
    key = load_key(keygen(name, draft.keys)[0])
    draft.manifest["signature"] = sign(draft.manifest["digest"], key).model_dump()
    return draft


@case("not signed", PackPolicy(signature="signed"))
def unsigned(draft, path):
    return draft


@case("signature does not match")
def signature_changed(draft, path):
    value = signed(draft).manifest["signature"]["value"]
    draft.manifest["signature"]["value"] = ("0" if value[0] != "0" else "1") + value[1:]
    return draft


@case("signature does not match")
def signature_under_another_name(draft, path):
    other = signed(draft, "other").manifest["signature"]["public_key"]
    signed(draft).manifest["signature"]["public_key"] = other
    return draft


@case("signature does not match")
def signature_of_another_pack(draft, path):
    signed(draft)
    signature = draft.manifest["signature"]
    draft.manifest["domain"] = "medicine"
    draft.reseal().manifest["signature"] = signature
    return draft


@case("does not match its digest")
def content_changed_after_signing(draft, path):
    signed(draft)
    draft.data = draft.data[:-4] + b"\0\0\0\0"
    return draft


@case("signature.value")
def signature_malformed(draft, path):
    signed(draft).manifest["signature"]["value"] = "00"
    return draft


@case("signature does not match")
def signature_with_a_key_off_the_curve(draft, path):
    draft.manifest["signature"] = {"public_key": "02" + "f" * 62, "value": "1" * 128}
    return draft


@case("is not trusted", PackPolicy(signature="trusted"))
def signer_unknown(draft, path):
    return signed(draft)


@case("is not trusted", PackPolicy(signature="trusted", trusted=frozenset()))
def signer_trusted_by_nobody(draft, path):
    return signed(draft)


# --- the verdict ------------------------------------------------------------------------------------------------------


def fingerprint(model):
    """Digest of every tensor of the model, and what is plugged."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest(), model.experts.list(), model.experts.armed().names


@pytest.mark.parametrize("name", CASES)
def test_hostile_pack_is_refused_and_the_model_unchanged(name, model, make_pack, tmp_path):
    forge, message, policy = CASES[name]
    model.experts.plug(make_pack("resident", seed=7, bias=0.5))
    model.experts.policy = policy
    draft, path = Draft(make_pack()), tmp_path / "pack.safetensors"
    draft.keys = tmp_path / "keys"
    forged = forge(draft, path)
    if forged is not None:
        path.write_bytes(forged if isinstance(forged, bytes) else forged.bytes())
    before = fingerprint(model)
    start = time.perf_counter()
    with pytest.raises(PackError, match=message) as refusal:
        model.experts.plug(path)
    assert time.perf_counter() - start < 1.0
    assert is_one_sentence(str(refusal.value)) and len(str(refusal.value)) < 500
    assert fingerprint(model) == before


def test_the_forger_starts_from_a_pack_that_is_accepted(model, make_pack, tmp_path):
    path = tmp_path / "pack.safetensors"
    path.write_bytes(Draft(make_pack()).bytes())
    assert model.experts.plug(path).name == "code"


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40


def test_a_path_with_nul_is_refused(model):
    with pytest.raises(ConfigError, match="a path that a file system can hold"):
        model.experts.plug("pack\0.safetensors")


def test_packs_in_memory_are_checked_alike(model, make_pack):
    good = make_pack()
    changed = ExpertPack(good.manifest, good.tensors | {"gate.1": torch.zeros(33)})
    with pytest.raises(PackError, match="does not match its digest"):
        model.experts.plug(changed)
    fewer = ExpertPack(good.manifest, {k: v for k, v in good.tensors.items() if k != "gate.1"})
    with pytest.raises(PackError, match="is missing"):
        model.experts.plug(fewer)
    assert model.experts.list() == ()


def test_values_that_overflow_the_models_dtype_are_refused(model, make_pack):
    draft = Draft(make_pack())
    draft.pack.tensors["ffn.1.down_proj"][0, 0] = 1e6
    model.to(torch.float16)
    with pytest.raises(PackError, match="float16"):
        model.experts.plug(draft.reseal().pack)
    assert model.experts.list() == ()
