"""`deepseek watch`: update an expert whenever its source changes, and plug it into a server."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.names import Dtype
from deepseek.errors import DataError, UserError
from deepseek.packs.listing import read_manifest
from deepseek.packs.signature import load_key
from deepseek.terminal import visible
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.expert_server import ExpertServer
from deepseek.train.jobs.signed_expert import check_key, sign_if_unsigned, train_signed
from deepseek.train.jobs.update import MINUTES, TrainedExpert

Say = Callable[[str], None]

LONGEST_PAUSE = 64
"""Maximum number of looks between two attempts at an update."""


class Watcher:
    """Watches the source of an expert, updates the expert and plugs it.

    Args:
        name: name of a trained expert.
        server: server that plugs every new version; None: plug nothing.
        minutes: time budget of an update, in minutes.
        say: called with messages for the user.
        device: where updates are computed.
        dtype: their precision; "auto": that of the training.
        key: private key to sign every new version with, and the present one if it is not signed;
            None: only for packs that are not signed.

    Raises:
        ConfigError: no update can have this budget or precision, or the pack is signed and no key
            is given.
        DataError: there is no such expert, its source is gone, or the server does not answer.
        DeviceError: there is no such device, or it cannot compute in that precision.
        PackError: the key or the pack cannot be read.
    """

    def __init__(
        self,
        name: str,
        server: ExpertServer | None,
        minutes: float,
        say: Say,
        device: str = "auto",
        dtype: Dtype = "auto",
        key: Path | None = None,
    ) -> None:
        self.options: dict[str, Any] = {"minutes": minutes, "device": device, "dtype": dtype}
        ExpertArguments.read(update=name, **self.options)
        choose_dtype(dtype, choose_device(device))
        self.expert = TrainedExpert.find(name)
        self.key = key
        check_key(self.expert, key)
        if key is not None:
            # An update that was killed in between may have left its pack without a signature.
            sign_if_unsigned(self.expert.pack, load_key(key))
        self.server = server
        self.say = say
        self.seen = self.expert.state()
        self.failures = 0
        self.pause = 0.0
        self.complaint = ""
        self.must_plug = False
        if server is not None:
            plugged = server.plugged_digest(name)
            # The expert may have been updated while nothing watched it.
            self.must_plug = plugged not in (None, read_manifest(self.expert.pack).digest)

    def look(self) -> None:
        """Update the expert if its source is new and has not changed since the last look.

        Failures are reported, once for each state of the source, and leave the expert as it was. A
        failed update is tried again after 1, 2, 4 and up to `LONGEST_PAUSE` looks, or when the
        source changes; if the text is the cause, only then. A failed plugging is tried again at the
        next look.
        """
        try:
            state = self.expert.state()
            if state != self.seen:
                self.seen = state
                self.failures = 0
                self.pause = 0.0
            elif self.pause > 0:
                self.pause -= 1
            elif state not in self.expert.learnt_states():
                self.update()
            if self.must_plug and self.server is not None:
                self.server.plug_again(self.expert.name)
                self.must_plug = False
                self.say(f"{self.expert.name} is plugged")
            if not self.failures:
                self.complaint = ""
        except (UserError, OSError) as error:
            complaint = _sentence(error)
            if complaint != self.complaint:
                self.say(f"{self.expert.name}: {complaint}")
            self.complaint = complaint

    def update(self) -> None:
        """Update the expert."""
        name = self.expert.name
        self.say(f"{name}: its source has changed; updating")
        started = time.monotonic()
        try:
            pack = train_signed(key=self.key, update=name, quiet=True, **self.options)
        except (UserError, OSError) as error:  # the latter of a full disk, or one that is away
            is_text = isinstance(error, DataError)
            self.pause = math.inf if is_text else min(LONGEST_PAUSE, 2**self.failures)
            self.failures += 1
            raise
        self.failures = 0
        self.must_plug = self.server is not None
        self.say(f"{name} is updated in {time.monotonic() - started:.0f} s: {pack}")


def _sentence(error: UserError | OSError) -> str:
    """Return an error as one line."""
    if isinstance(error, UserError):
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    return visible(f"{place}{error.strerror or error}.")


def watch_expert(
    name: str,
    server: ExpertServer | None = None,
    *,
    minutes: float = MINUTES,
    every: float = 30.0,
    rounds: int | None = None,
    say: Say = lambda _: None,
    device: str = "auto",
    dtype: Dtype = "auto",
    key: Path | None = None,
) -> None:
    """Update an expert at once if its source is new, and later whenever it has changed and then
    been stable for one interval.

    Args:
        name: name of a trained expert.
        server: server that plugs every new version; None: plug nothing.
        minutes: time budget of an update, in minutes.
        every: seconds between two looks at the source.
        rounds: number of looks; None: until the process is interrupted.
        say: called with messages for the user.
        device: where updates are computed.
        dtype: their precision; "auto": that of the training.
        key: private key to sign every new version with, and the present one if it is not signed;
            None: only for packs that are not signed.

    Raises:
        DataError: there is no such expert, its source is gone, or the server does not answer or
            refuses its admin key.
        ConfigError: no update can have this budget or precision, or the pack is signed and no key
            is given.
        DeviceError: there is no such device, or it cannot compute in that precision.
        PackError: the key or the pack cannot be read.
    """
    watcher = Watcher(name, server, minutes, say, device, dtype, key)
    say(f"watching the source of {name}; Ctrl-C ends it")
    done = 0
    while rounds is None or done < rounds:
        watcher.look()
        time.sleep(every)
        done += 1
