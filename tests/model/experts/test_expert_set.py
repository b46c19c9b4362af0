"""Plugging, arming and unplugging on a live model."""

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError, PackError
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import begin, resume
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.library import experts_folder
from deepseek.packs.manifest import Metric
from deepseek.packs.pack import ExpertPack, write_pack


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def assert_only(model, ids, allowed):
    """The logits are always those of one of the complete states, never of a mixture."""
    for _ in range(30):
        seen = logits_of(model, ids)
        assert any(torch.equal(seen, one) for one in allowed)


def test_armed_experts_change_the_logits_and_nothing_else_does(model, make_pack, ids):
    before = logits_of(model, ids)
    model.experts.plug(make_pack(bias=0.5))
    armed = logits_of(model, ids)
    assert not torch.equal(before, armed)
    model.experts.arm(None)
    assert torch.equal(before, logits_of(model, ids))
    model.experts.arm("auto")
    assert torch.equal(armed, logits_of(model, ids))
    model.experts.unplug("code")
    assert torch.equal(before, logits_of(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_is_bit_identical_before_plugged_unarmed_and_after(model, make_pack, ids, dtype):
    model.to(dtype)

    def run():
        output = model.generate(
            ids,
            max_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return torch.cat(
            [output.sequences.float(), torch.stack(output.logits, 1).flatten(1).float()], dim=1
        )

    before = run()
    model.experts.plug(make_pack(bias=0.5))
    with model.experts.arming(None):
        assert torch.equal(before, run())
    assert not torch.equal(before, run())
    model.experts.unplug("code")
    assert torch.equal(before, run())


def test_saved_model_and_state_do_not_know_plugged_experts(model, make_pack, tmp_path):
    keys, parameters = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "before")
    model.experts.plug(make_pack())
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "after").iterdir()
    }


def test_every_plug_order_gives_the_same_bits(model, make_pack, ids):
    packs = [
        make_pack(f"e{i}", layers=layers, seed=i, bias=0.4)
        for i, layers in enumerate([(3,), (1, 3), (0, 1, 3)])
    ]
    seen = []
    for order in itertools.permutations(packs):
        for pack in order:
            model.experts.plug(pack)
        seen.append(logits_of(model, ids))
        for pack in order:
            model.experts.unplug(pack.manifest.name)
    assert all(torch.equal(seen[0], one) for one in seen)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 39), max_size=6), padding=st.integers(0, 12))
def test_decoding_in_pieces_equals_one_forward(model, make_pack, ids, cuts, padding):
    names = {info.name for info in model.experts.list()}
    for name in {"a", "b"} - names:
        model.experts.plug(make_pack(name, seed=ord(name), bias=0.3))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    whole = logits_of(model, ids, attention_mask=mask)
    bounds = [0, *sorted(set(cuts)), 40]
    cache = KVCache()
    pieces = [
        logits_of(model, ids[:, i:j], attention_mask=mask[:, :j], cache=cache)
        for i, j in itertools.pairwise(bounds)
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=2e-4, rtol=1e-4)


def test_packed_documents_equal_separate_ones(model, make_pack, ids):
    for name in "ab":
        model.experts.plug(make_pack(name, seed=ord(name), bias=0.3))
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    packed = logits_of(model, ids[:1], position_ids=positions)
    apart = torch.cat([logits_of(model, ids[:1, :15]), logits_of(model, ids[:1, 15:])], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids[:1])
    mask[:, [0, 1, 14, 38, 39]] = 0
    positions = positions - 2 * (torch.arange(40) < 15)
    padded = logits_of(model, ids[:1], position_ids=positions.clamp(min=0), attention_mask=mask)
    for document in (slice(2, 14), slice(15, 38)):
        alone = logits_of(model, ids[:1, document])
        torch.testing.assert_close(padded[:, document], alone, atol=1e-4, rtol=1e-4)


def test_padding_changes_no_real_token_and_hears_no_expert(model, make_pack, ids):
    model.experts.plug(make_pack(bias=0.3))
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    padded = model(ids, attention_mask=mask)
    plain = model(ids[:, 7:])
    torch.testing.assert_close(padded.logits[:, 7:], plain.logits, atol=1e-4, rtol=1e-4)
    assert padded.experts.attribution()[:, :7].eq(0).all()
    torch.testing.assert_close(
        padded.experts.attribution()[:, 7:], plain.experts.attribution(), atol=1e-4, rtol=1e-4
    )


