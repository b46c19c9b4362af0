"""Generated bodies are cut, compared and run as they should be."""

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from deepseek.data.functions import Function
from deepseek.errors import DataError
from deepseek.evaluate.code import cut_body, human_eval, passes, score_bodies

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
    ],
)
def test_answers_pass_by_running_their_tests(answer: str, passed: bool) -> None:
    assert passes(PROBLEM, answer) is passed


def test_the_written_solutions_of_human_eval_pass() -> None:
    problems = list(human_eval().values())
    assert len(problems) == 164
    for problem in problems[::40]:
        assert passes(problem, problem["canonical_solution"]), problem["task_id"]
        assert not passes(problem, "    return None\n"), problem["task_id"]


def test_a_body_ends_where_its_indentation_does() -> None:
    header = '    def f(self):\n        """What."""\n'
    assert cut_body(header, "        a = 1\n\n        return a\n    def g(self):\n        pass") == (
        "        a = 1\n\n        return a"
    )


class Parrot:
    """Writes what it is told, token by token, after any prompt."""

    device = torch.device("cpu")

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def generate(self, prompt: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([prompt, torch.tensor([self.ids])], dim=1)


def test_scores_of_a_perfect_and_of_a_useless_answer() -> None:
    tokenizer = tiny_tokenizer()
    body = "    total = a + b + c + d\n    return total * 2"
    function = Function("f", 'def f(a, b, c, d):\n    """Sum."""\n', body, (), "m.py")
    perfect = score_bodies(
        Parrot(tokenizer(body + "\nx = 1", add_special_tokens=False).input_ids), tokenizer, [function]
    )
    assert (perfect.bleu, perfect.exact, perfect.parses) == (pytest.approx(100), 1.0, 1.0)
    useless = score_bodies(Parrot(tokenizer("    ((", add_special_tokens=False).input_ids), tokenizer, [function])
    assert useless.bleu < 5 and (useless.exact, useless.parses) == (0.0, 0.0)
    with pytest.raises(DataError, match="no documented functions"):
        score_bodies(Parrot([]), tokenizer, [])
