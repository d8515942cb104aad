"""What ``tridrop bench --steps`` prints: the cost of dropout in training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ...base import terminal
from ...base.files import replacing
from .gate import PASSED
from .models import ARCHITECTURES
from .providers import EAGER, TRIDROP
from .steps import StepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(records: Sequence[StepRecord]) -> Table:
    """A row per model, provider and rate."""
    grid = terminal.table(
        "A training step: forward, backward, AdamW",
        "cost of dropout: time compared with the same provider at p = 0; x: how many times "
        "as fast as, at the same p; sites: what tridrop.swap found",
    )
    for heading in ("model", "provider", "p"):
        grid.add_column(heading)
    for heading in (
        "ms", "20 - 80 %", "cost of\ndropout", "x eager", "x compile", "saved\nMiB", "peak\nMiB",
        "sites",
    ):  # fmt: skip
        grid.add_column(heading, justify="right", no_wrap=heading != "sites")
    for r in records:
        if r.why_not:
            continue
        failed = r.check != PASSED
        grid.add_row(
            r.model, r.provider, f"{r.p:g}", shown(r.median_ms),
            f"{shown(r.q20_ms)} - {shown(r.q80_ms)}", cost(r.dropout_cost),
            "[bold red]FAIL[/]" if failed else shown(r.speedup_over_eager),
            "[bold red]FAIL[/]" if failed else shown(r.speedup_over_compile),
            mib(r.saved_bytes), mib(r.peak_bytes), r.sites,
        )  # fmt: skip
    return grid


def shown(x: float | None) -> str:
    """A figure with three digits."""
    return "-" if x is None else f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def mib(x: int | None) -> str:
    """Bytes in MiB."""
    return "-" if x is None else f"{x / 2**20:.2f}"


def cost(x: float | None) -> str:
    """A relative change in percent."""
    return "-" if x is None else f"{x:+.1%}"


def headlines(records: Sequence[StepRecord]) -> list[str]:
    """A sentence per model: the cost of dropout for each provider, and tridrop against eager."""
    found = []
    for name in dict.fromkeys(r.model for r in records):
        rows = [r for r in records if r.model == name and r.p]
        costs = [f"{r.provider} {cost(r.dropout_cost)}" for r in rows if r.dropout_cost is not None]
        if not costs:
            continue
        line = f"{ARCHITECTURES[name].title}, cost of dropout: {', '.join(costs)}."
        saved = {r.provider: r.saved_bytes for r in rows if r.saved_bytes is not None}
        fused = [r for r in rows if r.provider == TRIDROP and r.speedup_over_eager is not None]
        for r in fused:
            line += (
                f" A step with tridrop takes {1 / (r.speedup_over_eager or 1):.3f} of eager's time"
            )
            if EAGER in saved and TRIDROP in saved:
                line += f" and keeps {saved[TRIDROP] / saved[EAGER]:.3f} of its bytes for backward"
            line += "."
        found.append(line)
    return found


def failures(records: Sequence[StepRecord]) -> list[str]:
    """Why the run failed: failed checks, and models that tridrop could not train."""
    found = []
    for r in records:
        if r.check not in ("", PASSED):
            found.append(f"{r.model}, {r.provider}, p = {r.p:g}: {r.check}")
        if r.why_not and r.provider == TRIDROP:
            found.append(f"{r.model}, {r.provider}, p = {r.p:g} cannot run: {r.why_not}")
    return list(dict.fromkeys(found))


def reasons(records: Sequence[StepRecord]) -> list[str]:
    """The providers that could not run, and why."""
    return [f"{r.model}, {r.provider}, p = {r.p:g}: {r.why_not}" for r in records if r.why_not]


def draw(records: Sequence[StepRecord], stem: Path, title: str = "") -> list[Path]:
    """Write STEM.png: the times at both rates, relative to eager without dropout."""
    timed = [r for r in records if r.median_ms is not None]
    bases = {r.model: r.median_ms for r in timed if r.provider == EAGER and not r.p}
    timed = [r for r in timed if r.model in bases]
    if not timed:
        return []
    figure = _figure(timed, {name: base or 1.0 for name, base in bases.items()}, title)
    with replacing(path := Path(f"{stem}.png")) as draft:
        figure.savefig(draft, dpi=100)
    return [path]


def _figure(records: Sequence[StepRecord], bases: dict[str, float], title: str) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(1 + 3 * len(bases), 3), layout="constrained")
        grid = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
        for axes, (name, base) in zip(grid, bases.items(), strict=True):
            rows = [r for r in records if r.model == name]
            names = list(dict.fromkeys(r.provider for r in rows))
            for r in rows:
                at = names.index(r.provider) + (0.2 if r.p else -0.2)
                colour, label = ("#000000", f"p = {r.p:g}") if r.p else ("#56B4E9", "p = 0")
                axes.bar(at, (r.median_ms or 0.0) / base, 0.38, color=colour, label=label)
            axes.set_xticks(range(len(names)), [n.replace("+", "\n+") for n in names])
            axes.set_title(ARCHITECTURES[name].title)
            axes.grid(axis="y", alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.supylabel("time per step, relative to eager at p = 0")
        if title:
            figure.suptitle(title)
        handles = {t: h for a in grid for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(
            handles.values(), handles.keys(), frameon=False, ncols=2, loc="outside upper center"
        )
    return figure
