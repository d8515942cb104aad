"""Progress of an experiment: a bar in a terminal, elsewhere a line per network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LEAST = 2  # seeds that are needed for a spread


class Bar:
    """Shows the progress."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total)
        self.interrupted = False  # by Ctrl-C or SIGTERM, after there were results

    def tick(self) -> None:
        """Note that one more step is done."""
        self._progress.advance(self._task)

    def begin(self, text: str) -> None:
        """Show what is being done."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)

    def each(self, seeds: Iterable[int], one: Callable[[int], T]) -> list[T]:
        """``one`` for every seed; after an interrupt, the finished ones, if two or more."""
        found: list[T] = []
        try:
            for seed in seeds:
                found.append(one(seed))
        except KeyboardInterrupt:
            if len(found) < LEAST:
                raise
            self.interrupted = True
        return found


@contextmanager
def bar(console: Console, total: int) -> Iterator[Bar]:
    """A bar of ``total`` steps, which is drawn only in a terminal."""
    made = Bar(console, total)
    if not console.is_terminal:
        yield made
        return
    with made._progress:
        yield made
