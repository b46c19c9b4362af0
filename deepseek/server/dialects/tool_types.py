"""Types of tools: a client can offer functions, and there are no tools that run on the server."""

from typing import Any

SERVER_TOOLS = (
    "code_execution",
    "code_interpreter",
    "file_search",
    "image_generation",
    "mcp",
    "tool_search",
    "web_fetch",
    "web_search",
)
"""How the types of tools begin that OpenAI's or Anthropic's servers run; a version may follow."""


def no_server_tool(kind: Any) -> Any:
    """Return the unvalidated type of a tool.

    Args:
        kind: the type, such as "function".

    Raises:
        ValueError: the tool would have to run on the server.
    """
    if isinstance(kind, str) and kind.startswith(SERVER_TOOLS):
        raise ValueError(
            f"the tool {kind} would run on the server, which has none; leave it out, or define a "
            "function"
        )
    return kind
