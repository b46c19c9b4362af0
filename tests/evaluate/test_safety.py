"""Pass rates with confidence intervals; helpfulness agrees with an independent computation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import cross_entropy

from deepseek.data.text.loader import Batch
from deepseek.errors import ConfigError
from deepseek.evaluate.safety import PassRate, helpfulness, safety
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilsons(counts: tuple[int, int]) -> None:
    passed, answers = counts
    expected = binomtest(passed, answers).proportion_ci(method="wilson")
    assert PassRate(passed, answers).interval == pytest.approx(
        (expected.low, expected.high), abs=1e-6
    )


def tiny() -> DeepSeekModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return DeepSeekModel(ModelConfig(vocab_size=len(tiny_tokenizer()), **sizes)).eval()


def test_every_prompt_is_answered_once_and_judged() -> None:
    prompts = [({"role": "user", "content": f"the expert {n}"},) for n in range(40)]
    seen: list[str] = []

    def judge(asked: list[str], answers: list[str]) -> list[float]:
        seen.extend(asked)
        return [0.9 if n % 4 else 0.1 for n in range(len(answers))]

    found = safety(tiny(), tiny_tokenizer(), prompts, judge=judge, new_tokens=4)
    assert (found.passed, found.answers, len(found.answered)) == (30, 40, 40)
    assert seen == [prompt[0]["content"] for prompt in prompts]
    again = safety(tiny(), tiny_tokenizer(), prompts, judge=judge, new_tokens=4)
    assert again.answered == found.answered, "the same seed gives the same answers"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"new_tokens": 2040}, "shorten it"),
        ({"judge": lambda *_: [1.0]}, "1 scores for 2 answers"),
    ],
)
def test_wrong_input_is_one_sentence(given: dict[str, object], said: str) -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    prompts = [[{"role": "user", "content": "the model"}]] * 2
    with pytest.raises(ConfigError, match=said):
        safety(model, tokenizer, prompts, **{"new_tokens": 4, **given})
    with pytest.raises(ConfigError, match="at least one conversation"):
        safety(model, tokenizer, [])


def test_helpfulness_counts_the_tokens_ranked_first() -> None:
    model = tiny()
    ids = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    batch = Batch(ids, labels, torch.arange(20).expand(3, 20), torch.arange(3))
    found = helpfulness(model, [batch, batch])
    logits = model(ids).logits.detach()[:, :-1]
    assert found.tokens == 2 * 3 * 19
    assert found.points == pytest.approx(
        100 * float((logits.argmax(-1) == ids[:, 1:]).float().mean()), abs=2.0
    )
    assert found.loss == pytest.approx(
        float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())), abs=0.01
    )
