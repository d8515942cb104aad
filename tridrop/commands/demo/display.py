"""The live view of the runs in a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .options import Options
from .plan import Plan
from .train import Record, Run


class Display:
    """A line per run with its losses, its speed and the time left; without a terminal, a log.

    It is a context manager, and a :class:`.train.Watcher` of the runs it was made with.
    """

    def __init__(self, console: Console, runs: list[Run], options: Options) -> None:
        self._console = console
        self._tokens = options.batch * options.context
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=6),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("[bold]valid {task.fields[valid]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        blank: dict[str, Any] = {"loss": "-", "valid": "-", "speed": "-"}
        self._tasks = {
            run.name: self._progress.add_task(run.label, total=options.steps, **blank)
            for run in runs
        }

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def planned(self, plan: Plan) -> None:
        """Print how many steps there will be, and why."""
        for task in self._tasks.values():
            self._progress.update(task, total=plan.steps)
        self._console.print(f"{plan.news()}.", soft_wrap=True)

    def stepped(self, run: Run, step: int, loss: float) -> None:
        """Show the loss and the speed of ``run`` after its step number ``step``."""
        recent = run.seconds[-20:]
        self._progress.update(
            self._tasks[run.name],
            completed=step,
            loss=f"{loss:.2f}",
            speed=f"{self._tokens * len(recent) / sum(recent):,.0f}",
        )

    def evaluated(self, record: Record) -> None:
        """Show the latest evaluation."""
        losses = {n: (record.train(n)[-1], record.valid(n)[-1]) for n in self._tasks}
        for name, (_, valid) in losses.items():
            self._progress.update(self._tasks[name], valid=f"{valid:.2f}")
        if not self._console.is_terminal:
            shown = "  ".join(f"{n} {t:.3f} {v:.3f}" for n, (t, v) in losses.items())
            self._console.print(
                f"step {record.steps[-1]}, train and valid: {shown}", soft_wrap=True
            )
