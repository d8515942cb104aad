"""``tridrop check``: run the harness with a progress bar, and print a table or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...backends import NAMES
from . import DTYPES, OPS, Result, available, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop check``."""
    parser.add_argument("--op", action="append", choices=OPS, help="only this op")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype")
    parser.add_argument(
        "--backend",
        action="append",
        choices=NAMES,
        help="only this backend; an error where it cannot run (default: those that can)",
    )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: cuda where there is one)')
    parser.add_argument(
        "--seeds", type=int, default=64, help="seeds for the expected values (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of records, no table")


def main(args: argparse.Namespace) -> int:
    """Run it; 0 if every check passed, 1 if one failed, 2 if a backend cannot run."""
    if args.seeds < 8:
        print("tridrop check: --seeds must be at least 8", file=sys.stderr)
        return 2
    messages = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task("checking", total=None)
        started = False

        def on_case(case: object, dtype: object, backend: str) -> None:
            nonlocal started
            progress.update(
                task,
                advance=1 if started else 0,
                description=f"{getattr(case, 'op', '')} {dtype} {backend}",
            )
            started = True

        try:
            results = run(
                args.op,
                [DTYPES[name] for name in args.dtype] if args.dtype else None,
                args.backend,
                args.device,
                args.seeds,
                on_start=lambda total: progress.update(task, total=total),
                on_case=on_case,
            )
        except (RuntimeError, ImportError) as error:
            if args.backend is None:
                raise
            print(f"tridrop check: {error}", file=sys.stderr)
            return 2
    failed = [r for r in results if r.passed is False]
    if args.json:
        print(json.dumps([asdict(r) for r in results], indent=1))
    else:
        console = Console()
        console.print(table(results))
        _explain(console, results, failed)
        for name, reason in available(args.device or "cpu").items():
            if reason and not any(r.backend == name for r in results):
                console.print(f"[yellow]not run:[/] {name} - {reason}")
    return 1 if failed else 0


def table(results: Sequence[Result]) -> Table:
    """One line a case, dtype and backend: each figure as a share of what is allowed."""
    lines: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        lines[result.case, result.dtype, result.backend].append(result)
    grid = Table(title="tridrop check", caption="figures are shares of what is allowed: 1 fails")
    for heading in ("case", "dtype", "backend"):
        grid.add_column(heading)
    for heading in (
        "value",
        "gradients",
        "p = 0",
        "masks",
        "saved",
        "expectation",
        "invariants",
        "result",
    ):
        grid.add_column(heading, justify="right")
    for (case, dtype, backend), line in lines.items():
        ok = all(r.passed is not False for r in line)
        grid.add_row(
            case.replace("[", r"\["),
            dtype,
            backend,
            _share(line, "value"),
            _share(line, "grad "),
            _share(line, "p = 0"),
            _share(line, "masks"),
            _share(line, "saved"),
            _share(line, "expectation"),
            _share(line, "invariant"),
            "[green]ok[/]" if ok else "[bold red]FAIL[/]",
        )
    return grid


def _share(line: Sequence[Result], prefix: str) -> str:
    """The worst figure among the checks that begin with ``prefix``."""
    found = [r for r in line if r.check.startswith(prefix) and r.passed is not None]
    if not found:
        return "-"
    worst = max(found, key=lambda r: (r.passed is False, r.value / r.limit if r.limit else r.value))
    text = f"{worst.value / worst.limit:.2f}" if worst.limit else f"{worst.value:.0f}"
    return text if worst.passed else f"[bold red]{text}[/]"


def _explain(console: Console, results: Sequence[Result], failed: Sequence[Result]) -> None:
    for r in failed:
        console.print(
            f"[bold red]FAIL[/] {r.backend} {r.dtype} {r.case!r} {r.check}: "
            f"{r.value:.3g} > {r.limit:.3g} {r.detail}",
            markup=True,
            highlight=False,
        )
    for reason in dict.fromkeys(r.detail for r in results if r.passed is None):
        count = sum(r.passed is None and r.detail == reason for r in results)
        console.print(f"[yellow]not run:[/] {count} checks - {reason}")
    ran = [r for r in results if r.passed is not None]
    console.print(f"{len(ran) - len(failed)} of {len(ran)} checks passed")
