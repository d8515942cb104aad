"""``tridrop check``: runs the checks with a progress bar, and prints a table or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...backends import NAMES
from ...base import terminal
from . import DTYPES, OPS, Case, Invariant, Result, available, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop check``."""
    parser.add_argument("--op", action="append", choices=OPS, help="check only this op")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="check only this dtype"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=NAMES,
        help="check only this backend; an error if it cannot run (default: all that can)",
    )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: cuda if there is a GPU)')
    parser.add_argument(
        "--seeds", type=int, default=64, help="seeds for the expected values (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a list of records instead of a table"
    )


def main(args: argparse.Namespace) -> int:
    """Run it. Returns 0 if every check passed, 1 if one failed, 2 if a backend cannot run, and 130
    after Ctrl-C, which still prints what was checked."""
    if args.seeds < 8:
        print("tridrop check: --seeds must be at least 8", file=sys.stderr)
        return 2
    results: list[Result] = []
    status, total = 0, 0
    with terminal.bar() as progress:
        task = progress.add_task("checking", total=None)

        def on_start(count: int) -> None:
            nonlocal total
            total = count
            progress.update(task, total=count)

        def on_case(case: Case | Invariant, dtype: object, backend: str) -> None:
            progress.update(task, description=escape(f"{case.op} {dtype} {backend}"))

        def on_results(found: list[Result]) -> None:
            results.extend(found)
            progress.advance(task)

        try:
            run(
                args.op,
                [DTYPES[name] for name in args.dtype] if args.dtype else None,
                args.backend,
                args.device,
                args.seeds,
                on_start=on_start,
                on_case=on_case,
                on_results=on_results,
            )
        except KeyboardInterrupt:
            status = terminal.INTERRUPTED
        except (RuntimeError, ImportError) as error:
            if args.backend is None:
                raise
            print(f"tridrop check: {error}", file=sys.stderr)
            return 2
    if status:
        done = len({(r.case, r.dtype, r.backend) for r in results})
        terminal.interrupted("check", f" after {done} of {total} rows")
    failed = [r for r in results if r.passed is False]
    if args.json:
        print(json.dumps([asdict(r) for r in results], indent=1))
    elif results:
        backends = dict.fromkeys(r.backend for r in results)
        terminal.show(
            [table([r for r in results if r.backend == name], name) for name in backends],
            plain=lambda: table(results),
        )
        _explain(results, failed)
        for name, reason in available(args.device or "cpu").items():
            if reason and name not in backends and not status:
                _say("[yellow]not run:[/]", f"{name} - {reason}")
    return status or (1 if failed else 0)


# The columns: the prefix of the names of their checks -> the heading, which fits 80 characters.
_COLUMNS = {
    "value": "value",
    "grad ": "gra-\ndient",
    "p = 0": "p = 0",
    "masks": "masks",
    "saved": "saved",
    "expectation": "expec-\ntation",
    "invariant": "inva-\nriant",
}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def table(results: Sequence[Result], backend: str | None = None) -> Table:
    """A row per case, dtype and backend, with each figure as a fraction of its limit.

    With a ``backend``, the title names it and the table fits in 80 characters. Without, there is a
    column of backends.
    """
    found: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        found[result.case, result.dtype, result.backend].append(result)
    title = f"tridrop check, the {backend} backend" if backend else "tridrop check"
    grid = Table(title=title, caption=_CAPTION, box=None, padding=(0, 1, 0, 0))
    grid.add_column("case")
    for heading in ("dtype",) if backend else ("dtype", "backend"):
        grid.add_column(heading, no_wrap=True)
    for heading in (*_COLUMNS.values(), "result"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for (case, dtype, name), line in found.items():
        ok = all(r.passed is not False for r in line)
        grid.add_row(
            escape(case),
            *([_SHORT[dtype]] if backend else [dtype, name]),
            *(_share(line, prefix) for prefix in _COLUMNS),
            "[green]ok[/]" if ok else "[bold red]FAIL[/]",
        )
    return grid


_CAPTION = (
    "Figures are fractions of their limits: more than 1 fails. saved: bytes kept for backward "
    "beyond those of eager PyTorch without dropout; below 0 means fewer. masks: how many decisions "
    "differ."
)


def _share(line: Sequence[Result], prefix: str) -> str:
    """The worst figure among the checks whose names begin with ``prefix``."""
    found = [r for r in line if r.check.startswith(prefix) and r.passed is not None]
    if not found:
        return "-"
    worst = max(found, key=lambda r: (r.passed is False, r.value / r.limit if r.limit else r.value))
    text = f"{worst.value / worst.limit:.2f}" if worst.limit else f"{worst.value:.0f}"
    return text if worst.passed else f"[bold red]{text}[/]"


def _explain(results: Sequence[Result], failed: Sequence[Result]) -> None:
    for r in failed:
        what = f"{r.backend} {r.dtype} {r.case!r} {r.check}: {r.value:.3g} > {r.limit:.3g}"
        _say("[bold red]FAIL[/]", f"{what} {r.detail}")
    for reason in dict.fromkeys(r.detail for r in results if r.passed is None):
        count = sum(r.passed is None and r.detail == reason for r in results)
        _say("[yellow]not run:[/]", f"{count} checks - {reason}")
    ran = [r for r in results if r.passed is not None]
    _say("", f"{len(ran) - len(failed)} of {len(ran)} checks passed")


def _say(mark: str, text: str) -> None:
    """Print a line; it is wrapped only on a terminal."""
    console = Console(highlight=False)
    line = f"{mark} {escape(text)}" if mark else escape(text)
    console.print(line, soft_wrap=not console.is_terminal)
