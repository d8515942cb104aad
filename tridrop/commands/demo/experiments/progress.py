"""Progress of an experiment: a bar in a terminal, a line a network elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LEAST = 2  # seeds of which there is a spread


class Bar:
    """What is told of the progress."""

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
        self.interrupted = False  # by Ctrl-C or SIGTERM, with something to keep

    def tick(self) -> None:
        """One step more is done."""
        self._progress.advance(self._task)

    def begin(self, text: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)

    def each(self, seeds: Iterable[int], one: Callable[[int], T]) -> list[T]:
        """``one`` of every seed; after an interrupt those that are whole, where two or more are."""
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
    """A bar of ``total`` steps; drawn only where there is a terminal."""
    made = Bar(console, total)
    if not console.is_terminal:
        yield made
        return
    with made._progress:
        yield made
