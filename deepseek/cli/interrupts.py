"""Notes Ctrl-C, so that an import which fails because of it is not reported as a bug."""

import signal
import threading
from types import FrameType


class Interrupts:
    """Raises `KeyboardInterrupt` at SIGINT, as Python does, and notes that it came.

    Native code that imports a module can lose the exception: then another one ends the command,
    such as `ModuleNotFoundError`.

    Attributes:
        noted: whether a signal came that nothing has answered yet.
    """

    def __init__(self) -> None:
        self.noted = False

    def watch(self) -> None:
        """Handle SIGINT from now on, unless it is ignored or has another handler."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread can handle signals
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    def unwatch(self) -> None:
        """Give SIGINT its usual handler back, and forget what came."""
        self.noted = False
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def answered(self) -> None:
        """Forget a signal after which the command goes on, as `chat` does."""
        self.noted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.default_int_handler(number, frame)


INTERRUPTS = Interrupts()
"""Those of this process."""
