"""`deepseek eval`: compare held-out loss before and after plugging experts, or compare an expert
with rival methods.
"""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Device, DryRun, Json, Precision, expert_packs, refuse_ignored
from deepseek.cli.output import echo, print_table
from deepseek.device.names import Dtype
from deepseek.errors import ConfigError

BASE = "smollm2-135m"
CASES = 200

TOKENS = 8192
"""Tokens of a text whose rows no training has chosen."""


def evaluate(
    experts: Annotated[
        str,
        typer.Argument(
            help="Experts to plug: names or pack files, comma-separated; 'all': every trained one."
        ),
    ] = "all",
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a known name, a folder, a GGUF file or a hub id; default: "
            f"that of the named experts, with 'all' {BASE}."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Additional text: a folder, .jsonl, .jsonl.gz or .parquet file; repeatable."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=512,
            help="Tokens of each text to evaluate on; default: of an expert's text those that its "
            "training reported on, of others 8,192.",
        ),
    ] = None,
    human_eval: Annotated[
        int | None,
        typer.Option(
            min=0, max=164, help="Number of HumanEval problems to solve and run; default: 0."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare one expert with: rag (retrieval), lora, full; comma-separated."),
    ] = None,
    cases: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"With --against: number of held-out lines to write; default: {CASES}."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Print the held-out loss of the base and of the plugged experts on each expert's own held-out
    text, on that of other trained experts, on public prose and code, and on your text. Generated
    code (HumanEval) runs in a sandboxed process.

    With --against: compare the base, retrieval, the expert, both together, LoRA and full
    fine-tuning by the lines that they write of the expert's held-out text. LoRA and full
    fine-tuning train as long as the expert did. If interrupted, the same command resumes it.
    """
    if dry_run and as_json:
        raise ConfigError("--dry-run prints an estimate, which has no JSON; leave --json out.")
    if against is not None:
        if as_json:
            raise ConfigError("--against writes result.json itself; leave --json out.")
        refuse_ignored(
            "goes with an evaluation without --against",
            base=base,
            data=data or None,
            tokens=tokens,
            human_eval=human_eval,
        )
        from deepseek.cli.against import print_against

        print_against(experts, against, cases or CASES, device, dtype, dry_run)
        return
    refuse_ignored("goes with --against", cases=cases)
    _compare(experts, base, data or [], tokens, human_eval, device, dtype, as_json, dry_run)


def _compare(
    experts: str,
    base: str | None,
    data: list[Path],
    tokens: int | None,
    human_eval: int | None,
    device: str,
    dtype: Dtype,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Print the losses of the base and of plugged experts, with the arguments of `evaluate`."""
    from deepseek.checkpoint.files import existing_path
    from deepseek.cli.expert_base import base_of
    from deepseek.cli.shapes import print_json
    from deepseek.cli.table import comparison_table, evaluation
    from deepseek.engine.load import load
    from deepseek.engine.request import ExpertChoice
    from deepseek.evaluate.code import human_eval_problems, pass_at_1
    from deepseek.evaluate.quality import collected, compare, estimated, expert_texts, trained_here
    from deepseek.packs.library import packs_for
    from deepseek.train.loop.progress import ProgressBar

    for path in data:
        existing_path(path)  # before anything is loaded
    base = base or base_of(experts) or BASE
    problems = human_eval_problems(human_eval) if human_eval else []
    model, tokenizer = load(base, experts=expert_packs(experts, base), device=device, dtype=dtype)
    plugged_names = [info.name for info in model.experts.list()]
    namesakes = [name for name in plugged_names if not trained_here(model.experts.manifest(name))]
    for name in namesakes:
        echo(
            f"warning: the run {name} of this home trained another pack of that name; its "
            "held-out text is left out.",
            error=True,
        )
    expert_names = dict.fromkeys((*plugged_names, *packs_for(base)[0]))
    texts_of_experts = expert_texts(
        [name for name in expert_names if name not in namesakes], plugged_names
    )
    with collected(tokenizer, data, texts_of_experts) as texts, ProgressBar() as progress:
        if dry_run:
            estimate = estimated(model, texts, tokens or TOKENS, as_reported=not tokens)
            solved = f"; {len(problems)} problems to solve twice, not counted" if problems else ""
            echo(f"{len(texts)} texts: {estimate}{solved}")
            return
        rows = list(compare(model, texts, tokens or TOKENS, progress, as_reported=not tokens))
        choices = (ExpertChoice(()), ExpertChoice()) if problems else ()
        pass_rates = [
            pass_at_1(model, tokenizer, problems, progress=progress, experts=choice)
            for choice in choices
        ]
    if as_json:
        print_json(evaluation(base, plugged_names, rows, pass_rates, len(problems)))
        return
    print_table(comparison_table(rows))
    if problems:
        echo(
            "HumanEval pass@1 ({} problems): base {:.1%}, plugged {:.1%}".format(
                len(problems), *pass_rates
            )
        )
