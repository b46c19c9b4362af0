"""The text of a generation that is to be scored."""

from deepseek.engine.generation import Generation
from deepseek.errors import ConfigError


def answer_text(generation: Generation) -> str:
    """Wait for the end of a generation and return its text.

    Args:
        generation: a running request.

    Raises:
        ConfigError: it failed or was cancelled, so that its text is not an answer of the model.
    """
    text = ""
    for event in generation:
        text += event.text
        if event.finish_reason in ("error", "cancelled"):
            cause = event.error or "the request was cancelled; evaluate again"
            raise ConfigError(f"An answer could not be scored: {cause.rstrip('.')}.")
    return text
