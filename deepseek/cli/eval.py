"""`deepseek eval`: compare held-out loss before and after plugging experts, or an expert with its
rivals.
"""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Base, expert_packs


def evaluate(
    experts: Annotated[
        str,
        typer.Argument(
            help="Names or pack files of experts to plug, separated by commas; 'all' = every trained one."
        ),
    ] = "all",
    base: Base = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Further text: a folder, .jsonl or .parquet file; may be repeated."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=512, help="Tokens of each text to evaluate on.")
    ] = 8192,
    human_eval: Annotated[
        int, typer.Option(min=0, max=164, help="Problems of HumanEval to answer and run.")
    ] = 0,
    against: Annotated[
        str,
        typer.Option(
            help="Compare one expert with: rag (retrieval), lora, full; separated by commas."
        ),
    ] = "",
    cases: Annotated[
        int, typer.Option(min=1, help="With --against: lines of held-out text to write.")
    ] = 200,
) -> None:
    """Print the loss of the base and of the plugged set: on each expert's own held-out text, on
    that of other trained experts, on public prose and code, and on text of yours. Code that the
    model writes runs in a sandboxed process.

    With --against: how well the base, retrieval, the expert, both, LoRA and full fine-tuning write
    lines of the text that the expert's run held out, the last two trained as long as the expert.
    The same command goes on where it was.
    """
    if against:
        from deepseek.cli.against import print_against

        print_against(experts, against, cases)
        return
    from rich.console import Console

    from deepseek.cli.table import comparison_table
    from deepseek.engine.load import load
    from deepseek.engine.request import ExpertChoice
    from deepseek.evaluate.code import human_eval_problems, pass_at_1
    from deepseek.evaluate.quality import collected, compare, expert_texts
    from deepseek.packs.library import installed
    from deepseek.train.loop.progress import ProgressBar

    problems = human_eval_problems(human_eval) if human_eval else []
    model, tokenizer = load(base, experts=expert_packs(experts, base))
    plugged = [info.name for info in model.experts.list()]
    known = expert_texts(
        [*plugged, *(name for name in installed() if name not in plugged)], plugged
    )
    with collected(tokenizer, data or [], known) as texts, ProgressBar() as progress:
        rows = list(compare(model, texts, tokens, progress))
        both = (ExpertChoice(()), ExpertChoice()) if problems else ()
        passed = [
            pass_at_1(model, tokenizer, problems, progress=progress, experts=who) for who in both
        ]
    Console().print(comparison_table(rows))
    if problems:
        print(
            "HumanEval pass@1 ({} problems): base {:.1%}, plugged {:.1%}".format(
                len(problems), *passed
            )
        )
