"""The showcase line of an expert is chosen by a fixed rule."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek.evaluate.cases import Case
from deepseek.evaluate.completion import Completion
from deepseek.evaluate.showcase import largest_gain


def answer(written: str, nats: float) -> Completion:
    return Completion(written, None, nats, 4, 10, 4, 0.1)


def case(number: int) -> Case:
    return Case("f.py", "code", number, "", "", "right()")


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.floats(0, 20), st.floats(0, 20)),
        min_size=1,
        max_size=12,
    )
)
def test_lines_that_only_the_expert_writes_come_first_then_the_largest_gain(rows) -> None:
    before = [answer("right()" if base else "wrong()", nats) for base, _, nats, _ in rows]
    after = [answer("right()" if expert else "wrong()", nats) for _, expert, _, nats in rows]
    chosen = largest_gain([case(number) for number in range(len(rows))], before, after)
    only = [not base and expert for base, expert, _, _ in rows]
    gains = [nats - later for _, _, nats, later in rows]
    assert only[chosen] == any(only)
    assert gains[chosen] == max(
        gain for gain, alone in zip(gains, only, strict=True) if alone == only[chosen]
    )
