"""Lets SIGTERM end a run as Ctrl-C does; batch systems and containers send it before they kill."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # the exit statuses of shells


class Terminated(KeyboardInterrupt):
    """A SIGTERM has arrived."""


class Terminations:
    """Inside this context the first SIGTERM raises Terminated; later ones are only noted.

    After :meth:`finish`, while results are written, all are only noted. Only the main thread gets
    signals; in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.came = False
        self._finishing = False
        self._before: Any = None

    def __enter__(self) -> Terminations:
        # None: the handler was not set from Python, and could not be restored.
        self._before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            self._before = None
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first = not self.came and not self._finishing
        self.came = True
        if first:
            raise Terminated

    def finish(self) -> None:
        """From now on raise nothing."""
        self._finishing = True

    def status(self, otherwise: int) -> int:
        """The exit status: 143 after a SIGTERM, else ``otherwise``."""
        return TERMINATED if self.came else otherwise
