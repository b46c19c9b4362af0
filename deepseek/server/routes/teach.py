"""`/v1/teach`: train an expert on text from the server's disk while serving, then plug it.

The training runs as `deepseek expert train` in a separate process at low priority. It can be
stopped without loss, a crash does not affect the server, and the same request resumes it.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from deepseek.data.text.git_stores import repository_stores
from deepseek.errors import DataError, UserError
from deepseek.packs.library import SUFFIX
from deepseek.server.errors import ApiError, as_api_error
from deepseek.server.guard import ADMIN
from deepseek.server.json_body import JsonRoute
from deepseek.server.lesson import Lesson
from deepseek.server.openapi import STREAMED
from deepseek.server.routes.prompts import find_prompts
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service, TheService
from deepseek.server.settings import Settings
from deepseek.server.stream import Reply
from deepseek.server.teach_root import (
    OUT_OF_BOUNDS,
    RelativePath,
    below,
    entered,
    leads_out,
    listing,
    teach_root,
)

router = APIRouter(route_class=JsonRoute)

LOOK_SECONDS = 0.5

STOP_SECONDS = 15.0
"""Seconds that a training has to write its checkpoint. After that it is killed, and loses the steps
since the checkpoint before.
"""

NICENESS = 5


class Teacher:
    """Runs one training at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.lesson: Lesson | None = None
        self._busy = asyncio.Lock()
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, wanted: TeachRequest) -> Lesson:
        """Start a training and return its progress.

        Raises:
            ApiError: a training is already running, the name is taken, or the text is outside the
                teach root.
        """
        # No await between this check and taking the lock, so that of two concurrent requests one
        # is refused.
        if self._busy.locked() or (self._task is not None and not self._task.done()):
            raise ApiError(
                409, "An expert is being taught already; wait for it or stop it.", code="busy"
            )
        async with self._busy:
            return await self._start(wanted)

    async def _start(self, wanted: TeachRequest) -> Lesson:
        """Check the request and start the training process."""
        text = await asyncio.to_thread(self.text, wanted.path, is_repository=wanted.kind == "git")
        pack = self.service.settings.experts_folder / f"{wanted.name}{SUFFIX}"
        if pack.exists() or any(info.name == wanted.name for info in self.service.engine.experts()):
            raise ApiError(
                409,
                f"There is an expert named {wanted.name} already; choose another name.",
                param="name",
            )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command(self.service.settings, wanted, text, pack),
            stdout=DEVNULL,
            stderr=PIPE,
        )
        self.lesson = Lesson(wanted.name)  # not before there is a process that ends it
        psutil.Process(self._process.pid).nice(NICENESS)  # serving has priority
        self._task = asyncio.create_task(self._attend(self.lesson, self._process, pack))
        return self.lesson

    async def begin(self, wanted: TeachRequest) -> None:
        """Start a training once the model is loaded; report a refusal as its progress."""
        while self.service.refusal is not None:
            await asyncio.sleep(LOOK_SECONDS)
        try:
            await self.start(wanted)
        except ApiError as error:
            self.lesson = Lesson(wanted.name, state="failed", message=error.message)

    def text(self, path: str, *, is_repository: bool) -> Path:
        """Return the folder or repository that a client names.

        With all links resolved, it must lie below the teach root. So must everything read through
        it: the targets of links in a folder, and all folders in which a repository stores objects.

        Args:
            path: path relative to the teach root.
            is_repository: whether it names a git repository.

        Raises:
            ApiError: teaching is off, or the path is outside the teach root or missing.
        """
        root = teach_root(self.service.settings)
        text = below(root, path)
        try:
            folders = repository_stores(text) if is_repository else [text]
        except DataError:
            raise ApiError(
                400, "path must name a git repository's own folder.", param="path"
            ) from None
        for folder in folders:
            # Of a repository's store everything counts: a branch may have the name of any folder.
            paths = folder.rglob("*") if is_repository else entered(folder)
            if folder.is_relative_to(root) and not leads_out(paths, root):
                continue
            raise ApiError(400, OUT_OF_BOUNDS, param="path")
        return text

    async def stop(self) -> None:
        """Stop the running training, if any; the same request resumes it from its checkpoint."""
        async with self._busy:  # waits for a training that is just being started
            await self._stop()

    async def _stop(self) -> None:
        """Interrupt the training process and wait for its end; kill it if it takes too long."""
        if self._task is None or self._task.done() or self._process is None:
            return
        try:
            if self._process.returncode is None:
                if self.lesson is not None:
                    self.lesson.finish("stopped")
                self._process.send_signal(signal.SIGINT)
            await asyncio.wait([self._task], timeout=STOP_SECONDS)
        finally:
            self.kill()
        await self._task

    def kill(self) -> None:
        """Kill the training process, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _attend(self, lesson: Lesson, process: Process, pack: Path) -> None:
        """Follow a training to its end and plug the pack that it wrote."""
        assert process.stderr is not None
        try:
            async for line in lines(process.stderr):
                lesson.read(line)
            if await process.wait() == 0 and lesson.state == "running":
                await asyncio.to_thread(lesson.end)
                plugged = await self.service.change(lambda owner: owner.plug(pack))
                lesson.verdict = plugged.verdict
                lesson.armed = plugged.armed
                if lesson.armed:
                    lesson.begin("finding prompts")
                    with suppress(UserError, ApiError):  # the expert works without them
                        await asyncio.to_thread(find_prompts, self.service, lesson.name)
                lesson.finish("plugged")
        except Exception as error:  # no failure of a training may end the server
            lesson.message = as_api_error(error).message
        lesson.finish("failed")
        await asyncio.to_thread(lesson.look)


async def lines(output: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a process's output as a terminal shows them: text after a carriage return
    replaces the line.

    If a line is longer than the reader's buffer, such as that of a progress bar, its beginning is
    dropped. Reading must go on, because a process whose output is not read blocks on a full pipe.
    """
    while True:
        try:
            line = await output.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").strip().rpartition("\r")[2]


