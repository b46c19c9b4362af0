"""The engine's output equals the model's, whatever else runs, is plugged or cached."""

import asyncio
import copy
import gc
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_expert import save_expert
from tiny_model import KINDS, tiny_model
from waiting import wait_for

from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.load import Loaded
from deepseek.engine.request import (
    EngineStoppedError,
    ExpertChoice,
    QueueFullError,
    Request,
    TokenEvent,
)
from deepseek.engine.sampler import Sampling
from deepseek.engine.sequence import row_logprob
from deepseek.engine.torch_runner import TorchState
from deepseek.errors import ConfigError, PackError
from deepseek.model.transformer import DeepSeekModel

PROMPTS = [
    (5, 17, 80, 200, 33),
    (9,),
    tuple(range(10, 41)),
    (7, 7, 7, 250, 250, 31, 100, 101, 102, 103),
]
LONG = Request(PROMPTS[0], Sampling(max_new_tokens=50), ignore_end=True)


def ids_of(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def together(engine: Engine, requests: list[Request]) -> list[list[TokenEvent]]:
    """Run `requests` in one batch and return their events."""
    return [list(generation) for generation in [engine.submit(request) for request in requests]]


def greedy(model: DeepSeekModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """Return the output of `generate`, ignoring end tokens."""
    row = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1
    )[0]
    return row[len(prompt) :].tolist()


@pytest.mark.parametrize("with_expert", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_generate_writes(kind: str, with_expert: bool, tmp_path: Path) -> None:
    loaded = tiny_model(kind)
    if with_expert:
        loaded.model.experts.plug(save_expert(loaded, "always", tmp_path))
    requests = [Request(prompt, Sampling(max_new_tokens=15), ignore_end=True) for prompt in PROMPTS]
    with Engine(*loaded, prefill_chunk=8) as engine:
        written = together(engine, requests)
        again = together(engine, requests)
        assert engine.stats().cached_tokens == sum((len(prompt) - 1) // 8 * 8 for prompt in PROMPTS)
    for prompt, events in zip(PROMPTS, written, strict=True):
        assert ids_of(events) == greedy(loaded.model, prompt, 15)
        assert {event.expert for event in events} == {
            "always" if with_expert and len(prompt) > 1 else None,
            *(["always"] if with_expert else []),
        }
    assert again == written


@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_in_a_batch_the_same_tokens(kind: str) -> None:
    requests = [
        Request(prompt, Sampling(12, temperature=1.0, top_p=0.9, seed=n), logprobs=3)
        for n, prompt in enumerate(PROMPTS)
    ]
    with Engine(*tiny_model(kind), prefill_chunk=8) as engine:
        batched = together(engine, requests)
        alone = [events for one in requests for events in together(engine, [one])]
    for one, other in zip(batched, alone, strict=True):
        assert ids_of(one) == ids_of(other)
        assert [event.text for event in one] == [event.text for event in other]
        told, expected = (
            torch.tensor([event.logprob.logprob for event in events if event.logprob])
            for events in (one, other)
        )
        # The steep random biases of DPE amplify rounding.
        tolerance = 5e-4 if kind == "dpe" else 1e-4
        torch.testing.assert_close(told, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("awaited", [False, True])
def test_a_finished_generation_needs_no_garbage_collection(awaited: bool) -> None:
    """Garbage collections are rare on a server, so memory must not wait for them."""

    async def events(generation: Generation) -> list[TokenEvent]:
        return [event async for event in generation]

    gc.disable()
    try:
        with Engine(*tiny_model()) as engine:
            generation = engine.submit(LONG)
            assert len(asyncio.run(events(generation)) if awaited else list(generation)) == 50
            left, patience = weakref.ref(generation), time.monotonic() + 5
            del generation
            # The engine's thread may still hold it.
            while left() is not None and time.monotonic() < patience:
                time.sleep(0.01)
            assert left() is None
    finally:
        gc.enable()


def test_log_probabilities_are_those_of_the_model() -> None:
    loaded = tiny_model()
    request = Request(
        PROMPTS[2], Sampling(max_new_tokens=8), ignore_end=True, logprobs=2, prompt_logprobs=True
    )
    with Engine(*loaded, prefill_chunk=8) as engine:
        # Fills the prefix cache, which must not shorten the prompt's log probabilities.
        together(engine, [request])
        generation = engine.submit(request)
        events = list(generation)
    told = [*generation.prompt_logprobs[1:], *(event.logprob for event in events)]
    row = torch.tensor([[*PROMPTS[2], *ids_of(events)]])
    expected = loaded.model.log_probs(row)[0]
    torch.testing.assert_close(
        torch.tensor([one.logprob for one in told]), expected, atol=1e-4, rtol=0
    )
    likeliest = loaded.model(row).logits[0, :-1].topk(2).indices.tolist()
    assert [[token for token, _ in one.top] for one in told] == likeliest
    assert generation.prompt_logprobs[0] is None


@pytest.mark.parametrize("top", [0, 1, 4, 5, 20])
def test_at_most_all_tokens_are_likeliest(top: int) -> None:
    logits = np.array([0.0, 3.0, 1.0, 4.0, 2.0], np.float32)
    reported = row_logprob(logits, 2, top)
    assert [token for token, _ in reported.top] == [3, 1, 4, 2, 0][:top]
    assert reported.logprob == pytest.approx(1.0 - np.log(np.exp(logits).sum()), abs=1e-6)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 17, 23])
def test_scores_from_a_place_on_are_those_of_the_whole_and_take_the_rest_from_the_cache(
    start: int,
) -> None:
    prompt = tuple(range(10, 33))
    whole = Request(
        prompt, Sampling(max_new_tokens=2), ignore_end=True, logprobs=0, prompt_logprobs=True
    )
    with Engine(*tiny_model(), prefill_chunk=8) as engine:
        (full,) = (engine.submit(whole),)
        events = list(full)
        part = engine.submit(replace(whole, scored_from=start))
        assert ids_of(list(part)) == ids_of(events)
    assert part.prompt_logprobs[:start] == (None,) * start
    told = [one.logprob for one in part.prompt_logprobs[start:] if one is not None]
    expected = [one.logprob for one in full.prompt_logprobs[start:] if one is not None]
    assert len(told) == len(prompt) - start and told == pytest.approx(expected, abs=1e-5)
    assert part.usage.cached_tokens == (start - 1) // 8 * 8
    with pytest.raises(ConfigError, match="scored_from"):
        replace(whole, scored_from=len(prompt) + 1)


def test_seeds() -> None:
    def request(seed: int | None) -> Request:
        return Request(
            PROMPTS[0], Sampling(max_new_tokens=20, temperature=1.0, seed=seed), ignore_end=True
        )

    with Engine(*tiny_model()) as engine:
        same, again, other, free, also_free = map(
            ids_of, together(engine, [*map(request, (3, 3, 4, None, None))])
        )
    assert same == again
    assert len({tuple(ids) for ids in (same, other, free, also_free)}) == 4


def test_coroutines_and_threads_see_the_same_events() -> None:
    async def collect(engine: Engine) -> list[list[TokenEvent]]:
        async def one(request: Request) -> list[TokenEvent]:
            return [event async for event in engine.submit(request)]

        return await asyncio.gather(*(one(Request(prompt)) for prompt in PROMPTS))

    with Engine(*tiny_model()) as engine:
        assert asyncio.run(collect(engine)) == together(
            engine, [Request(prompt) for prompt in PROMPTS]
        )


def test_usage_counts_tokens_by_expert(tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.experts.plug(save_expert(loaded, "always", tmp_path))
    with Engine(*loaded) as engine:
        generations = [
            engine.submit(Request(PROMPTS[0], Sampling(9), choice, ignore_end=True))
            for choice in (
                ExpertChoice(),
                ExpertChoice(arm=()),
                ExpertChoice(deny=("always", "unknown")),
                ExpertChoice(("always",)),
            )
        ]
        texts = [ids_of(list(generation)) for generation in generations]
        assert [dict(one.usage.experts) for one in generations] == [
            {"always": 9},
            {None: 9},
            {None: 9},
            {"always": 9},
        ]
        with pytest.raises(PackError, match="'alway'"):
            engine.submit(Request(PROMPTS[0], experts=ExpertChoice(("alway",))))
    assert texts[0] == texts[3] != texts[1] == texts[2]


def test_experts_come_and_go_between_steps(tmp_path: Path) -> None:
    loaded = tiny_model()
    pack = save_expert(loaded, "always", tmp_path)
    with Engine(*loaded) as engine:
        plain = list(engine.submit(LONG))
        changed = []
        running = engine.submit(LONG)
        for number, event in enumerate(running):
            changed.append(event)
            if number % 10 == 0:
                engine.plug(pack)
                with_expert = engine.submit(LONG)
                engine.unplug("always")
        assert changed == plain
        spoken = list(with_expert)
        assert {event.expert for event in spoken} == {"always"}
        assert list(engine.submit(LONG)) == plain
        assert engine.experts() == ()


def test_a_reload_under_the_same_name_is_never_mistaken(tmp_path: Path) -> None:
    loaded = tiny_model()
    request = Request(PROMPTS[2], Sampling(max_new_tokens=3), ignore_end=True)
    with Engine(*loaded, prefill_chunk=4) as engine:
        for seed in range(8):
            engine.plug(save_expert(loaded, "always", tmp_path, seed=seed % 4 + 1))
            generation = engine.submit(request)
            assert ids_of(list(generation)) == greedy(loaded.model, PROMPTS[2], 3)
            # Only the same content is found.
            assert generation.usage.cached_tokens == (0 if seed < 4 else 28)
            engine.unplug("always")


def test_cancelling_frees_what_was_reserved() -> None:
    with Engine(*tiny_model(), max_running=1) as engine:
        running, waiting = engine.submit(LONG), engine.submit(LONG)
        next(iter(running))
        for generation in (waiting, running):
            generation.cancel()
            assert list(generation)[-1].finish_reason == "cancelled"
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.reserved_bytes) == (0, 0, 0)
        assert dict(stats.finished) == {"cancelled": 2}
        assert list(engine.submit(LONG))[-1].finish_reason == "length"


def test_refusals() -> None:
    loaded = tiny_model()
    with Engine(*loaded, cache_bytes=20_000, max_running=1, max_waiting=2) as engine:
        for make, cause in [
            (lambda: Request(tuple(range(64))), "64 tokens"),
            (lambda: Request((291,)), "0 to 290"),
            (lambda: Request((-1,)), r"prompt_ids\[0\]=-1"),
            (lambda: Request((1,), user_ids=(291,)), "0 to 290"),
            (lambda: Request((1,), document_ids=(291,)), "0 to 290"),
            (lambda: Request((1,), Sampling(logit_bias={291: 1.0})), "0 to 290"),
            (lambda: Request(PROMPTS[0]), "larger cache"),
            (lambda: Request((1,), experts=ExpertChoice(max_experts=0)), "max_experts=0"),
        ]:
            with pytest.raises(ConfigError, match=cause):
                engine.submit(make())
        fitting = Request(PROMPTS[0], Sampling(max_new_tokens=30), ignore_end=True)
        with pytest.raises(QueueFullError) as refusal:
            for _ in range(100):
                engine.submit(fitting)
        assert 1 <= refusal.value.retry_after <= 60
        assert engine.drain(timeout=60)
        with pytest.raises(EngineStoppedError):
            engine.submit(fitting)


def test_requests_are_taken_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the engine's thread takes some out of the queue."""
    request = Request(PROMPTS[0], Sampling(max_new_tokens=4), ignore_end=True)
    with Engine(*tiny_model(), max_running=2, max_waiting=3) as engine:
        gate = threading.Event()
        step = engine._scheduler.step
        monkeypatch.setattr(engine._scheduler, "step", lambda: gate.wait(60) and step())
        held = engine.submit_all([request] * 4)  # more than the queue holds
        with pytest.raises(
            QueueFullError, match="4 requests are running or waiting already"
        ) as full:
            engine.submit_all([request] * 2)
        copied = copy.copy(full.value)  # as for another process
        assert str(copied) == str(full.value)
        assert (copied.waiting, copied.retry_after) == (4, full.value.retry_after)
        with pytest.raises(QueueFullError):
            engine.submit(request)
        assert engine.stats().waiting == 4
        gate.set()
        assert [len(list(generation)) for generation in held] == [4] * 4
        for _ in range(20):
            assert [len(list(one)) for one in engine.submit_all([request] * 5)] == [4] * 5
            wait_for(lambda: not engine.stats().running)


def test_more_requests_than_ever_have_a_place_are_refused_for_good() -> None:
    with Engine(*tiny_model(), max_running=2, max_waiting=3) as engine:
        with pytest.raises(ConfigError, match="6 answers are wanted at once, but at most 5"):
            engine.submit_all([LONG] * 6)
        with pytest.raises(ConfigError):
            engine.submit_all([LONG, Request(PROMPTS[0], Sampling(max_new_tokens=8), stop=("",))])
        assert engine.stats().waiting == engine.stats().running == 0


def test_closing_ends_everything() -> None:
    engine = Engine(*tiny_model(), max_running=1)
    generations = [engine.submit(LONG) for _ in range(3)]
    threading.Timer(0.01, engine.close).start()
    assert {list(one)[-1].finish_reason for one in generations} <= {"length", "cancelled"}
    engine.close()
    with pytest.raises(EngineStoppedError):
        engine.embed([1])


def test_draining_ends_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(*tiny_model())
    end_all = engine._scheduler.end_all
    # The draining thread checks again while requests are still running.
    monkeypatch.setattr(engine._scheduler, "end_all", lambda why: time.sleep(0.3) or end_all(why))
    generation = engine.submit(LONG)
    next(iter(generation))
    draining = threading.Thread(target=engine.drain, daemon=True)
    draining.start()
    engine.close()
    draining.join(10)
    assert not draining.is_alive()


def test_draining_ends_after_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(*tiny_model()) as engine:
        release = engine._scheduler._release
        # A sequence is not running any more, but its last event is still to come.
        monkeypatch.setattr(
            engine._scheduler, "_release", lambda sequence: release(sequence) or time.sleep(0.3)
        )
        request = Request(PROMPTS[0], Sampling(max_new_tokens=4), ignore_end=True)
        generation = engine.submit(request)
        assert engine.drain(timeout=60)
        assert engine.stats().finished == {"length": 1}
        assert [event.finish_reason for event in generation][-1] == "length"


@pytest.mark.parametrize("memory", ["of a state", "of the device"])
def test_an_error_after_an_error_does_not_end_the_engine(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with Engine(*tiny_model()) as engine:
        expected = list(engine.submit(LONG))
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "forward", fail)
            if memory == "of a state":
                patch.setattr(TorchState, "close", fail)
            else:
                patch.setattr("deepseek.engine.worker.release", fail)
            for generation in engine.submit_all([LONG] * 3):
                event = list(generation)[-1]
                assert event.finish_reason == "error"
                assert event.error is not None and "out of memory (Tried to" in event.error
        wait_for(lambda: engine.stats().reserved_bytes == 0)
        assert list(engine.submit(LONG)) == expected


def test_a_failing_batch_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(*tiny_model()) as engine:
        expected = list(engine.submit(LONG))
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "forward", lambda chunks: 1 / 0)
            event = list(engine.submit(LONG))[-1]
        assert (event.finish_reason, event.error) == (
            "error",
            "ZeroDivisionError: division by zero",
        )
        wait_for(lambda: engine.stats().reserved_bytes == 0)
        assert list(engine.submit(LONG)) == expected


def test_embeddings_ignore_experts(tmp_path: Path) -> None:
    loaded: Loaded = tiny_model()
    with Engine(*loaded) as engine:
        before = engine.embed(PROMPTS[2])
        engine.plug(save_expert(loaded, "always", tmp_path))
        assert engine.embed(PROMPTS[2]) == before
        with pytest.raises(ConfigError, match="0 tokens"):
            engine.embed([])
    hidden = loaded.model(torch.tensor([PROMPTS[2]]), output_hidden_states=True).hidden_states
    assert hidden is not None
    assert torch.tensor(before).norm() == pytest.approx(1.0)


def test_a_choice_made_again_has_the_same_roster(tmp_path: Path) -> None:
    loaded = tiny_model()
    names = ("one", "two")
    for seed, name in enumerate(names):
        loaded.model.experts.plug(save_expert(loaded, name, tmp_path, seed=seed))
    choose = loaded.model.experts.choose
    both, again = choose(names), choose(names[::-1])
    fewer, other = choose(names, max_experts=1), choose("auto", ["two"])
    assert both is not None and again is not None and fewer is not None and other is not None
    assert both.roster is again.roster
    assert other.names == ("one",)
    assert len({both.identity, fewer.identity, other.identity}) == 3
    assert choose(names, deny=names) is None
