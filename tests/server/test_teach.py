"""A client may set exactly the training arguments that `train_expert` declares, and all reach the
command.
"""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from deepseek.server.app import create_app
from deepseek.server.lesson import Lesson
from deepseek.server.routes.teach import Teacher, command, lesson_fields, lines
from deepseek.server.schema import TAUGHT, TeachRequest
from deepseek.server.service import Service
from deepseek.server.settings import Settings
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.declaration import arguments_of

TEXT = {"name": "x", "kind": "folder"}


def another_value(name: str) -> Any:
    argument = arguments_of(ExpertArguments)[name]
    fitting = [
        value
        for value in (*(argument.declared.examples or ()), *argument.choices)
        if value != argument.default
    ]
    values = {
        int: (argument.default if isinstance(argument.default, int) else 6) + 1,
        float: 0.25,
        str: "words",
    }
    return fitting[0] if fitting else values[argument.kind]


def words(**given: Any) -> list[str]:
    return command(
        Settings(base="base"),
        TeachRequest.model_validate({**TEXT, **given}),
        Path("/text"),
        Path("/x.safetensors"),
    )


@pytest.mark.parametrize("name", TAUGHT)
def test_an_argument_reaches_the_command(name: str) -> None:
    value = another_value(name)
    assert f"--{name.replace('_', '-')}={value}" in words(**{name: value})


def test_the_device_is_the_server_s_unless_named() -> None:
    settings = Settings(base="base", device="cuda:1")
    for given, device in (({}, "cuda:1"), ({"device": "cpu"}, "cpu")):
        wanted = TeachRequest.model_validate({**TEXT, **given})
        assert f"--device={device}" in command(settings, wanted, Path("/t"), Path("/x"))


def test_defaults_are_left_to_the_declaration() -> None:
    given = ["--base=base", "--from-folder=/text", "--out=/x.safetensors", "--name=x"]
    assert words() == ["-m", "deepseek", "expert", "train", *given]


@pytest.mark.parametrize("name", sorted(arguments_of(ExpertArguments).keys() - {*TAUGHT, "name"}))
def test_what_names_files_or_the_base_is_the_server_s(name: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        words(**{name: "/etc"})


@pytest.mark.parametrize(
    "wrong", [{"layers": "top"}, {"width": 0}, {"width": "3"}, {"domain": "a\0b"}, {"split": "no"}]
)
def test_a_wrong_value_is_refused_before_anything_starts(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        words(**wrong)


def test_the_form_finds_the_arguments_in_the_description_of_the_api() -> None:
    """`teach.js` creates an input for each."""
    schema = create_app().openapi()["components"]["schemas"]["TeachRequest"]["properties"]
    assert schema.keys() == {"name", "kind", "path", *TAUGHT}
    assert all(schema[name]["description"] for name in TAUGHT)


def test_a_progress_bar_without_line_ends_is_read_to_its_end() -> None:
    """Otherwise nothing would follow the training or empty its pipe."""

    async def read() -> list[str]:
        output = asyncio.StreamReader(limit=64)
        output.feed_data(b"first: 1/9\n")
        output.feed_data(b"a bar |####      |\r" * 99 + b"\n")
        output.feed_data(b"last: 1/9\rlast: 9/9\r\n")
        output.feed_eof()
        return [line async for line in lines(output)]

    assert asyncio.run(read()) == ["first: 1/9", "last: 9/9"]


def test_a_lesson_that_nobody_watches_has_its_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lesson = Lesson("code")
    lesson.finish("plugged")
    lesson.finish("failed")
    assert (lesson.state, lesson.seconds) == ("plugged", 30.0)


def test_a_process_that_does_not_start_leaves_no_running_lesson(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    engine = SimpleNamespace(experts=tuple)
    settings = Settings(experts_folder=tmp_path)
    teacher = Teacher(cast(Service, SimpleNamespace(settings=settings, engine=engine)))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    monkeypatch.setattr(Teacher, "text", lambda *_, **__: tmp_path)
    with pytest.raises(BlockingIOError):
        asyncio.run(teacher.start(TeachRequest.model_validate(TEXT)))
    assert lesson_fields(teacher.lesson)["state"] == "none"