async def _teacher_of(request: HttpRequest) -> Any:
    return request.app.state.teacher


TheTeacher = Annotated[Teacher, Depends(_teacher_of)]


@router.post("/v1/teach", status_code=202, dependencies=[ADMIN])
async def teach(body: TeachRequest, teacher: TheTeacher) -> dict[str, Any]:
    """Start to train an expert; `/v1/teach/events` reports its progress."""
    return lesson_fields(await teacher.start(body))


@router.get("/v1/teach", dependencies=[ADMIN])
async def lesson(teacher: TheTeacher) -> dict[str, Any]:
    """Report the progress of the latest training."""
    if teacher.lesson is not None:
        await asyncio.to_thread(teacher.lesson.look)
    return lesson_fields(teacher.lesson)


@router.get("/v1/teach/folders", dependencies=[ADMIN])
async def folders(service: TheService, path: RelativePath = ".") -> dict[str, Any]:
    """List the folders in a folder below the teach root, and how much text it holds."""
    root = teach_root(service.settings)
    return await asyncio.to_thread(listing, root, below(root, path))


@router.delete("/v1/teach", dependencies=[ADMIN])
async def stop(teacher: TheTeacher) -> dict[str, Any]:
    """Stop the running training."""
    await teacher.stop()
    return lesson_fields(teacher.lesson)


@router.get("/v1/teach/events", dependencies=[ADMIN], responses=STREAMED)
async def events(teacher: TheTeacher) -> Response:
    """Report the progress of the latest training as server-sent events, until it ends."""

    async def changes() -> AsyncIterator[dict[str, Any]]:
        before: dict[str, Any] = {}
        while True:
            if teacher.lesson is not None:
                await asyncio.to_thread(teacher.lesson.look)
            now = lesson_fields(teacher.lesson)
            if now != before:
                yield now
            # A draining server stops its lesson soon, and the last event should report that.
            if now["state"] != "running" or teacher.service.admission.ended:
                return
            before = now
            await asyncio.sleep(LOOK_SECONDS)

    return Reply(changes())


def command(settings: Settings, wanted: TeachRequest, text: Path, pack: Path) -> list[str]:
    """Return the arguments for Python that run a training.

    Args:
        settings: give the base model, and the device if the request names none.
        wanted: the request; only fields that differ from their defaults are passed on.
        text: folder or repository to train on.
        pack: file to write.
    """
    chosen = wanted.model_dump(exclude={"kind", "path"}, exclude_defaults=True)
    device = {"device": settings.device} if settings.device != "auto" else {}
    text_and_pack = {f"from-{wanted.kind}": text, "out": pack}
    options = {"base": settings.base, **device, **text_and_pack, **chosen}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["-m", "deepseek", "expert", "train", *flags]


def lesson_fields(lesson: Lesson | None) -> dict[str, Any]:
    """Return the JSON fields of a lesson."""
    return {"object": "lesson", **(lesson.fields() if lesson else {"state": "none"})}
