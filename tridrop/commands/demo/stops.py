"""SIGTERM, which batch systems and containers send before they kill, ends a run as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells have it


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Terminations:
    """While it is entered, the first SIGTERM raises Terminated, and those that follow are noted.

    So are all that come after :meth:`finish`: what is there is being written then. Only the main
    thread is told of signals; in others this does nothing.
    """

    def __init__(self) -> None:
        self.came = False
        self._finishing = False
        self._before: Any = None

    def __enter__(self) -> Terminations:
        # None: a handler that was not set from Python, and could not be put back.
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
        """From here on nothing is raised."""
        self._finishing = True

    def status(self, otherwise: int) -> int:
        """The exit status: 143 after a SIGTERM."""
        return TERMINATED if self.came else otherwise
