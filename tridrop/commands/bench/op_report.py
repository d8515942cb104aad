"""What ``tridrop bench`` prints about the ops."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...base import terminal
from .gate import PASSED
from .records import Record
from .step_report import cost, mib, shown
from .timing import COPY


def failures(records: Sequence[Record]) -> list[str]:
    """Why the run failed: failed checks, and rows that tridrop could not compute."""
    found = []
    for r in records:
        what = f"{r.case} {r.shape} {r.dtype}"
        if r.check and r.check != PASSED:
            found.append(f"{what}: no speed-up is given, since its check {r.check}")
        elif r.check and r.why_not:
            found.append(f"{what}: {r.provider} cannot run: {r.why_not}")
    return list(dict.fromkeys(found))


def table(records: Sequence[Record]) -> Table:
    """A row per provider, case, dtype and mode. Times at p = 0 only enter the cost of dropout."""
    grid = terminal.table(
        "Times of ops",
        "of copy: speed as a fraction of a device copy that moves the bytes the op must "
        "move; host: time until the call returns; x: how many times as fast as",
    )
    for heading in ("case", "shape", "dtype", "mode", "provider"):
        grid.add_column(heading)
    for heading in (
        "ms", "20 - 80 %", "of copy", "TFLOP/s", "saved\nMiB", "peak\nMiB", "host\nus", "launches",
        "x eager", "x compile", "cost of\ndropout",
    ):  # fmt: skip
        grid.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        if r.why_not or (r.p == 0 and r.provider != COPY):
            continue
        failed = r.check not in ("", PASSED)
        grid.add_row(
            r.case, r.shape, r.dtype, r.mode, r.provider,
            shown(r.median_ms), f"{shown(r.q20_ms)} - {shown(r.q80_ms)}",
            shown(r.copy_fraction), shown(r.tflops), mib(r.saved_bytes), mib(r.peak_bytes),
            shown(r.host_us), shown(r.launches),
            "[bold red]FAIL[/]" if failed else shown(r.speedup_over_eager),
            "[bold red]FAIL[/]" if failed else shown(r.speedup_over_compile),
            cost(r.dropout_cost),
        )  # fmt: skip
    return grid


def reasons(records: Sequence[Record]) -> list[str]:
    """The providers that could not run, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        if r.why_not:
            found.setdefault((r.provider, r.op, r.why_not), []).append(f"{r.p:g}")
    return [
        f"{provider}, {op}, p = {' and '.join(dict.fromkeys(rates))}: {why}"
        for (provider, op, why), rates in found.items()
    ]
