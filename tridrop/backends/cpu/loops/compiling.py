"""Tells the user on a terminal which loops are being compiled, which takes seconds.

One line per process stays; while a loop is compiled, a second line shows its name. Nothing is
printed where standard error is not a terminal or has been replaced (by a notebook, a progress bar
or pytest), or where the logger "tridrop" is disabled or its level is above INFO.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, TextIO

from numba.core import event

_FIRST = (
    "tridrop compiles its loops for this processor, some seconds each{kept}; "
    "`tridrop warmup` compiles all of them ahead"
)


def listening() -> TextIO | None:
    """The terminal to print to, or None."""
    logger, stream = logging.getLogger("tridrop"), sys.stderr
    quiet = logger.disabled or logger.level > logging.INFO or logger.manager.disable >= logging.INFO
    if quiet or "PYTEST_VERSION" in os.environ or stream is not sys.__stderr__:
        return None
    return stream if stream is not None and stream.isatty() else None


class Teller(event.Listener):  # type: ignore[misc]
    """Receives numba's event for every function that it compiles, nested ones included."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept
        self.said = False
        self._inside: list[str] = []  # numba compiles one at a time, under a lock of its own
        self._functions = 0
        self._began = 0.0

    def on_start(self, event: Any) -> None:
        function = event.data["dispatcher"].py_func
        if not self._inside and not function.__module__.startswith(f"{__package__}."):
            return
        if not self._inside:
            self._functions, self._began = 0, time.monotonic()
        self._inside.append(function.__name__)
        stream = listening()
        if stream is None:
            return
        if not self.said:
            self.said = True
            kept = ", once: they are kept on disk" if self.kept else ""
            stream.write(_FIRST.format(kept=kept) + "\n")
        self._show(stream)

    def on_end(self, event: Any) -> None:
        if not self._inside:
            return
        self._inside.pop()
        self._functions += 1
        stream = listening()
        if stream is not None:
            self._show(stream)

    def _show(self, stream: TextIO) -> None:
        stream.write("\r\x1b[K")  # go to the beginning of the line and clear it
        if self._inside:
            seconds = time.monotonic() - self._began
            stream.write(f"  {self._inside[0]}: {self._functions} parts, {seconds:.0f} s")
        stream.flush()


def watch(kept: bool) -> None:
    """Report all compilations from now on; ``kept`` says whether code is kept on disk."""
    event.register("numba:compile", Teller(kept))
