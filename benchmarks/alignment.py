"""Alignment runs of the benchmarks: a model for each method and seed, trained once."""

import argparse
from pathlib import Path

from deepseek.train.jobs.align import align
from deepseek.train.jobs.arguments import UNUSED


def align_once(
    options: argparse.Namespace,
    prefs: Path,
    method: str,
    name: str,
    *,
    new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Align the base with preference pairs, unless an earlier run has done so; an interrupted run
    is resumed, except by TRL.

    Args:
        options: of the command line: `base`, `work`, `layers`, `rollouts`, `rollout_size`,
            `learning_rate` and `target_kl`.
        prefs: the preference database.
        method: as in `deepseek align`; what it does not use is left out.
        name: name of the model, and of its folder in `work`.
        new_tokens: maximum tokens of an answer.
        temperature: of the sampling.
        seed: seed of the training; default: 0.

    Returns:
        The folders of the model and of its run.
    """
    out, run = options.work / name, options.work / f"{name}-run"
    sampling = {
        "new_tokens": new_tokens,
        "temperature": temperature,
        "target_kl": options.target_kl,
    }
    unused = UNUSED.get(method, ())
    align(
        options.base,
        prefs=prefs,
        name=name,
        method=method,
        out=out,
        run_folder=run,
        layers=options.layers,
        rollouts=options.rollouts,
        rollout_size=options.rollout_size,
        learning_rate=options.learning_rate,
        seed=seed,
        **{field: value for field, value in sampling.items() if field not in unused},
    )
    return out, run
