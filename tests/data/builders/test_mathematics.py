"""Mathematical problems: all kinds, all different, every check passes, and a wrong answer fails."""

import random

import pytest

from deepseek.data.builders import mathematics
from deepseek.data.builders.mathematics import KINDS, Problem, problems
from deepseek.errors import DataError


def test_problems_are_different_and_the_same_for_a_seed() -> None:
    made = list(problems(700, seed=3))
    assert len({document.text for document in made}) == 700
    assert made == list(problems(700, seed=3)) != list(problems(700, seed=4))
    question, answer = made[0].messages()
    assert question["role"] == "user" and answer["content"].splitlines()[-1].startswith(
        "The answer is x = "
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_its_check(
    kind: "mathematics.Callable[[random.Random], Problem]",
) -> None:
    for seed in range(200):
        problem = kind(random.Random(seed))
        assert problem.checked, problem
        assert problem.answer.removeprefix("x = ").removesuffix(" euros") in problem.steps[-1]


def test_a_wrong_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "KINDS", (lambda draw: Problem("1 + 1?", (), "3", False),))
    with pytest.raises(ArithmeticError, match="fails its check"):
        next(problems(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_far_more_problems_than_are_asked_for(
    kind: "mathematics.Callable[[random.Random], Problem]",
) -> None:
    """Of n draws from N problems, about n² / 2N are repeats, so N is at least half a million."""
    draw = random.Random(0)
    questions = {kind(draw).question for _ in range(10_000)}
    assert len(questions) > 10_000 - 100


def test_a_kind_that_is_used_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (lambda draw: Problem(f"{draw.randint(1, 5)} + 1?", (), "3", True),)
    monkeypatch.setattr(mathematics, "KINDS", few)
    assert len(list(problems(5))) == 5
    with pytest.raises(DataError, match="no more than about 5 different problems"):
        list(problems(6))