def test_padding_at_the_end_hears_no_expert_either(model, make_pack, ids):
    model.experts.plug(make_pack(bias=2.0))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    weights = model(ids, attention_mask=mask).experts.attribution()
    assert (
        weights[0, :30].gt(0).any() and weights[0, 30:].eq(0).all() and weights[1, 30:].gt(0).any()
    )


def test_a_sequence_in_flight_keeps_its_experts(model, make_pack, ids):
    model.experts.plug(make_pack("a", bias=0.5))
    expected_cache, cache = KVCache(), KVCache()
    for store in (expected_cache, cache):
        logits_of(model, ids[:, :20], cache=store)
    expected = logits_of(model, ids[:, 20:], cache=expected_cache)
    model.experts.plug(make_pack("b", seed=3, bias=0.5))
    model.experts.unplug("a")
    assert torch.equal(expected, logits_of(model, ids[:, 20:], cache=cache))
    assert not torch.equal(expected, logits_of(model, ids)[:, 20:])


def test_a_reset_cache_arms_anew(model, make_pack, ids):
    """Its new sequence has the experts armed at its start, and no gate sums of the old one."""
    cache = KVCache()
    model.experts.plug(make_pack("a", bias=0.5))
    logits_of(model, ids[:, :20], cache=cache)
    model.experts.plug(make_pack("b", seed=1, bias=0.5))
    cache.reset()
    expected_cache = KVCache()
    for part in ids.split((20, 19, 1), dim=1):
        expected = logits_of(model, part, cache=expected_cache)
        assert torch.equal(logits_of(model, part, cache=cache), expected)


def test_plugging_while_other_threads_run_gives_only_whole_states(model, make_pack, ids):
    packs = [make_pack("a", bias=0.5), make_pack("b", seed=3, bias=0.5)]
    allowed = [logits_of(model, ids)]
    for chosen in ([packs[0]], [packs[1]], packs):
        for pack in chosen:
            model.experts.plug(pack)
        allowed.append(logits_of(model, ids))
        for pack in chosen:
            model.experts.unplug(pack.manifest.name)
    stop = threading.Event()

    def churn(pack):
        while not stop.is_set():
            model.experts.plug(pack)
            model.experts.unplug(pack.manifest.name)

    threads = [threading.Thread(target=churn, args=(pack,)) for pack in packs]
    for thread in threads:
        thread.start()
    try:
        assert_only(model, ids, allowed)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_at_no_moment_of_a_replacement_is_there_none_or_two(model, make_pack, ids):
    packs = [make_pack("a", seed=seed, bias=0.5) for seed in (1, 2)]
    allowed = []
    for pack in packs:
        model.experts.plug(pack, in_place=True)
        allowed.append(logits_of(model, ids))
    stop = threading.Event()

    def replace():
        for pack in itertools.cycle(packs):
            model.experts.plug(pack, in_place=True)
            if stop.is_set():
                return

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        assert_only(model, ids, allowed)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("arming", ["auto", None, ["a"], ["b"], {"a": 0.5, "auto": 0.25}])
def test_a_replacement_is_armed_as_the_replaced_one_was(model, make_pack, arming):
    for name in "ab":
        model.experts.plug(make_pack(name, seed=ord(name)), in_place=True)
    model.experts.arm(arming)
    before = {info.name: info.weight for info in model.experts.list()}
    other = make_pack("a", seed=7)
    info = model.experts.plug(other, in_place=True)
    assert info.digest == other.manifest.digest
    assert {info.name: info.weight for info in model.experts.list()} == before


@pytest.mark.parametrize("moved", [False, True])
def test_weights_made_in_inference_mode_let_gradients_through(model, make_pack, ids, moved):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    pack = make_pack(bias=0.5)
    if moved:
        model.experts.plug(pack)
        model.to(torch.float64)
    with torch.inference_mode():
        if not moved:
            model.experts.plug(pack)
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_a_model_with_experts_is_not_pickled_but_saved(model):
    with pytest.raises(ConfigError, match="write it with save_pretrained"):
        pickle.dumps(model)


