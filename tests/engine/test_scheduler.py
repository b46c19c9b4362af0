"""Memory stays within its budget for any requests, and a state split into segments and reassembled
continues unchanged.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_expert import save_expert
from tiny_model import KINDS, tiny_model

from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.load import Loaded
from deepseek.engine.prefix import PartKeys, PrefixCache, block_keys
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import Scheduler
from deepseek.engine.sequence import activate
from deepseek.engine.torch_runner import TorchRunner, TorchState
from deepseek.engine.vocabulary import Vocabulary
from deepseek.runner import Chunk


@settings(max_examples=15)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans()), min_size=1, max_size=6
    ),
    budget=st.integers(60_000, 200_000),
    cancelled=st.sets(st.integers(0, 5)),
)
def test_the_budget_is_never_exceeded(
    asked: list[tuple[int, int, bool]], budget: int, cancelled: set[int], armed_model: Loaded
) -> None:
    model, tokenizer = armed_model
    scheduler = Scheduler(TorchRunner(model), cache_bytes=budget, max_running=3, prefill_chunk=4)
    vocabulary = Vocabulary(model, tokenizer)
    sequences = []
    for length, count, armed in asked:
        choice = ExpertChoice("auto" if armed else ())
        request = Request(
            tuple(range(3, 3 + length)), Sampling(max_new_tokens=count), choice, ignore_end=True
        )
        sequences.append(activate(request, model, vocabulary, 4, scheduler.runner.divides))
    scheduler.waiting.extend(sequences)
    for number in range(400):
        scheduler.step()
        held = sum(one.state.nbytes for one in scheduler.running if one.state is not None)
        assert held <= scheduler.reserved
        assert scheduler.reserved + scheduler.prefixes.nbytes <= budget
        if number in cancelled:
            sequences[number % len(sequences)].cancelled = True
        if scheduler.idle:
            break
    assert scheduler.idle
    assert scheduler.reserved == 0
    for (_, count, _), one in zip(asked, sequences, strict=True):
        assert one.finish_reason == "cancelled" or one.usage.completion_tokens == count


def test_a_prompt_that_is_asked_several_times_at_once_is_computed_once(armed_model: Loaded) -> None:
    """Sequences that are admitted together reuse what the first of them has stored."""
    model, tokenizer = armed_model
    scheduler = Scheduler(TorchRunner(model), prefill_chunk=4)
    prompt = tuple(range(3, 33))
    request = Request(prompt, Sampling(max_new_tokens=2), ignore_end=True)
    vocabulary = Vocabulary(model, tokenizer)
    divides = scheduler.runner.divides
    scheduler.waiting.extend(activate(request, model, vocabulary, 4, divides) for _ in range(5))
    while not scheduler.idle:
        scheduler.step()
    assert scheduler.prompt_tokens == 5 * 30
    assert scheduler.cached_tokens == 4 * 28  # all but the last block, which is not full


def test_a_prompt_waits_for_one_text_of_an_embedding_at_most() -> None:
    model, tokenizer = tiny_model()
    runner = TorchRunner(model)
    scheduler = Scheduler(runner, prefill_chunk=4)
    embedding = ActiveEmbedding(model, runner, [range(3, 15)] * 50, 4)
    request = Request((5, 6, 7), Sampling(max_new_tokens=1))
    sequence = activate(request, model, Vocabulary(model, tokenizer), 4, runner.divides)
    scheduler.waiting.extend([embedding, sequence])
    for _ in range(4):
        scheduler.step()
    assert sequence.finish_reason == "length"
    while not scheduler.idle:
        scheduler.step()
    assert len(embedding.result.result()) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_pieces_goes_on_as_the_whole_one(kind: str, tmp_path: Path) -> None:
    loaded = tiny_model(kind)
    loaded.model.experts.plug(save_expert(loaded, "always", tmp_path))
    runner = TorchRunner(loaded.model)
    whole, copied = (runner.start(loaded.model.experts.armed(), 40) for _ in range(2))
    for start in range(0, 24, 8):
        chunk = Chunk(whole, range(start, start + 8), 0, store=[0])
        segment = runner.forward([chunk]).segments[0][0]
        copied.extend(segment)
        assert isinstance(copied, TorchState)
        assert (
            0
            < segment.nbytes
            <= copied.nbytes
            <= runner.state_bytes(start + 8, loaded.model.experts.armed())
        )
    for token in (9, 8, 7, 6):
        expected, told = (
            runner.forward([Chunk(whole, [token])]),
            runner.forward([Chunk(copied, [token])]),
        )
        assert torch.equal(told.logits_RV, expected.logits_RV)
        assert told.experts == expected.experts == ("always",)


def test_block_keys_depend_on_all_tokens_before_and_on_the_experts() -> None:
    keys = block_keys("a", range(10), 3)
    assert len(keys) == 3
    assert block_keys("a", range(9), 3) == keys
    assert set(block_keys("b", range(10), 3)).isdisjoint(keys)
    changed = block_keys("a", [0, 1, 2, 3, 99, 5, 6, 7, 8], 3)
    assert changed[0] == keys[0]
    assert set(changed[1:]).isdisjoint(keys)


class Block:
    """A segment of ten bytes."""

    nbytes = 10
    stream_bytes = 0


def test_the_least_recently_used_block_goes_first() -> None:
    cache, blocks = PrefixCache(), {key: Block() for key in (b"a", b"b", b"c", b"d")}
    for key in (b"a", b"b", b"c"):
        cache.add(key, blocks[key], limit=30)
    assert cache.match([PartKeys([b"a", b"x", b"b"], 3)]) == [[blocks[b"a"]]]
    cache.add(b"d", blocks[b"d"], limit=30)
    assert b"b" not in cache
    assert (b"a" in cache, cache.nbytes) == (True, 30)
    cache.add(b"e", Block(), limit=5)
    assert b"e" not in cache
    cache.shrink(0)
    assert cache.nbytes == 0


@pytest.fixture(scope="module")
def armed_model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    loaded = tiny_model("lsh")
    loaded.model.experts.plug(save_expert(loaded, "always", tmp_path_factory.mktemp("packs")))
    return loaded
