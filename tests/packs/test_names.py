"""Valid and invalid names of experts, wherever one is given."""

from collections.abc import Callable

import pytest
from pydantic import TypeAdapter, ValidationError

from deepseek.errors import ConfigError
from deepseek.packs.names import valid_name
from deepseek.server.body import ExpertName
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.merge import merge_experts

FILE = "merged.safetensors"

GIVEN: dict[str, Callable[[], object]] = {
    "a name": lambda: valid_name(FILE),
    "the command line and Python": lambda: ExpertArguments.read(name=FILE, from_folder="."),
    "a merged expert": lambda: merge_experts("one", "two", FILE),
    "a server's request": lambda: TypeAdapter(ExpertName).validate_python(FILE),
}


@pytest.mark.parametrize("place", GIVEN)
def test_the_name_of_a_file_is_no_name(place: str) -> None:
    with pytest.raises((ConfigError, ValidationError, ValueError), match="is the name of a file"):
        GIVEN[place]()


@pytest.mark.parametrize("name", ["safetensors", "merged.safetensors.v2", "v1.2", "a"])
def test_other_dots_are_allowed(name: str) -> None:
    assert valid_name(name) == name