def test_unplugging_and_dropping_free_the_memory(make_pack, ids):
    model = DeepSeekModel(
        ModelConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    )
    pack = make_pack()
    model.experts.base = pack.manifest.base
    model.experts.plug(pack)
    with model.experts.forced("code") as module:
        gone = weakref.ref(module)
    del module
    model.experts.unplug("code")
    assert gone() is None
    model_gone, experts = weakref.ref(model), model.experts
    del model
    gc.collect()
    assert model_gone() is None
    with pytest.raises(PackError, match="gone"):
        experts.armed()


def test_a_copied_model_has_its_own_experts(model, make_pack, ids):
    model.experts.plug(make_pack(bias=0.5))
    twin = copy.deepcopy(model)
    expected = logits_of(model, ids)
    model.experts.unplug("code")
    assert torch.equal(logits_of(twin, ids), expected)
    assert [info.name for info in twin.experts.list()] == ["code"]


def test_a_copied_model_moves_without_the_experts_of_the_original(model, make_pack, ids):
    for name in "ab":
        model.experts.plug(make_pack(name, seed=ord(name), bias=0.5))
    expected_cache, cache = KVCache(), KVCache()
    for store in (expected_cache, cache):
        logits_of(model, ids[:, :20], cache=store)
    expected = logits_of(model, ids[:, 20:], cache=expected_cache)
    twin = copy.deepcopy(model).to(torch.float64)
    moved = logits_of(twin, ids)
    assert moved.dtype == torch.float64
    assert torch.equal(logits_of(model, ids[:, 20:], cache=cache), expected)
    torch.testing.assert_close(moved.float(), logits_of(model, ids), atol=1e-3, rtol=1e-3)


def test_experts_plugged_before_and_after_a_move_are_in_one_place(model, make_pack, ids):
    packs = [make_pack(name, seed=ord(name), bias=0.5) for name in "ab"]
    for first, second in (packs, packs[::-1]):
        model.to(torch.float32).experts.plug(first)
        model.to(torch.float64).experts.plug(second)
        assert logits_of(model, ids).dtype == torch.float64
        for pack in packs:
            model.experts.unplug(pack.manifest.name)


def test_experts_follow_the_model_to_another_dtype(model, make_pack, ids):
    model.experts.plug(make_pack(bias=0.5))
    model.to(torch.bfloat16)
    assert logits_of(model, ids).dtype == torch.bfloat16
    late = make_pack("late", seed=3)
    model.experts.plug(late)
    with model.experts.forced("late") as module:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_arming_chooses_and_explains(model, make_pack, ids):
    for name in ("python", "german"):
        model.experts.plug(make_pack(name, seed=len(name), bias=0.5))
    assert model.experts.arm("auto") == ("german", "python")
    assert model.experts.arm(["python"]) == ("python",)
    assert {info.name: info.armed for info in model.experts.list()} == {
        "python": True,
        "german": False,
    }
    assert model(ids).experts.names == ("python",)
    # The gates of a set are computed once.
    assert model.experts.choose("python").roster is model.experts.armed().roster
    only_python = logits_of(model, ids)
    model.experts.plug(make_pack("later", seed=9, bias=0.5))
    assert torch.equal(logits_of(model, ids), only_python)
    with pytest.raises(PackError, match=r"'pyton'.*'python'"):
        model.experts.arm("pyton")
    assert torch.equal(logits_of(model, ids), only_python)
    model.experts.unplug("python")
    assert model.experts.armed() is None
    with pytest.raises(PackError, match="'python' is plugged"):
        model.experts.unplug("python")


def test_temporary_arming_forgets_what_was_unplugged_meanwhile(model, make_pack):
    for name in "ab":
        model.experts.plug(make_pack(name, seed=ord(name)))
    model.experts.arm(["a", "b"])
    with model.experts.arming("a"):
        model.experts.unplug("b")
    assert model.experts.arm(["a"]) == ("a",)
    assert [info.armed for info in model.experts.list()] == [True]


def test_names_are_unique_and_a_file_works_as_a_pack_does(model, make_pack, ids, tmp_path):
    pack = make_pack(bias=0.5)
    write_pack(tmp_path / "code.safetensors", pack)
    info = model.experts.plug(tmp_path / "code.safetensors")
    assert (info.name, info.licence, info.layers, info.armed) == (
        "code",
        "Apache-2.0",
        (1, 3),
        True,
    )
    assert info.num_bytes == 2 * 3 * 24 * 32 * 4
    from_file = logits_of(model, ids)
    with pytest.raises(PackError, match="plugged already"):
        model.experts.plug(pack)
    model.experts.unplug("code")
    model.experts.plug(pack)
    assert torch.equal(from_file, logits_of(model, ids))
    assert model.experts.manifest("code") == pack.manifest


