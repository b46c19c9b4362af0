"""`deepseek chat`: chat with a model in the terminal, and plug experts meanwhile."""

from deepseek.cli.options import (
    Arm,
    Base,
    Device,
    Experts,
    Int8,
    MaxTokens,
    Precision,
    Seed,
    Temperature,
    TopP,
)


def chat(
    base: Base = "smollm2-135m",
    experts: Experts = "all",
    arm: Arm = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.9,
    seed: Seed = None,
    int8: Int8 = True,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Chat with a model; /help lists the commands. Each token has the colour of the expert that
    wrote it.
    """
    from rich.console import Console

    from deepseek.cli.session import ChatSession
    from deepseek.cli.speak import open_engine
    from deepseek.engine.sampler import Sampling

    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with open_engine(base, experts, arm, int8=int8, device=device, dtype=dtype) as engine:
        ChatSession(engine, sampling, Console()).run()
