"""`deepseek chat`: talk to a model in the terminal, and plug experts while it lives."""

import typer

from deepseek.cli.options import Arm, Base, Experts, MaxTokens, Seed, Temperature, TopP, arming, expert_packs

app = typer.Typer(add_completion=False)


@app.command()
def chat(
    base: Base = "smollm2-135m",
    experts: Experts = "all",
    arm: Arm = "auto",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.9,
    seed: Seed = None,
) -> None:
    """Talk to a model; /help lists what else can be typed. Each token has the colour of the expert that spoke."""
    from rich.console import Console

    from deepseek.cli.session import ChatSession
    from deepseek.infer.load import load
    from deepseek.infer.sampler import Sampling

    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    console = Console()
    with console.status(f"loading {base}"):
        model, tokenizer = load(base, experts=expert_packs(experts, base))
    model.experts.arm(arming(arm))
    ChatSession(model, tokenizer, sampling, console).run()
