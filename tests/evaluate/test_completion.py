"""Cases are cut at the right places, and lines are generated and scored as by the model itself."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model
from tiny_sentencepiece import SCHEMES, tiny_sentencepiece
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Request
from deepseek.evaluate import completion
from deepseek.evaluate.cases import LEAST_LINES, Case, CaseEncoder, next_line_cases
from deepseek.evaluate.completion import (
    TARGET_TOKENS,
    Completion,
    Dials,
    Writer,
    score_answers,
    target_tokens,
)
from deepseek.retrieval.index import Index

FUNCTION = "".join(f"def model_{n}(value):\n    return value + router_{n}\n\n" for n in range(12))
CODE = Document(FUNCTION, "repo/m.py", "code")
DIFF = Document(
    "Change\n\n--- a.py\n+++ a.py\n@@\n" + "".join(f" same_{n}\n+added_{n}\n" for n in range(9)),
    "r@1",
    "commit",
)
PLAIN = tiny_tokenizer()
FIM = tiny_tokenizer(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
SMALL = Dials(text_tokens=24, retrieved_tokens=16, passages=1, reply_tokens=6)


@given(
    st.lists(
        st.sampled_from(["", "}", "    value = 1", "else:", "\treturn model", "x"]), max_size=60
    ),
    st.integers(0, 9),
)
def test_cases_are_lines_with_something_on_them(lines: list[str], seed: int) -> None:
    document = Document("\n".join(lines), "repo/x.py", "code")
    cases = next_line_cases([document], 100, seed)
    assert cases == next_line_cases([document], 100, seed)
    assert len({case.line for case in cases}) == len(cases)
    for case in cases:
        assert (
            case.line >= LEAST_LINES
            and case.target == lines[case.line].strip()
            and len(case.target) >= 6
        )
        whole = case.before + case.target
        assert document.text.startswith(whole) and document.text[len(whole) :].lstrip(
            "\n"
        ).startswith(case.after[:1])


def test_cases_are_spread_over_the_documents_and_depend_on_the_seed() -> None:
    documents = [replace(CODE, name=f"repo/{n}.py") for n in range(4)]
    cases = next_line_cases(documents, 6)
    assert sorted(Counter(case.name for case in cases).values()) == [1, 1, 2, 2]
    assert {case.line for case in cases} != {
        case.line for case in next_line_cases(documents, 6, seed=1)
    }


def test_with_more_documents_than_cases_the_seed_draws_the_documents() -> None:
    documents = [replace(CODE, name=f"repo/{n:02}.py") for n in range(40)]
    drawn = [{case.name for case in next_line_cases(documents, 10, seed)} for seed in range(8)]
    assert all(len(names) == 10 for names in drawn)
    assert len(set.union(*drawn)) > 30


def test_prose_is_compared_as_far_as_it_is_asked_for() -> None:
    paragraph = "All work and no play makes it dull. " * 10
    (case,) = next_line_cases([Document(f"{paragraph}\n" * 12, "tale")], 1)
    answer = Completion(paragraph, paragraph, 4.0, 2, 10, 3, 0.5)
    assert len(case.target) < len(paragraph.strip())
    scores = score_answers([case], [answer])
    assert (scores.exact, scores.similarity, scores.infilled) == ([1.0], [1.0], [1.0])


def test_a_line_ends_where_an_answer_is_cut() -> None:
    line = "first_half\fsecond_half\u2028third"
    text = "".join(f"{number}\n" for number in range(LEAST_LINES)) + f"{line}\nafter\n"
    (case,) = next_line_cases([Document(text, "repo/x.py", "code")], 1)
    assert case.target == line and case.after == "after\n"


def test_only_what_a_commit_added_is_asked_for() -> None:
    cases = next_line_cases([DIFF], 50)
    assert cases and all(
        case.target.startswith("added_") and case.before.endswith("\n+") for case in cases
    )


def test_the_name_of_a_changed_file_is_no_added_line() -> None:
    message = "Message\n\n" + "body\n" * LEAST_LINES
    patch = "--- src/parser.py\n+++ src/parser.py\n@@\n+value = compute(1)\n"
    cases = next_line_cases([Document(message + patch, "repo@1", "commit")], 50)
    assert [case.target for case in cases] == ["value = compute(1)"]


@given(st.integers(0, 20), st.integers(8, 200))
def test_prompt_and_target_are_the_tokens_of_the_text(seed: int, most: int) -> None:
    (case,) = next_line_cases([CODE], 1, seed)
    prompt = CaseEncoder(PLAIN, most).next_line(case, "before it\n")
    text = PLAIN.decode([*prompt.ids, *prompt.target_ids], clean_up_tokenization_spaces=False)
    assert text.startswith("before it\nfile: repo/m.py\n\n") and text.endswith(
        case.before[-1] + case.target
    )
    assert case.target.startswith(PLAIN.decode(prompt.target_ids).strip()[:3])


def test_infilling_is_asked_only_where_the_tokenizer_knows_it() -> None:
    (case,) = next_line_cases([CODE], 1)
    assert CaseEncoder(PLAIN, 99).infill(case) is None
    prompt = CaseEncoder(FIM, 999).infill(case)
    assert (
        FIM.decode(prompt.ids) == f"<fim_prefix>{case.before}<fim_suffix>{case.after}<fim_middle>"
    )
    assert FIM.decode(prompt.target_ids) == case.target


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 90),
    st.sampled_from(["a ", "é", "router "]),
)
def test_half_of_the_text_is_kept_whatever_the_length_of_its_lines(
    lengths: list[int], most: int, word: str
) -> None:
    text = "".join(word * length + "\n" for length in lengths)
    encoder = CaseEncoder(PLAIN, most)
    kept = encoder._shortened(text)
    assert text.endswith(kept)
    tokens = encoder.length(kept)
    if encoder.length(text) <= most:
        assert kept == text
    else:
        # The first kept token may differ, since it is tokenised at the start of a text.
        assert most // 2 - 1 <= tokens <= most + 1
        starts_a_line = text[: len(text) - len(kept)].endswith("\n")
        assert starts_a_line or "\n" not in kept[: len(kept) // 2 - len(word)]


@given(st.integers(12, 200), st.integers(1, 60), st.sampled_from(["", "before it\n" * 9]))
def test_no_room_is_so_small_that_a_marker_is_cut(room: int, long: int, context: str) -> None:
    case = Case("repo/m.py", "code", 9, CODE.text, "after " * long + "\n", "value")
    prompt = CaseEncoder(FIM, 40, room).infill(case, context)
    assert prompt is not None and len(prompt.ids) <= room
    text = FIM.decode(prompt.ids)
    assert text.startswith("<fim_prefix>") and text.endswith("<fim_middle>")
    assert text.count("<fim_suffix>") == 1
    before = text.removeprefix("<fim_prefix>").split("<fim_suffix>")[0]
    assert (context + CaseEncoder(FIM, 40)._shortened(case.before)).endswith(before)
    next_line = CaseEncoder(FIM, 40, room).next_line(case, context)
    assert len(next_line.ids) <= room


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=st.integers(0, 20))
def test_infilling_has_no_spaces_around_the_gap(scheme: str, seed: int) -> None:
    tokenizer = tiny_sentencepiece(scheme, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
    (case,) = next_line_cases([CODE], 1, seed)
    prompt = CaseEncoder(tokenizer, 999).infill(case)
    assert prompt is not None
    text = tokenizer.decode([*prompt.ids, *prompt.target_ids], clean_up_tokenization_spaces=False)
    ending = f"{case.before}<fim_suffix>{case.after}<fim_middle>{case.target}"
    assert text.endswith(ending)


def test_the_loss_is_that_of_the_model_and_the_line_its_likeliest() -> None:
    model, tokenizer = tiny_model()
    cases = next_line_cases([CODE], 3)
    with Engine(model, tokenizer, max_waiting=64) as engine:
        writer = Writer(engine, ExpertChoice(()), None, replace(SMALL, text_tokens=16))
        writer.encoder.room = 40
        answers = list(writer.answers(cases))
        for case, answer in zip(cases, answers, strict=True):
            prompt = writer.encoder.next_line(case)
            ids = [*prompt.ids, *prompt.target_ids]
            assert len(prompt.ids) <= 40
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(ids) - len(prompt.target_ids)
            nats = -sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert answer.nats == pytest.approx(nats, rel=1e-4)
            assert answer.target_tokens == len(prompt.target_ids) and answer.infilled is None
            assert "\n" not in answer.written


def test_retrieved_text_is_part_of_the_prompt_and_costs_tokens() -> None:
    model, tokenizer = tiny_model()
    index = Index.build([Document("the model returns\n" * 3, "repo/other.py", "code")])
    case = next_line_cases([Document("def model(router):\n" * 12, "repo/n.py", "code")], 1)
    with Engine(model, tokenizer, max_waiting=64) as engine:
        writer = Writer(engine, ExpertChoice(()), index, replace(SMALL, retrieved_tokens=60))
        assert writer.dials.text_tokens < SMALL.text_tokens  # the context has 64 tokens
        writer.dials = replace(writer.dials, retrieved_tokens=60)
        assert "the model returns" in writer.context(case[0])
        (answer,) = writer.answers(case)
        assert answer.prompt_tokens <= 64


@given(
    st.integers(6, 1200),
    st.builds(
        Dials,
        text_tokens=st.integers(1, 600),
        retrieved_tokens=st.integers(1, 600),
        reply_tokens=st.integers(1, 600),
    ),
)
def test_fitted_prompts_and_lines_fit_into_any_context(context: int, dials: Dials) -> None:
    fitted = dials.fitted(context)
    room = context - fitted.reply_tokens - target_tokens(context)
    assert fitted.text_tokens + fitted.retrieved_tokens <= room
    for name in ("text_tokens", "retrieved_tokens", "reply_tokens"):
        assert 1 <= getattr(fitted, name) <= getattr(dials, name)
    larger = dials.fitted(context + 1)
    assert larger.text_tokens >= fitted.text_tokens
    if context >= 2 * TARGET_TOKENS:
        assert target_tokens(context) == TARGET_TOKENS
        # Budgets shrink no more than the context requires, except for rounding.
        whole = dials.text_tokens + dials.retrieved_tokens + dials.reply_tokens
        used = fitted.text_tokens + fitted.retrieved_tokens + fitted.reply_tokens
        assert used >= min(whole, context - TARGET_TOKENS - 2)


def test_a_line_longer_than_a_reply_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=400)
    document = Document("model router value token " * 3 + "\n" + "x\n" * 10, "text 1")
    lines = [line for line in document.text.split("\n") if line]
    text = "\n".join([*lines[1:], lines[0]])
    (case,) = next_line_cases([Document(text, "text 1")], 1)
    asked: list[int] = []

    def submit(request: Request) -> Generation:
        asked.append(request.sampling.max_new_tokens)
        return Engine.submit(engine, request)

    with Engine(model, tokenizer, max_waiting=64) as engine:
        writer = Writer(engine, ExpertChoice(()), None, SMALL)
        prompt = writer.encoder.next_line(case)
        monkeypatch.setattr(engine, "submit", submit)
        (answer,) = writer.answers([case])
    assert len(prompt.target_ids) > SMALL.reply_tokens
    assert asked[0] == len(prompt.target_ids) + 1
    assert answer.target_tokens == len(prompt.target_ids)


def test_a_prompt_is_not_cut_where_its_parts_fit() -> None:
    """The model sees all of the text before the line that its scaled-down budget allows."""
    model, tokenizer = tiny_model(max_position_embeddings=200)
    document = Document("def model(router):\n" * 40, "text 1")
    (case,) = next_line_cases([document], 1)
    with Engine(model, tokenizer, max_waiting=64) as engine:
        writer = Writer(engine, ExpertChoice(()), None, Dials())
        prompt = writer.encoder.next_line(case)
        (answer,) = writer.answers([case])
    assert answer.prompt_tokens == len(prompt.ids) > 20


def test_scores_of_answers() -> None:
    cases = next_line_cases([CODE, Document("Once upon a time\n" * 12, "text 1")], 2)
    answers = [
        Completion(case.target if place == 0 else "xyz", None, 4.0, 2, 10 + place, 3, 0.5)
        for place, case in enumerate(cases)
    ]
    scores = score_answers(cases, answers)
    assert (scores.loss, scores.exact, scores.infilled) == (2.0, [1.0, 0.0], None)
    assert scores.similarity[0] == 1.0 > scores.similarity[1]
    assert scores.chrf is not None and scores.prompt_tokens == 10.5
    filled = score_answers(cases, [replace(answer, infilled=cases[0].target) for answer in answers])
    assert filled.infilled == [1.0, 0.0]
    assert score_answers(cases[:1], answers[:1]).chrf is None
    assert completion.Dials().fitted(10_000) == Dials()
