"""Pack files: reproducible bytes, readable by everyone, and refused after any change."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_model import tiny_model

from deepseek.checkpoint.licence import write_card
from deepseek.errors import ConfigError, PackError
from deepseek.packs.kinds import KEY
from deepseek.packs.library import find_pack
from deepseek.packs.listing import read_manifest
from deepseek.packs.manifest import BaseDescription, GateSettings, Manifest, Metric
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.packs.policy import PackPolicy
from deepseek.packs.signature import keygen, load_key, trust_folder, trusted_keys
from deepseek.packs.tensors import DTYPES

BASE = BaseDescription(
    name="tiny", weights="a" * 64, tokenizer="b" * 64, hidden_size=8, num_layers=12
)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path_factory.mktemp("home")))


def make_pack(dtype="bfloat16", **changes):
    manifest = Manifest(
        **{
            "name": "code",
            "domain": "Ελληνικά, 日本語",
            "base": BASE,
            "layers": (3, 11),
            "width": 6,
            "dtype": dtype,
            "licence": "mit or apache-2.0",
            "metrics": {"own": Metric(before=2.5, after=0.1 + 0.2)},
            "gate": GateSettings(half_life=32.0, alpha=0.01),
            "data": ("c" * 64,),
            "commit": "d" * 40,
        }
        | changes
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randn(s.shape, generator=generator).to(DTYPES[s.dtype])
        for n, s in manifest.tensors().items()
    }
    return ExpertPack.seal(manifest, tensors)


def same(a, b):
    return a.manifest == b.manifest and all(
        torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read(dtype, tmp_path):
    pack = make_pack(dtype)
    write_pack(tmp_path / "p.safetensors", pack)
    again = read_pack(tmp_path / "p.safetensors", base=BASE)
    assert same(pack, again)
    assert again.manifest.licence == "MIT OR Apache-2.0"
    assert again.num_bytes == sum(t.nbytes for t in pack.tensors.values())


def test_the_same_pack_has_the_same_bytes(tmp_path):
    pack = make_pack()
    shuffled = ExpertPack.seal(pack.manifest, dict(reversed(pack.tensors.items())))
    write_pack(tmp_path / "a", pack)
    write_pack(tmp_path / "b", shuffled)
    write_pack(tmp_path / "c", read_pack(tmp_path / "a"))
    assert (
        (tmp_path / "a").read_bytes()
        == (tmp_path / "b").read_bytes()
        == (tmp_path / "c").read_bytes()
    )


def test_the_safetensors_library_reads_it(tmp_path):
    pack = make_pack()
    write_pack(tmp_path / "p.safetensors", pack)
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert list(file.metadata()) == [KEY]
        assert set(file.keys()) == pack.tensors.keys()
        assert all(
            torch.equal(file.get_tensor(name), tensor) for name, tensor in pack.tensors.items()
        )


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path, data):
    pack, path = make_pack(), tmp_path / "p.safetensors"
    if not path.exists():
        write_pack(path, pack)
    raw = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 1200))
    raw[where] = data.draw(st.integers(0, 255))
    (tmp_path / "changed").write_bytes(raw)
    # Refused, unless the byte kept its value or is other white space.
    with suppress(PackError):
        assert same(read_pack(tmp_path / "changed"), pack)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=300), header=st.booleans())
def test_noise_is_refused_and_nothing_else_happens(tmp_path, noise, header):
    (tmp_path / "noise").write_bytes((len(noise).to_bytes(8, "little") if header else b"") + noise)
    with pytest.raises(PackError):
        read_pack(tmp_path / "noise")


def test_a_pack_that_could_not_be_read_is_not_written(tmp_path):
    pack = make_pack()
    with pytest.raises(PackError, match="does not match its digest"):
        write_pack(
            tmp_path / "p", ExpertPack(pack.manifest, pack.tensors | {"gate.3": torch.zeros(9)})
        )
    assert not (tmp_path / "p").exists()


def test_signed_packs_satisfy_the_policy_of_who_trusts_the_signer(tmp_path):
    key = load_key(keygen("me")[0])
    signed = write_pack(tmp_path / "p", make_pack(), key)
    assert signed.manifest.digest == make_pack().manifest.digest
    for policy in ("any", "signed", "trusted"):
        assert same(read_pack(tmp_path / "p", PackPolicy(signature=policy)), signed)
    assert trusted_keys() == {signed.manifest.signature.public_key}
    (trust_folder() / "me.pub").unlink()
    with pytest.raises(PackError, match="not trusted"):
        read_pack(tmp_path / "p", PackPolicy(signature="trusted"))
    named = PackPolicy(
        signature="trusted", trusted=frozenset({signed.manifest.signature.public_key})
    )
    assert same(read_pack(tmp_path / "p", named), signed)


def test_a_key_has_a_path_and_a_name(tmp_path, monkeypatch):
    private, _ = keygen("named")
    monkeypatch.chdir(tmp_path)
    sought = [
        load_key(Path(place)).private_bytes_raw() for place in (private, "named", "named.pem")
    ]
    assert len(set(sought)) == 1
    with pytest.raises(PackError, match="that `deepseek expert keygen` wrote"):
        load_key(Path("nobody"))


def test_packs_and_keys_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    private, _ = keygen("me", Path("~/keys"))
    assert private == tmp_path / "keys" / "me.pem"
    write_pack(tmp_path / "p.safetensors", make_pack(), load_key(Path("~/keys/me.pem")))
    assert find_pack("~/p.safetensors") == tmp_path / "p.safetensors"
    assert read_pack("~/p.safetensors").manifest == read_manifest(Path("~/p.safetensors"))
    with pytest.raises(ConfigError, match="no possible path"):
        find_pack("~nobody-has-this-name/p.safetensors")


def test_keys_are_private_and_never_overwritten(tmp_path):
    private, public = keygen("me", tmp_path)
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes()
    with pytest.raises(PackError, match="never overwritten"):
        keygen("me", tmp_path)
    assert private.read_bytes() == before
    for name in ("../me", "", "a b", "é"):
        with pytest.raises(PackError, match="key name"):
            keygen(name, tmp_path)
    with pytest.raises(PackError, match="not an unencrypted Ed25519"):
        public.chmod(0o600)
        load_key(public)
    private.chmod(0o644)
    with pytest.raises(PackError, match="chmod 600"):
        load_key(private)
    with pytest.raises(PackError, match="cannot be read"):
        load_key(tmp_path / "absent.pem")


def test_a_damaged_key_in_the_trust_folder_is_named(tmp_path):
    (tmp_path / "x.pub").write_text("noise")
    with pytest.raises(PackError, match=r"x\.pub in the trust folder"):
        trusted_keys(tmp_path)


@pytest.mark.parametrize(
    ("licence", "policy", "accepted"),
    [
        ("MIT", PackPolicy(), True),
        ("LicenseRef-Own", PackPolicy(), True),
        ("MIT", PackPolicy(allow=frozenset({"MIT"})), True),
        ("MIT OR Apache-2.0", PackPolicy(allow=frozenset({"MIT"})), False),
        ("MIT AND Apache-2.0", PackPolicy(allow=frozenset({"MIT", "Apache-2.0"})), True),
        (
            "GPL-2.0-only WITH Classpath-exception-2.0",
            PackPolicy(deny=frozenset({"GPL-2.0-only"})),
            False,
        ),
        ("MIT", PackPolicy(allow=frozenset({"MIT"}), deny=frozenset({"MIT"})), False),
        ("MIT", PackPolicy(allow=frozenset({"mit"})), True),
        ("GPL-3.0-only", PackPolicy(deny=frozenset({"gpl-3.0-only"})), False),
        ("GPL-2.0+", PackPolicy(deny=frozenset({"GPL-2.0"})), False),
        ("GPL-2.0+", PackPolicy(allow=frozenset({"GPL-2.0+"})), True),
        ("GPL-2.0+", PackPolicy(allow=frozenset({"GPL-2.0"})), True),
        ("GPL-2.0", PackPolicy(allow=frozenset({"GPL-2.0+"})), False),
        ("LicenseRef-Own", PackPolicy(deny=frozenset({"licenseref-own"})), False),
        (
            "GPL-2.0-only WITH Classpath-exception-2.0",
            PackPolicy(deny=frozenset({"classpath-exception-2.0"})),
            False,
        ),
    ],
)
def test_licence_policy(licence, policy, accepted, tmp_path):
    write_pack(tmp_path / "p", make_pack(licence=licence))
    if accepted:
        assert read_pack(tmp_path / "p", policy).manifest.licence == licence
    else:
        with pytest.raises(PackError, match="is not accepted here"):
            read_pack(tmp_path / "p", policy)


def test_the_licence_of_the_base_counts_too(tmp_path):
    base = BASE.model_copy(update={"licence": "LicenseRef-Gemma"})
    write_pack(tmp_path / "p", make_pack(base=base))
    assert read_pack(tmp_path / "p").manifest.base.licence == "LicenseRef-Gemma"
    with pytest.raises(PackError, match="LicenseRef-Gemma is not accepted here"):
        read_pack(tmp_path / "p", PackPolicy(deny=frozenset({"LicenseRef-gemma"})))
    with pytest.raises(PackError, match="LicenseRef-Gemma is not accepted here"):
        read_pack(tmp_path / "p", PackPolicy(deny=frozenset({"LicenseRef-Gemma"})))


def test_fields_that_came_later_change_no_digest():
    """Packs that were written without them stay valid."""
    assert b"licence" not in make_pack().manifest.signed_part().split(b'"base":')[1].split(b"}")[0]
    stated = BASE.model_copy(update={"licence": "MIT", "attached": "LlamaForCausalLM"})
    signed = make_pack(base=stated).manifest.signed_part()
    assert b'"attached":"LlamaForCausalLM"' in signed
    assert b'"licence":"MIT"' in signed


def test_a_description_of_a_folder_states_its_licence(tmp_path):
    tiny_model().model.save_pretrained(tmp_path)
    assert BaseDescription.of(tmp_path, "tiny").licence == ""
    write_card(tmp_path, "gemma", "", "A model.")
    assert BaseDescription.of(tmp_path, "tiny").licence == "LicenseRef-Gemma"


def test_a_header_that_no_reader_accepts_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "code.safetensors"
    monkeypatch.setattr("deepseek.packs.pack.MAX_HEADER", 500, raising=False)
    with pytest.raises(PackError, match=r"its header has \d+ bytes and 500 are allowed.* \(domain"):
        write_pack(path, make_pack())
    assert not path.exists()
