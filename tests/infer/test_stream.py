"""Streaming writes what `generate` writes, and says which expert spoke."""

from pathlib import Path

import pytest
import torch
from tiny_expert import save_expert

from deepseek.errors import ConfigError
from deepseek.infer.load import Loaded
from deepseek.infer.sampler import Sampling
from deepseek.infer.stream import stream

PROMPT = [5, 17, 80, 200, 33]


def ids_of(loaded: Loaded, sampling: Sampling) -> list[int]:
    return [piece.token_id for piece in stream(*loaded, PROMPT, sampling)]


@pytest.mark.parametrize("with_expert", [False, True])
def test_greedy_stream_equals_generate(loaded: Loaded, tmp_path: Path, with_expert: bool) -> None:
    model, _ = loaded
    if with_expert:
        model.experts.plug(save_expert(loaded, "always", tmp_path))
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=2)[
        0, 5:
    ].tolist()
    streamed = ids_of(loaded, Sampling(max_new_tokens=20))
    assert streamed == expected[: len(streamed)]
    assert len(streamed) == 20 or expected[len(streamed)] in (0, 2)


def test_same_seed_same_text(loaded: Loaded) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=7)
    assert ids_of(loaded, sampling) == ids_of(loaded, sampling)


def test_pieces_join_to_the_decoded_text(loaded: Loaded) -> None:
    pieces = list(stream(*loaded, PROMPT, Sampling(max_new_tokens=30, temperature=2.0, seed=1)))
    whole = loaded.tokenizer.decode([piece.token_id for piece in pieces], skip_special_tokens=True)
    assert whole.startswith("".join(piece.text for piece in pieces).rstrip("�"))


def test_speaker_is_named_only_where_an_expert_fires(loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.experts.plug(save_expert(loaded, "always", tmp_path))
    assert {piece.expert for piece in stream(*loaded, PROMPT, Sampling(max_new_tokens=5))} == {"always"}
    loaded.model.experts.arm(None)
    assert {piece.expert for piece in stream(*loaded, PROMPT, Sampling(max_new_tokens=5))} == {None}


def test_a_sequence_keeps_its_experts_while_others_come_and_go(loaded: Loaded, tmp_path: Path) -> None:
    path = save_expert(loaded, "always", tmp_path)
    expected = ids_of(loaded, Sampling(max_new_tokens=10))
    running = stream(*loaded, PROMPT, Sampling(max_new_tokens=10))
    written = [next(running).token_id for _ in range(3)]
    loaded.model.experts.plug(path)
    written += [piece.token_id for piece in running]
    assert written == expected
    assert ids_of(loaded, Sampling(max_new_tokens=10)) != expected
    loaded.model.experts.unplug("always")
    assert ids_of(loaded, Sampling(max_new_tokens=10)) == expected


@pytest.mark.parametrize("prompt", [[], list(range(64))])
def test_prompts_that_do_not_fit_are_refused(loaded: Loaded, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"The prompt has {len(prompt)} tokens"):
        next(stream(*loaded, prompt, Sampling()))
