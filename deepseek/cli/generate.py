"""`deepseek generate`: complete one prompt."""

import sys
from typing import Annotated

import typer

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


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to complete, or '-' for standard input.")],
    base: Base = "smollm2-135m",
    experts: Experts = "",
    arm: Arm = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer PROMPT as a question instead of completing it.")
    ] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    int8: Int8 = True,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Print the model's completion of PROMPT, each token in the colour of the expert that wrote
    it.
    """
    from rich.console import Console

    from deepseek.cli.speak import Palette, legend, open_engine, speak
    from deepseek.engine.request import Request
    from deepseek.engine.sampler import Sampling
    from deepseek.errors import ConfigError
    from deepseek.text.chat_template import encode_prompt, user_ids
    from deepseek.text.tokenizer import encode_document

    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    text = read_prompt() if prompt == "-" else prompt
    with open_engine(base, experts, arm, int8=int8, device=device, dtype=dtype) as engine:
        messages = [{"role": "user", "content": text}]
        ids = (
            encode_prompt(engine.tokenizer, messages)
            if chat
            else encode_document(engine.tokenizer, text)
        )
        if not ids:
            raise ConfigError("PROMPT is empty; give some text.")
        question_ids = user_ids(engine.tokenizer, messages) if chat else None
        palette = Palette(info.name for info in engine.experts())
        _, shares = speak(
            engine, Request(tuple(ids), sampling, user_ids=question_ids), Console(), palette
        )
        if engine.experts():
            Console(stderr=True).print(legend(shares, palette))


def read_prompt() -> str:
    """Return the text on standard input.

    Raises:
        DataError: it is not UTF-8.
    """
    from deepseek.errors import DataError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"Standard input is not UTF-8 (byte {error.start}); convert it with iconv -t utf-8."
        ) from None
