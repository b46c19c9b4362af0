"""`/v1/teach`: train an expert from text on the server's disk while it serves, and plug it in when
it is done.

The training is the command `deepseek expert train` in a process of its own at low priority: it can
be stopped without loss, a crash of it is not one of the server, and the same request goes on where
it was.
"""

import asyncio
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from deepseek.checkpoint.store import home
from deepseek.data.text.git import repository_stores
from deepseek.errors import DataError
from deepseek.packs.library import SUFFIX
from deepseek.server.errors import ApiError, as_api_error
from deepseek.server.guard import ADMIN
from deepseek.server.openapi import STREAMED
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service
from deepseek.server.stream import Reply
from deepseek.train.loop.metrics import read_metrics

router = APIRouter()

State = Literal["running", "stopped", "failed", "plugged"]

LINE = re.compile(r"(?P<stage>[^:]{1,60}): (?P<done>\d+)(?:/(?P<total>\d+))?\b")
"""How `ProgressBar` writes where there is no terminal."""

OUT_OF_BOUNDS = (
    "path must name something below the server's teach root, and so must all that it links to."
)

LOOK_SECONDS = 0.5
NICENESS = 5
POINTS = 300
"""Of a loss curve; a longer one is thinned out."""


@dataclass
class Lesson:
    """One training.

    Attributes:
        name: of the expert.
        state: "plugged" is the good end.
        stage, done, total: what is being done, and how far it is (total 0: unknown).
        message: the latest line that the training wrote; where it failed, why.
        losses: training loss, as [step, value]. held_out: the same on held-out text.
        verdict: once plugged, whether the expert is better or worse than the base, and by how much.
        armed: whether it speaks from now on; one that is no better than the base must be named to.
    """

    name: str
    state: State = "running"
    stage: str = "starting"
    done: int = 0
    total: int = 0
    message: str = ""
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)
    verdict: str = ""
    armed: bool = False

    def read(self, line: str) -> None:
        """Take in a line of the training's output."""
        self.message = line
        found = LINE.match(line)
        if found:
            self.stage = found["stage"]
            self.done = int(found["done"])
            self.total = int(found["total"] or 0)

    def look(self) -> None:
        """Take in the metrics of the run."""
        records = read_metrics(home() / "runs" / self.name / "training" / "metrics.jsonl")
        losses = [(one["step"], one["loss"]) for one in records if "loss" in one]
        self.losses = losses[:: -(-len(losses) // POINTS) or 1]
        self.held_out = [
            (one["step"], one["held_out_loss"]) for one in records if "held_out_loss" in one
        ]


class Teacher:
    """Gives one lesson at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.lesson: Lesson | None = None
        self._busy = asyncio.Lock()
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, wanted: TeachRequest) -> Lesson:
        """Begin a lesson. Raises `ApiError` if one is under way, the name is taken, or the text is
        out of bounds.
        """
        # Nothing is awaited between the question and the claim, so that of two requests one is
        # refused.
        if self._busy.locked() or (self._task is not None and not self._task.done()):
            raise ApiError(
                409, "An expert is being taught already; wait for it or stop it.", code="busy"
            )
        async with self._busy:
            return await self._start(wanted)

    async def _start(self, wanted: TeachRequest) -> Lesson:
        """Check what is wanted and start the training."""
        text = await asyncio.to_thread(self.text, wanted.path, is_repository=wanted.kind == "git")
        pack = self.service.settings.experts_folder / f"{wanted.name}{SUFFIX}"
        if pack.exists() or any(info.name == wanted.name for info in self.service.engine.experts()):
            raise ApiError(
                409,
                f"There is an expert named {wanted.name} already; choose another name.",
                param="name",
            )
        self.lesson = Lesson(wanted.name)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command(self.service.settings.base, wanted, text, pack),
            stdout=DEVNULL,
            stderr=PIPE,
        )
        psutil.Process(self._process.pid).nice(NICENESS)  # answers come first
        self._task = asyncio.create_task(self._attend(self.lesson, self._process, pack))
        return self.lesson

    async def begin(self, wanted: TeachRequest) -> None:
        """Begin a lesson as soon as the model is loaded; why it cannot begin is told where its
        progress would be.
        """
        while self.service.refusal is not None:
            await asyncio.sleep(LOOK_SECONDS)
        try:
            await self.start(wanted)
        except ApiError as error:
            self.lesson = Lesson(wanted.name, state="failed", message=error.message)

    def text(self, path: str, *, is_repository: bool) -> Path:
        """Return the folder or repository that a client names.

        It must lie below the teach root, links resolved, and so must everything that reading it
        reads: what links in a folder point to, and the folders that a repository is spread over.
        """
        root = self.service.settings.teach_root
        if root is None:
            raise ApiError(
                403,
                "Teaching is off; start the server with --teach-root FOLDER.",
                code="teaching_off",
            )
        root = root.resolve()
        try:
            text = (root / path).resolve()
        except (OSError, RuntimeError):  # a loop of links
            text = root.parent
        if not text.is_relative_to(root) or not text.exists():
            raise ApiError(400, OUT_OF_BOUNDS, param="path")
        try:
            read = repository_stores(text) if is_repository else [text]
        except DataError:
            raise ApiError(
                400, "path must name a git repository's own folder.", param="path"
            ) from None
        if any(not folder.is_relative_to(root) or leads_out(folder, root) for folder in read):
            raise ApiError(400, OUT_OF_BOUNDS, param="path")
        return text

    async def stop(self) -> None:
        """Stop the lesson under way, if there is one; what is done is kept, and the same request
        goes on.
        """
        async with self._busy:  # one that is just being started is stopped as well
            await self._stop()

    async def _stop(self) -> None:
        """Stop the training that was started."""
        if self._task is None or self._task.done() or self._process is None:
            return
        if self.lesson is not None:
            self.lesson.state = "stopped"
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
        await self._task

    async def _attend(self, lesson: Lesson, process: Process, pack: Path) -> None:
        """Follow a training to its end and plug what came of it."""
        assert process.stderr is not None
        try:
            async for line in process.stderr:
                lesson.read(line.decode("utf-8", "replace").strip())
            if await process.wait() == 0 and lesson.state == "running":
                plugged = await asyncio.to_thread(self.service.experts_owner.plug, pack)
                lesson.verdict = plugged.verdict
                lesson.armed = plugged.armed
                lesson.state = "plugged"
        except Exception as error:  # whatever is wrong with this lesson, the server goes on
            lesson.message = as_api_error(error).message
        lesson.state = "failed" if lesson.state == "running" else lesson.state
        await asyncio.to_thread(lesson.look)


async def _teacher_of(request: HttpRequest) -> Any:
    return request.app.state.teacher


TheTeacher = Annotated[Teacher, Depends(_teacher_of)]


@router.post("/v1/teach", status_code=202, dependencies=[ADMIN])
async def teach(body: TeachRequest, teacher: TheTeacher) -> dict[str, Any]:
    """Begin to train an expert; `/v1/teach/events` tells how it goes."""
    return told(await teacher.start(body))


@router.get("/v1/teach", dependencies=[ADMIN])
async def lesson(teacher: TheTeacher) -> dict[str, Any]:
    """Tell how the latest lesson goes."""
    return told(teacher.lesson)


@router.delete("/v1/teach", dependencies=[ADMIN])
async def stop(teacher: TheTeacher) -> dict[str, Any]:
    """Stop the lesson under way."""
    await teacher.stop()
    return told(teacher.lesson)


@router.get("/v1/teach/events", dependencies=[ADMIN], responses=STREAMED)
async def events(teacher: TheTeacher) -> Response:
    """Tell how the latest lesson goes as server-sent events, until it ends."""

    async def changes() -> AsyncIterator[dict[str, Any]]:
        before: dict[str, Any] = {}
        while True:
            if teacher.lesson is not None:
                await asyncio.to_thread(teacher.lesson.look)
            now = told(teacher.lesson)
            if now != before:
                yield now
            if now["state"] != "running":
                return
            before = now
            await asyncio.sleep(LOOK_SECONDS)

    return Reply(changes())


def command(base: str, wanted: TeachRequest, text: Path, pack: Path) -> list[str]:
    """Return the arguments of Python for a training."""
    chosen = wanted.model_dump(exclude={"kind", "path"}, exclude_defaults=True)
    options = {"base": base, f"from-{wanted.kind}": text, "out": pack, **chosen}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["-m", "deepseek", "expert", "train", *given]


def told(lesson: Lesson | None) -> dict[str, Any]:
    """Return a lesson as clients see it."""
    return {"object": "lesson", **(asdict(lesson) if lesson else {"state": "none"})}


def leads_out(folder: Path, root: Path) -> bool:
    """Whether a link below `folder` points to something that is not below `root`, or to itself."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            continue
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            return True
    return False