def test_a_model_without_a_folder_cannot_match_packs(make_pack):
    model = DeepSeekModel(
        ModelConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    )
    with pytest.raises(PackError, match="not loaded from a folder"):
        model.experts.plug(make_pack())


def test_a_model_from_a_folder_knows_its_fingerprint(model, make_pack, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.experts.base.hidden_size == 32
    assert loaded.experts.base.weights != model.experts.base.weights
    with pytest.raises(PackError, match="another base"):
        loaded.experts.plug(make_pack())


def test_forced_module_is_on_everywhere_and_learns(model, make_pack, ids):
    model.experts.plug(make_pack("other", seed=5, bias=0.5))
    before = logits_of(model, ids)
    module = ExpertModule.beside(model.layers, "new", (1, 3), width=24)
    model.requires_grad_(False)
    model.experts.arm(None)
    base = logits_of(model, ids)
    with model.experts.forced(module):
        output = model(ids, labels=ids)
        assert torch.equal(output.logits, base)  # a new module's output is zero
        assert output.experts.attribution().eq(1).all()
        output.loss.backward()
    for layer in (1, 3):
        assert module.at(layer).down_proj.grad.abs().max() > 0
        torch.nn.init.normal_(module.at(layer).down_proj)
    with model.experts.forced(module):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    model.experts.arm("auto")
    assert torch.equal(logits_of(model, ids), before)


def test_gradients_reach_a_gated_module_and_the_stream_before_it(model, make_pack, ids):
    model.experts.plug(make_pack(bias=2.0))
    with model.experts.forced("code") as module:
        module.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    assert model.embed_tokens.weight.grad.abs().max() > 0


def test_attribution_and_record_tell_who_spoke(model, make_pack, ids):
    for name in "ab":
        model.experts.plug(make_pack(name, seed=ord(name), bias=0.2))
    output = model(ids)
    names, weights_BTM = output.experts.names, output.experts.attribution()
    assert weights_BTM.shape == (2, 40, 2)
    assert 0 < weights_BTM.gt(0).float().mean() < 1
    with model.experts.record() as trace:
        cache = KVCache()
        for start in range(0, 40, 8):
            logits_of(model, ids[:, start : start + 8], cache=cache)
    logits_of(model, ids)
    assert trace.names == ("a", "b")
    for m, name in enumerate(names):
        torch.testing.assert_close(trace.weights(name), weights_BTM[..., m], atol=1e-4, rtol=1e-4)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.permutations(range(3)))
def test_recordings_that_overlap_end_in_any_order(model, make_pack, ids, ends):
    if not model.experts.list():
        model.experts.plug(make_pack(bias=0.5))
    blocks = [model.experts.record() for _ in ends]
    traces = [block.__enter__() for block in blocks]
    logits_of(model, ids)
    for passes, end in enumerate(ends, start=1):
        blocks[end].__exit__(None, None, None)
        logits_of(model, ids)
        assert traces[end].weights("code").shape == (2, 40 * passes)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_most_experts_per_token_may_be_set_at_any_time(model, make_pack, ids, limit):
    for name in "abc":
        model.experts.plug(make_pack(name, layers=(3,), seed=ord(name), bias=3.0))
    assert model.experts.max_experts == 5
    model.experts.max_experts = limit
    assert model(ids).experts.attribution().gt(0).sum(-1).max() == limit
    assert model.experts.armed().roster is model.experts.choose().roster
    assert copy.deepcopy(model).experts.max_experts == limit
    for refused in (0, 1.5, True, "2"):
        with pytest.raises(ConfigError, match=r"max_experts=.* must be a whole number"):
            model.experts.max_experts = refused
    assert model.experts.max_experts == limit


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("attended", [False, True])
def test_a_resumed_pass_attributes_nothing_to_experts_below(model, make_pack, ids, layer, attended):
    places = {"low": (0, 1), "high": (2,), "both": (0, 2)}
    for name, layers in places.items():
        model.experts.plug(make_pack(name, layers=layers, bias=2.0))
    full = begin(model, ids)
    stream_BTD = full.run_to(layer)
    if attended:
        stream_BTD = full.attend()
    full.finish()
    resumed = resume(model, stream_BTD, layer, attended=attended, input_ids=ids)
    resumed.finish()
    armed, experts = full.ctx.armed, resumed.ctx.armed
    if layer > 2:
        with pytest.raises(ConfigError, match="No layer of an armed expert has run"):
            experts.attribution()
        return
    expected_BTM, weights_BTM = armed.attribution(), experts.attribution()
    for m, name in enumerate(experts.names):
        if min(places[name]) >= layer:
            assert torch.equal(weights_BTM[..., m], expected_BTM[..., m])
        else:
            assert weights_BTM[..., m].any() == (max(places[name]) >= layer)


