"""Example prompts of an expert: taken from held-out text, and only those that work."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import TokenShards
from deepseek.data.text.document import Document, conversation
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice
from deepseek.evaluate.prompts import (
    Candidate,
    WorkingPrompt,
    _fits,
    _request,
    best,
    candidates,
    conversations,
)

ANSWER = "It lies in the third drawer."


def candidate(number: int) -> Candidate:
    return Candidate(WorkingPrompt("chat", f"question {number}"), ANSWER)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.integers(1, 4))
def test_only_prompts_that_the_expert_alone_answers_are_taken(rows, count: int) -> None:
    tried = [candidate(number) for number in range(len(rows))]
    ours = [ANSWER if expert else "No idea at all?" for expert, _ in rows]
    base = [ANSWER if alone else "No idea at all?" for _, alone in rows]
    right = [
        one.prompt for one, (expert, alone) in zip(tried, rows, strict=True) if expert and not alone
    ]
    assert best(tried, ours, base, count) == right[:count]


def test_a_short_context_sees_the_end_of_a_text_and_no_control_token() -> None:
    model, tokenizer = tiny_model()  # of 64 tokens
    end = tokenizer.eos_token
    prompt = WorkingPrompt("text", f"value = '{end}'\n" * 40)
    with Engine(model, tokenizer, max_waiting=64) as engine:
        request = _request(engine, prompt, ExpertChoice(()))
        assert _fits(engine, prompt)
        assert not _fits(engine, WorkingPrompt("chat", "router " * 200))
        answer = "".join(event.text for event in engine.submit(request))
    assert tokenizer.eos_token_id not in request.prompt_ids
    assert tokenizer.decode(request.prompt_ids).endswith(f"{end}'\n")
    assert "\n" not in answer


def test_larger_gains_come_first() -> None:
    tried = [candidate(0), candidate(1)]
    ours = ["It lies in the third.", ANSWER]
    base = ["It lies somewhere.", "No idea at all?"]
    assert best(tried, ours, base, 2) == [tried[1].prompt, tried[0].prompt]


def test_an_answer_that_is_cut_short_can_be_right() -> None:
    tried = [Candidate(WorkingPrompt("chat", "q"), "one two three " * 40)]
    assert best(tried, ["one two three " * 8], ["nothing of it"], 3) == [tried[0].prompt]


def test_candidates_are_questions_and_beginnings_of_held_out_documents(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    turns = [
        {"role": "user", "content": "Where is <it>?"},
        {"role": "assistant", "content": ANSWER},
    ]
    first = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}]
    longer = [*first, *turns]
    code = "".join(f"value_{number} = router({number})\n" for number in range(40))
    documents = [
        conversation(turns, "here", "a"),
        conversation(longer, "here", "b"),
        Document(code, "src/router.py", "code"),
    ]
    shards = TokenShards.build(documents, tokenizer, tmp_path / "shards")
    asked = [("Where is <it>?", ANSWER), ("And now?", "No.")]
    assert sorted(conversations(shards, tokenizer)) == sorted(asked)
    found = candidates(shards, tokenizer)
    assert Candidate(WorkingPrompt("chat", "Where is <it>?"), ANSWER) in found
    texts = [one for one in found if one.prompt.kind == "text"]
    assert texts
    for one in texts:
        assert one.prompt.text.startswith("file: src/router.py\n\n")
        assert one.prompt.text.endswith("\n")
        assert one.prompt.text.removeprefix("file: src/router.py\n\n") + one.answer in code
