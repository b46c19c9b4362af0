"""Generate mathematical problems with worked answers, each checked by a second computation."""

import random
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from deepseek.data.text.document import Document, conversation
from deepseek.errors import DataError

MOST_REPEATS = 1_000
"""Consecutive draws of known problems after which a kind counts as used up."""


@dataclass(frozen=True)
class Problem:
    """Question, steps of the solution, answer, and whether a second computation agrees."""

    question: str
    steps: tuple[str, ...]
    answer: str
    checked: bool

    def document(self, name: str) -> Document:
        """Return the problem as a conversation with this document name."""
        solution = "\n".join([*self.steps, f"The answer is {self.answer}."])
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": solution},
        ]
        return conversation(messages, name, name)


Kind = Callable[[random.Random], Problem]
"""Draws a problem of one kind."""


def problems(count: int, seed: int = 0) -> Iterator[Document]:
    """Yield `count` distinct problems, cycling through all kinds. Each kind has several hundred
    thousand or more.

    Args:
        count: number of problems.
        seed: seed of the problems; default: 0.

    Raises:
        ArithmeticError: a check fails, which is a bug in a generator.
        DataError: there are not so many problems.
    """
    draw = random.Random(seed)  # noqa: S311 - exercises, not secrets
    questions: set[str] = set()
    while len(questions) < count:
        problem = _new_problem(KINDS[len(questions) % len(KINDS)], draw, questions)
        if not problem.checked:
            raise ArithmeticError(f"{problem.question} {problem.answer} fails its check")
        questions.add(problem.question)
        yield problem.document(f"mathematics:{seed}:{len(questions)}")


def _new_problem(kind: Kind, draw: random.Random, questions: AbstractSet[str]) -> Problem:
    """Return a problem of a kind whose question was not asked before.

    Args:
        kind: draws a problem.
        draw: source of random numbers.
        questions: questions asked before.

    Raises:
        DataError: almost all problems of the kind were asked before.
    """
    for _ in range(MOST_REPEATS):
        problem = kind(draw)
        if problem.question not in questions:
            return problem
    raise DataError(
        f"There are no more than about {len(questions)} different problems; ask for fewer."
    )


def linear_equation(draw: random.Random) -> Problem:
    """a x + b = c over the integers."""
    a = draw.randint(2, 30)
    x = draw.randint(-60, 60)
    b = draw.randint(1, 500)
    c = a * x + b
    steps = (
        f"Subtract {b} from both sides: {a}x = {c} - {b} = {c - b}.",
        f"Divide by {a}: x = {c - b}/{a} = {x}.",
    )
    return Problem(f"Solve for x: {a}x + {b} = {c}.", steps, f"x = {x}", Fraction(c - b, a) == x)


def long_multiplication(draw: random.Random) -> Problem:
    """A product, digit by digit."""
    a = draw.randint(12, 9_999)
    b = draw.randint(12, 99)
    tens, ones = divmod(b, 10)
    parts = a * tens * 10, a * ones
    steps = (
        f"{a} * {b} = {a} * {tens * 10} + {a} * {ones}.",
        f"{a} * {tens * 10} = {parts[0]} and {a} * {ones} = {parts[1]}.",
        f"{parts[0]} + {parts[1]} = {sum(parts)}.",
    )
    return Problem(f"What is {a} times {b}?", steps, str(sum(parts)), sum(parts) == a * b)


def fraction_sum(draw: random.Random) -> Problem:
    """The sum of two fractions, reduced."""
    a = draw.randint(1, 40)
    c = draw.randint(1, 40)
    b = draw.randint(2, 40)
    d = draw.randint(2, 40)
    lcm = b * d // gcd(b, d)
    numerator = a * (lcm // b) + c * (lcm // d)
    factor = gcd(numerator, lcm)
    total = Fraction(a, b) + Fraction(c, d)
    steps = (
        f"The common denominator of {b} and {d} is {lcm}.",
        f"{a}/{b} = {a * (lcm // b)}/{lcm} and {c}/{d} = {c * (lcm // d)}/{lcm}.",
        f"Their sum is {numerator}/{lcm}; divided by {factor}, "
        f"{numerator // factor}/{lcm // factor}.",
    )
    is_correct = (numerator // factor, lcm // factor) == (total.numerator, total.denominator)
    return Problem(
        f"Add {a}/{b} and {c}/{d}, and reduce the result.", steps, str(total), is_correct
    )


def percentage(draw: random.Random) -> Problem:
    """A price after a discount."""
    price = draw.randint(1, 9_999) * 100
    percent = draw.randint(1, 95)
    discount = price * percent // 100
    steps = (
        f"{percent} % of {price} is {price} * {percent} / 100 = {discount}.",
        f"{price} - {discount} = {price - discount}.",
    )
    is_correct = Fraction(price) * (1 - Fraction(percent, 100)) == price - discount
    question = f"A machine costs {price} euros. What does it cost after a discount of {percent} %?"
    return Problem(question, steps, f"{price - discount} euros", is_correct)


def greatest_divisor(draw: random.Random) -> Problem:
    """Euclid's algorithm."""
    factor = draw.randint(2, 60)
    a = factor * draw.randint(5, 150)
    b = factor * draw.randint(2, 140)
    question = f"What is the greatest common divisor of {a} and {b}?"
    steps = []
    x = a
    y = b
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    return Problem(
        question, (*steps, f"The last remainder that is not 0 is {x}."), str(x), x == gcd(a, b)
    )


def arithmetic_series(draw: random.Random) -> Problem:
    """The sum of an arithmetic series."""
    first = draw.randint(1, 500)
    step = draw.randint(2, 50)
    count = draw.randint(5, 50)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    steps = (
        f"The last of the {count} terms is {first} + {count - 1} * {step} = {last}.",
        f"The sum is {count} * ({first} + {last}) / 2 = {total}.",
    )
    question = f"A sequence begins with {first} and grows by {step}. What is the sum of its first {count} terms?"
    return Problem(question, steps, str(total), total == sum(range(first, last + 1, step)))


def derivative(draw: random.Random) -> Problem:
    """The slope of a cubic polynomial at a point."""
    a = draw.randint(2, 30)
    b = draw.randint(2, 30)
    c = draw.randint(2, 99)
    x = draw.randint(1, 12)
    slope = 3 * a * x * x + 2 * b * x + c
    steps = (
        f"f'(x) = {3 * a}x^2 + {2 * b}x + {c}.",
        f"f'({x}) = {3 * a} * {x * x} + {2 * b} * {x} + {c} = {slope}.",
    )

    def f(point: int) -> int:
        return a * point**3 + b * point**2 + c * point

    # The central difference of a cubic with step 1 exceeds the derivative by its coefficient a.
    is_correct = Fraction(f(x + 1) - f(x - 1), 2) - a == slope
    return Problem(
        f"f(x) = {a}x^3 + {b}x^2 + {c}x. What is f'({x})?", steps, str(slope), is_correct
    )


KINDS: tuple[Kind, ...] = (
    linear_equation,
    long_multiplication,
    fraction_sum,
    percentage,
    greatest_divisor,
    arithmetic_series,
    derivative,
)