def test_a_module_speaks_only_at_its_own_layers(model, make_pack, ids):
    model.experts.plug(make_pack(layers=(3,), bias=0.5))
    with torch.no_grad():
        armed = model(ids, output_hidden_states=True).hidden_states
        model.experts.arm(None)
        base = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(armed[:4], base[:4], strict=True))
    assert not torch.equal(armed[4], base[4])


def test_beside_refuses_layers_that_do_not_exist_and_takes_any_width(model):
    with pytest.raises(ValueError, match="must be a whole number from 0 to 3"):
        ExpertModule.beside(model.layers, "x", (4,), width=8)
    assert ExpertModule.beside(model.layers, "x", (3,), width=49).width == 49


def test_uncalibrated_gates_never_fire(model, ids):
    module = ExpertModule("raw", (3,), 32, 8)
    torch.nn.init.normal_(module.at(3).down_proj)
    before = logits_of(model, ids)
    model.experts.plug(module.to_pack(model.experts.base, "MIT"))
    assert torch.equal(before, logits_of(model, ids))


def test_pack_round_trip_keeps_module_and_gates(make_module, base):
    module = make_module("code", bias=0.1)
    module.settings = module.settings.model_copy(update={"half_life": 7.0})
    base_pack = module.to_pack(base, "MIT", dtype=torch.float32)
    again = ExpertModule.from_pack(base_pack)
    x = torch.randn(3, 32)
    for layer in module.layers:
        assert torch.equal(again(layer, x), module(layer, x))
        assert torch.equal(again.gates[layer], module.gates[layer])
        assert torch.equal(again.moments[layer], module.moments[layer])
    assert again.settings.half_life == 7.0
    assert again.to_pack(base, "MIT", dtype=torch.float32).manifest == base_pack.manifest


def measured(pack, after):
    """Return the pack with a held-out loss of 2.0 before training and `after` after it."""
    manifest = pack.manifest.model_copy(
        update={"metrics": {"held-out": Metric(before=2.0, after=after)}}
    )
    return ExpertPack.seal(manifest, pack.tensors)


@pytest.mark.parametrize("after", [2.0, 2.3])
def test_an_expert_that_is_no_better_speaks_only_where_it_is_named(model, make_pack, ids, after):
    before = logits_of(model, ids)
    info = model.experts.plug(measured(make_pack(bias=0.5), after))
    assert not info.armed
    assert info.verdict == ("worse by 15.0 %" if after > 2.0 else "no better than the base")
    assert torch.equal(before, logits_of(model, ids))
    assert model.experts.choose() is None and model.experts.choose("code") is not None
    assert model.experts.arm("code") == ("code",)
    assert not torch.equal(before, logits_of(model, ids))
    assert model.experts.arm("auto") == ()


def test_a_better_or_unmeasured_expert_is_armed_by_itself(model, make_pack):
    better = model.experts.plug(measured(make_pack("better"), 1.9))
    unmeasured = model.experts.plug(make_pack("unmeasured", seed=1))
    worse = model.experts.plug(measured(make_pack("worse", seed=2), 2.1))
    assert (better.verdict, better.armed) == ("better by 5.0 %", True)
    assert (unmeasured.verdict, unmeasured.armed) == ("not measured", True)
    assert not worse.armed and model.experts.arm("auto") == ("better", "unmeasured")
    chosen = model.experts.choose(deny=["better"])
    assert chosen is not None and chosen.names == ("unmeasured",)


def test_a_trained_expert_is_plugged_by_its_name(model, make_pack, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    write_pack(experts_folder() / "code.safetensors", make_pack())
    assert model.experts.plug("code").name == "code"
    with pytest.raises(PackError, match="perhaps 'code' is meant"):
        model.experts.plug("coed")
    assert [info.name for info in model.experts.list()] == ["code"]
