"""The thread of an engine, which runs its steps."""

import logging
import threading
import time

from deepseek.device.memory import is_out_of_memory, out_of_memory, release
from deepseek.engine.scheduler import Scheduler
from deepseek.model.language_model import LanguageModel

LESS_MEMORY = (
    "send shorter or fewer requests at once, or start the server with a lower --max-running or "
    "--cache-gib"
)
"""What to do when the device is out of memory."""

LOOK_SECONDS = 60.0
"""Seconds after which an idle thread looks whether it is still needed. It is woken for that, except
if its own garbage collection frees the engine just before it begins to wait.
"""

log = logging.getLogger(__name__)


class Worker:
    """Runs the steps of a scheduler in a thread, while there is work.

    It has no reference to its engine, so that an engine that nobody closed can be freed.

    Args:
        scheduler: what runs and waits.
        model: the model, on whose device memory is freed after a failed step.

    Attributes:
        changed: guards the queue; whoever appends to it notifies, and so does each step.
        seconds: time spent in steps.
    """

    def __init__(self, scheduler: Scheduler, model: LanguageModel) -> None:
        self.changed = threading.Condition()
        self.seconds = 0.0
        self._scheduler = scheduler
        self._model = model
        self._closed = False
        self._abandoned = False
        self._stepping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs in this process: a fork does not copy it."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and the last step has ended; read with `changed` held.

        A step frees a sequence before it delivers its last event.
        """
        return self._scheduler.idle and not self._stepping

    def close(self) -> None:
        """Cancel everything, and wait until the thread has ended."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join()

    def abandon(self) -> None:
        """Let the thread end when it is idle: its engine is gone, but generations may be read."""
        if not self.is_alive:
            return  # in a forked process, nobody would unlock what the thread has locked
        with self.changed:
            self._abandoned = True
            self.changed.notify_all()

    def _run(self) -> None:
        """Run steps while there is work, until the engine is closed or gone."""
        while self._wait():
            started = time.perf_counter()
            try:
                self._scheduler.step()
            except Exception as error:  # fail the batch, keep the engine running
                log.exception("a step failed")
                try:
                    self._fail(error)
                except Exception:  # for example, the device has failed
                    log.exception("memory was not freed after a failed step")
            self.seconds += time.perf_counter() - started
        self._scheduler.end_all("cancelled")
        with self.changed:
            self.changed.notify_all()

    def _wait(self) -> bool:
        """Wait until there is work; return False if the thread must end instead."""
        with self.changed:
            self._stepping = False
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: self._closed or self._abandoned or not self._scheduler.idle, LOOK_SECONDS
            )
            self._stepping = not self._closed and not (self._abandoned and self._scheduler.idle)
            return self._stepping

    def _fail(self, error: Exception) -> None:
        """End the running sequences, whose states are inconsistent after a failed step.

        If memory ran out, drop the prefix cache too, so that the next request fits.
        """
        reason = f"{type(error).__name__}: {error}"
        memory_is_full = is_out_of_memory(error)
        if memory_is_full:
            reason = f"the {out_of_memory(error)}; {LESS_MEMORY}"
            self._scheduler.prefixes.shrink(0)
        for sequence in list(self._scheduler.running):
            self._scheduler.end(sequence, "error", reason)
        if memory_is_full:
            release(self._model.device)
