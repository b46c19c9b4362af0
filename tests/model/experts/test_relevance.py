"""Relevance: evidence accumulates causally, in chunks as in one pass, and decides admission."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_expert import save_expert
from tiny_model import tiny_model

from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.relevance import (
    DECAY,
    DOCUMENT_DECAY,
    NATS_PER_CANDIDATES,
    PASSAGE,
    Relevance,
    RelevanceBank,
    pair_slots,
    text_evidence,
)
from deepseek.model.kv_cache import KVCache
from deepseek.packs.manifest import PAIR_SLOTS
from deepseek.packs.pack import read_pack, write_pack

ABOUT, BESIDE = 40, 41
"""A token that is evidence for the expert, and one that is evidence against it."""


def module_with(
    vocabulary: int, seed: int = 0, threshold: float = 1.0, pairs: bool = False
) -> ExpertModule:
    module = ExpertModule(f"m{seed}", [0], 8, 4)
    generator = torch.Generator().manual_seed(seed)
    table_V = torch.randn(vocabulary, generator=generator)
    pairs_S = torch.randn(PAIR_SLOTS, generator=generator) if pairs else None
    module.relevance = Relevance(table_V, threshold, 0.25, pairs_S)
    return module


@given(st.lists(st.integers(0, 49), min_size=1, max_size=40), st.data())
def test_pieces_give_the_evidence_of_the_whole(ids: list[int], data: st.DataObject) -> None:
    modules = [module_with(50, 0, pairs=True), module_with(50, 1)]
    bank = RelevanceBank.stack(modules, torch.device("cpu"))
    assert bank is not None
    cut = data.draw(st.integers(0, len(ids)))
    whole_TM = bank.accumulate(torch.tensor([ids]))[0][0]
    state = None
    parts = []
    for piece in (ids[:cut], ids[cut:]):
        if piece:
            evidence_BTM, state = bank.accumulate(torch.tensor([piece]), state)
            parts.append(evidence_BTM[0])
    torch.testing.assert_close(torch.cat(parts), whole_TM)
    paired, plain = (module.relevance for module in modules)
    assert paired is not None and paired.pairs_S is not None and plain is not None
    of_pairs = of_tokens = asked = tokens = 0.0
    for place, token in enumerate(ids):
        slot = pair_slots(torch.tensor(ids[place - 1]), torch.tensor(token))
        of_pairs = DOCUMENT_DECAY * of_pairs + (float(paired.pairs_S[slot]) if place else 0.0)
        of_tokens = DOCUMENT_DECAY * of_tokens + float(plain.table_V[token])
        asked = DECAY * asked + float(plain.table_V[token])
        tokens = DOCUMENT_DECAY * tokens + 1.0
        expected = pytest.approx([of_pairs, of_tokens, tokens], abs=1e-4)
        assert whole_TM[place].tolist() == expected
        read_N = torch.tensor(ids[: place + 1])
        for module, relevance in zip(modules, (paired, plain), strict=True):
            alone = RelevanceBank.stack([module], torch.device("cpu"))
            assert alone is not None
            assert relevance.keeps(read_N) == bool(alone.document_keeps(read_N[None])[0, 0])
    assert text_evidence(plain, torch.tensor(ids)) == pytest.approx(asked, abs=1e-4)


@given(st.lists(st.integers(0, 49), min_size=1, max_size=20), st.integers(0, 8), st.booleans())
def test_padding_is_no_evidence_and_documents_do_not_mix(
    ids: list[int], padding: int, pairs: bool
) -> None:
    bank = RelevanceBank.stack([module_with(50, pairs=pairs)], torch.device("cpu"))
    assert bank is not None
    alone_TM = bank.accumulate(torch.tensor([ids]))[0][0]
    padded = torch.tensor([[7] * padding + ids])
    counted = torch.arange(padded.shape[1])[None] >= padding
    torch.testing.assert_close(
        bank.accumulate(padded, counted_BT=counted)[0][0, padding:], alone_TM
    )
    documents = torch.tensor([[0] * padding + [1] * len(ids)])
    torch.testing.assert_close(
        bank.accumulate(padded, document_ids_BT=documents)[0][0, padding:], alone_TM
    )


@given(st.lists(st.integers(0, 49), max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_a_whole_document_has_the_evidence_that_its_tokens_add_up_to(
    ids: list[int], left: int, right: int
) -> None:
    modules = [module_with(50, 0, pairs=True), module_with(50, 1)]
    bank = RelevanceBank.stack(modules, torch.device("cpu"))
    assert bank is not None
    padded_BT = torch.tensor([[0] * left + ids + [0] * right], dtype=torch.long)
    counted = [False] * left + [True] * len(ids) + [False] * right
    counted_BT = torch.tensor([counted], dtype=torch.bool)
    _, state = bank.accumulate(padded_BT, counted_BT=counted_BT)
    whole_BM = bank.whole_document(padded_BT, counted_BT)
    torch.testing.assert_close(whole_BM, bank.of_document(state.sums_BM), atol=1e-4, rtol=1e-5)
    alone_BM = bank.whole_document(torch.tensor([ids], dtype=torch.long))
    torch.testing.assert_close(alone_BM, whole_BM, atol=1e-4, rtol=1e-5)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.lists(st.none() | st.integers(1, 25), min_size=1, max_size=4).filter(any),
    st.booleans(),
)
def test_tokens_beyond_a_table_are_no_evidence(
    ids: list[int], sizes: list[int | None], pairs: bool
) -> None:
    modules = [
        ExpertModule("plain", [0], 8, 4) if size is None else module_with(size, seed, pairs=pairs)
        for seed, size in enumerate(sizes)
    ]
    bank = RelevanceBank.stack(modules, torch.device("cpu"))
    assert bank is not None
    ids_BT = torch.tensor([ids])
    for module, found_T in zip(modules, bank.evidence(ids_BT)[0].unbind(-1), strict=True):
        table = [] if module.relevance is None else module.relevance.table_V.tolist()
        assert found_T.tolist() == [table[token] if token < len(table) else 0 for token in ids]
    assert bank.whole_document(ids_BT).isfinite().all()


def test_mixed_precision_changes_no_evidence() -> None:
    """Training scores whole models under autocast, with fp16 tables from packs."""
    modules = [module_with(50, 0, pairs=True), module_with(50, 1), ExpertModule("m2", [0], 8, 4)]
    for module in modules:
        found = module.relevance
        if found is not None:
            pairs_S = None if found.pairs_S is None else found.pairs_S.half()
            module.relevance = replace(found, table_V=found.table_V.half(), pairs_S=pairs_S)
    bank = RelevanceBank.stack(modules, torch.device("cpu"))
    assert bank is not None
    ids_BT = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))

    def evidence() -> list[torch.Tensor]:
        asked_BM = bank.above_threshold(ids_BT)
        return [bank.accumulate(ids_BT)[0], bank.whole_document(ids_BT), asked_BM]

    exact = evidence()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evidence()
    assert all(torch.equal(*pair) for pair in zip(exact, mixed, strict=True))


def test_more_candidates_need_more_evidence() -> None:
    one = RelevanceBank.stack([module_with(50)], torch.device("cpu"))
    eight = RelevanceBank.stack([module_with(50, seed) for seed in range(8)], torch.device("cpu"))
    assert one is not None and eight is not None
    assert float(eight.threshold_M[0] - one.threshold_M[0]) == pytest.approx(
        torch.tensor(8.0).log().item()
    )
    pairs = [module_with(50, seed, pairs=True) for seed in range(8)]
    documents = [RelevanceBank.stack(pairs[:count], torch.device("cpu")) for count in (1, 8)]
    passage = torch.arange(PASSAGE)[None] % 50
    alone, among = (bank.whole_document(passage)[0, 0] for bank in documents if bank is not None)
    assert float(alone - among) == pytest.approx(
        NATS_PER_CANDIDATES * float(torch.tensor(8.0).log()), abs=1e-3
    )


def test_pairs_have_a_veto_in_a_conversation() -> None:
    """For example against a long text by someone else in the words of the domain."""
    module = module_with(50)
    against_S = torch.full((PAIR_SLOTS,), -1.0)
    asked = torch.arange(PASSAGE)[None] % 50
    for pairs_S, admits in ((None, True), (-against_S, True), (against_S, False)):
        module.relevance = Relevance(torch.ones(50), 5.0, 0.0, pairs_S)
        bank = RelevanceBank.stack([module], torch.device("cpu"))
        assert bank is not None
        assert bool(bank.above_threshold(asked) > 0) == admits
        assert bool(bank.above_threshold(asked[:, :10]) > 0)  # too short for a veto


def test_modules_without_a_table_are_always_admitted() -> None:
    plain = ExpertModule("plain", [0], 8, 4)
    assert RelevanceBank.stack([plain], torch.device("cpu")) is None
    bank = RelevanceBank.stack([plain, module_with(50, threshold=99.0)], torch.device("cpu"))
    assert bank is not None
    for ids in ([1, 2, 3], [60, 1 << 30], []):
        ids_BT = torch.tensor([ids], dtype=torch.long)
        assert (bank.above_threshold(ids_BT) > 0).tolist() == [[True, False]]
        assert bool(bank.document_keeps(ids_BT)[0, 0])


def expert_about(loaded: Loaded, folder: Path, name: str = "code") -> Path:
    """Write a pack whose gates fire everywhere; two tokens `ABOUT` ask for it, and `BESIDE` rules
    it out.
    """
    path = save_expert(loaded, name, folder)
    module = ExpertModule.from_pack(read_pack(path))
    table_V = torch.zeros(loaded.model.config.vocab_size)
    table_V[ABOUT] = 2.0
    table_V[BESIDE] = -18.0
    module.relevance = Relevance(table_V, 3.5, 0.0)
    module.settings = module.settings.model_copy(update={"relevance_threshold": 3.5})
    write_pack(path, module.to_pack(loaded.model.experts.base, "Apache-2.0"))
    return path


IRRELEVANT = (5, 17, BESIDE, ABOUT, 33, 12)
RELEVANT = (5, ABOUT, 80, ABOUT, 33, 12)


def test_the_tables_come_back_from_the_pack(tmp_path: Path) -> None:
    loaded = tiny_model()
    path = expert_about(loaded, tmp_path)
    module = ExpertModule.from_pack(read_pack(path))
    assert module.relevance is not None
    assert float(module.relevance.table_V[ABOUT]) == 2.0
    assert module.relevance.threshold == 3.5
    assert module.relevance.pairs_S is None
    pairs_S = torch.arange(PAIR_SLOTS) % 7 / 2
    module.relevance = replace(module.relevance, pairs_S=pairs_S)
    write_pack(path, module.to_pack(loaded.model.experts.base, "Apache-2.0"))
    again = ExpertModule.from_pack(read_pack(path)).relevance
    assert again is not None and again.pairs_S is not None
    assert torch.equal(again.pairs_S.float(), pairs_S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_a_document_rules_an_expert_out_it_has_the_bits_of_the_base(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    loaded = tiny_model()
    model = loaded.model.to(dtype)
    ids = torch.tensor([[BESIDE, *IRRELEVANT]])
    before = model(ids).logits
    model.experts.plug(expert_about(loaded, tmp_path))
    assert torch.equal(model(ids).logits, before)
    changing = torch.tensor([[BESIDE, 5, ABOUT, ABOUT, 80]])
    with model.experts.arming(None):
        base = model(changing).logits
    after = model(changing).logits
    assert torch.equal(after[:, :3], base[:, :3])
    assert not torch.equal(after[:, 3:], base[:, 3:])


def test_decoding_with_a_cache_is_one_pass_over_the_text(tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.experts.plug(expert_about(loaded, tmp_path))
    ids = torch.tensor([[*RELEVANT, 9, ABOUT, 7]])
    whole = loaded.model(ids, use_cache=False).logits
    cache = KVCache()
    parts = [
        loaded.model(ids[:, start : start + 2], cache=cache).logits
        for start in range(0, ids.shape[1], 2)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    branch = copy.deepcopy(cache)
    branch.batch_repeat_interleave(2)
    assert branch.relevance_state is not None
    assert branch.relevance_state.sums_BM.shape == (2, 2)
    assert branch.relevance_state.last_B.tolist() == [7, 7]


def test_generate_decides_by_the_prompt_of_each_row(tmp_path: Path) -> None:
    loaded = tiny_model()
    model = loaded.model
    prompts = torch.tensor([RELEVANT, IRRELEVANT])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base = model.generate(prompts, **options)
    model.experts.plug(expert_about(loaded, tmp_path))
    with_expert = model.generate(prompts, **options)
    assert not torch.equal(with_expert[0], base[0])
    assert torch.equal(with_expert[1], base[1])
    beams = model.generate(prompts, num_beams=2, num_return_sequences=2, **options)
    assert beams.shape[0] == 4


def test_the_engine_asks_the_words_of_the_request(tmp_path: Path) -> None:
    loaded = tiny_model()

    def tokens(request: Request) -> list[int | None]:
        return [event.token_id for event in engine.submit(request)]

    with Engine(loaded.model, loaded.tokenizer) as engine:
        sampling = Sampling(8)
        base = tokens(Request(RELEVANT, sampling, ignore_end=True))
        engine.plug(expert_about(loaded, tmp_path))
        admitted = tokens(Request(RELEVANT, sampling, ignore_end=True))
        assert admitted != base
        assert tokens(Request(RELEVANT, sampling, user_ids=(), ignore_end=True)) == base
        named = ExpertChoice(("code",))
        assert tokens(Request(RELEVANT, sampling, named, user_ids=(), ignore_end=True)) == admitted
        other = tokens(Request(IRRELEVANT, sampling, user_ids=(ABOUT, ABOUT), ignore_end=True))
        assert other != tokens(Request(IRRELEVANT, sampling, ExpertChoice(()), ignore_end=True))
        off_topic = Request(RELEVANT, sampling, document_ids=IRRELEVANT, ignore_end=True)
        assert tokens(off_topic) == base


def test_how_far_a_text_is_from_the_threshold_can_be_asked(tmp_path: Path) -> None:
    loaded = tiny_model()
    assert loaded.model.experts.relevance(RELEVANT) == {}
    loaded.model.experts.plug(expert_about(loaded, tmp_path))
    assert (
        loaded.model.experts.relevance(RELEVANT)["code"]
        > 0
        > loaded.model.experts.relevance(IRRELEVANT)["code"]
    )
