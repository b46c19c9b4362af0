"""lm-eval gives the same scores through the server as with the model in its own process."""

import random

import pytest
from live_server import Live
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

WORDS = [
    "the",
    "router",
    "returns",
    "value",
    "of",
    "an",
    "expert",
    "when",
    "its",
    "gate",
    "fires",
    "nothing",
    "at",
    "all",
]


def pairs(count: int) -> list[Instance]:
    """Return texts with continuations, of many lengths."""
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    given = [("", text(40)), *((text(60), f" {text(30)}") for _ in range(count - 1))]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(given)]


@pytest.fixture(scope="module")
def served(server: Live) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=server.service.settings.base,
        tokenizer_backend="huggingface",
        max_length=768,
        num_concurrent=4,
    )


def test_loglikelihoods_are_those_of_the_model_in_process(
    server: Live, served: LocalCompletionsAPI
) -> None:
    requests = pairs(40)
    alone = HFLM(
        pretrained=server.engine.model,
        tokenizer=server.engine.tokenizer,
        batch_size=8,
        max_length=768,
    )
    expected, found = alone.loglikelihood(requests), served.loglikelihood(requests)
    assert (
        max(abs(one - other) for (one, _), (other, _) in zip(expected, found, strict=True)) <= 1e-3
    )
    assert [greedy for _, greedy in expected] == [greedy for _, greedy in found]
    assert len({round(value, 3) for value, _ in found}) == len(requests)
