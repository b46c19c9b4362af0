"""Read small YAML and TOML files written by users, and refuse those that only look small.

Ten lines of aliases of aliases can expand to billions of values. So the values are counted, with
aliases expanded, before any is constructed.
"""

import tomllib
from pathlib import Path
from typing import Any

import yaml

from deepseek.checkpoint.files import readable_file
from deepseek.errors import ConfigError, shown
from deepseek.terminal import visible

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
"""Maximum number of values in a file, with aliases expanded."""

MAX_DEPTH = 100
"""Maximum levels of nesting: the scanner's time for each token grows with them."""

MALFORMED = (
    yaml.YAMLError,
    AttributeError,  # a tag `!!timestamp` on other text
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
)
"""Errors of the parsers. `ValueError` is raised for impossible dates and for overlong numbers."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with at most `MAX_DEPTH` levels."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        self._check_depth()
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth()
        return bool(super().add_indent(column))

    def _check_depth(self) -> None:
        if self.flow_level + len(self.indents) >= MAX_DEPTH:
            raise RecursionError


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or TOML file.

    Raises:
        ConfigError: the file is missing, malformed, too large, or not a mapping of names.
    """
    path = readable_file(path, "a YAML or TOML file", ConfigError, MAX_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else parse_yaml(text)
    except MALFORMED as error:
        raise ConfigError(
            f"{path} is neither YAML nor TOML ({_cause(error)}); fix the file."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no fields; write them as `name: value`.")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {shown(key)} is no name of a field; write names as text.")
    return content


def read_mapping(text: str) -> dict[str, Any]:
    """Return a mapping that is written as YAML on the command line.

    Raises:
        ConfigError: it is not a mapping.
    """
    try:
        value = parse_yaml(text)
    except MALFORMED:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{shown(text)} is not a mapping; write it as '{{name: value}}'.")
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: it expands to more than `MAX_VALUES` values, or contains itself.
        RecursionError: it has more than `MAX_DEPTH` levels.
        yaml.YAMLError: it is malformed.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _num_values(root, {}) > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return the number of values that a node expands to.

    Args:
        node: the node.
        counted: numbers of the nodes that are counted already, by identity.
    """
    key = id(node)
    if key not in counted:
        counted[key] = MAX_VALUES + 1  # until counted, to refuse a node within itself
        total = 1
        for part in node.value if isinstance(node, yaml.CollectionNode) else ():
            for child in part if isinstance(part, tuple) else (part,):
                total += _num_values(child, counted)
        counted[key] = total
    return counted[key]


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return visible(" ".join(str(error).split())[:300])
