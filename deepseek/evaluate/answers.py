"""The text of a generation that is to be scored."""

from collections.abc import Callable

from deepseek.engine.generation import Generation
from deepseek.errors import ConfigError


def answer_text(generation: Generation, check: Callable[[], None] = lambda: None) -> str:
    """Wait for the end of a generation and return its text.

    Args:
        generation: a running request.
        check: called after each token; may raise an error. Default: does nothing.

    Raises:
        ConfigError: it failed or was cancelled, so that its text is not an answer of the model.
    """
    text = ""
    for event in generation:
        check()
        text += event.text
        if event.finish_reason in ("error", "cancelled"):
            cause = event.error or "the request was cancelled; evaluate again"
            raise ConfigError(f"An answer could not be scored: {cause.rstrip('.')}.")
    return text
