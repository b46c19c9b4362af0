"""Evaluation as a stage of a recipe: held-out loss of texts, and function bodies written for code."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deepseek.checkpoint.store import write_json
from deepseek.data import read_folder
from deepseek.data.builders.functions import documented_functions
from deepseek.engine.load import load
from deepseek.evaluate.code import human_eval_problems, pass_at_1, score_bodies
from deepseek.evaluate.quality import collected, compare
from deepseek.train.loop.progress import ProgressBar


def evaluate_stage(
    base: str,
    *,
    run_folder: Path,
    data: Sequence[str] = (),
    experts: Sequence[str] = (),
    functions: str | None = None,
    most_functions: int = 20,
    human_eval: int = 0,
    tokens: int = 8192,
    quiet: bool = False,
    **_: object,
) -> None:
    """Write the losses of a model with `experts` on `data` and on public text, and BLEU on `functions`, a code folder,
    and pass@1 on the first `human_eval` problems of HumanEval.

    The result goes to `result.json` in `run_folder`; where it is there already, nothing is done. What
    recipes give to every stage and this one has no use for, its name, is left alone.
    """
    if (run_folder / "result.json").is_file():
        return
    started = time.monotonic()
    figures: dict[str, float] = {}
    model, tokenizer = load(base, experts=experts)
    with ProgressBar(quiet=quiet) as progress:
        with collected(tokenizer, [Path(path) for path in data], []) as texts:
            for row in compare(model, texts, tokens, progress):
                figures |= {f"loss.{row.text}": row.before}
                figures |= {f"loss_with_experts.{row.text}": row.after} if experts else {}
        if functions:
            chosen = documented_functions(read_folder(functions))[:most_functions]
            scores = score_bodies(model, tokenizer, chosen, progress=progress)
            figures |= {f"bodies.{key}": value for key, value in asdict(scores).items()}
        if human_eval:
            problems = human_eval_problems(human_eval)
            figures["human_eval.pass_at_1"] = pass_at_1(model, tokenizer, problems, progress=progress)
    figures["seconds"] = time.monotonic() - started
    write_json(run_folder / "result.json", {"stage": "eval", "model": base, "figures": figures, "data": {}})
