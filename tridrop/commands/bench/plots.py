"""Plots speed against size, with the device copy as roofline, and attention's TFLOP/s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.files import replacing
from .records import Record
from .timing import BOTH, COPY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, as in the demo.
COLOURS = {
    "eager": "#0072B2",
    "by-hand": "#56B4E9",
    "torch.compile": "#D55E00",
    "tridrop": "#000000",
    "sdpa-flash": "#009E73",
    "sdpa-efficient": "#CC79A7",
    "sdpa-cudnn": "#E69F00",
    "sdpa-math": "#F0E442",
    COPY: "#999999",
}
COLUMNS = 4
Panel = tuple[str, str, str]


def draw(records: Sequence[Record], stem: Path, title: str = "") -> list[Path]:
    """Write STEM.png with the speeds, and STEM-attention.png with the TFLOP/s of attention."""
    timed = [r for r in records if not r.why_not and (r.p > 0 or r.provider == COPY)]
    modes = {r.mode for r in timed}
    shown = BOTH if BOTH in modes else next(iter(sorted(modes)), "")
    speeds = [r for r in timed if r.mode == shown and not _is_attention(r)]
    rates = [r for r in timed if r.tflops is not None]
    found = []
    for chosen, path, y, x, labels in (
        (speeds, Path(f"{stem}.png"), _speed, _mib, ("MiB that the op must move", "GB/s")),
        (rates, Path(f"{stem}-attention.png"), _tflops, _length, ("length", "TFLOP/s")),
    ):
        if chosen:
            with replacing(path) as draft:
                _figure(chosen, x, y, labels, title).savefig(draft, dpi=100)
            found.append(path)
    return found


def _is_attention(r: Record) -> bool:
    return r.op == "scaled_dot_product_attention"


def _speed(r: Record) -> float:
    return r.gb_per_s or 0.0


def _mib(r: Record) -> float:
    return (r.bytes or 0) / 2**20


def _tflops(r: Record) -> float:
    return r.tflops or 0.0


def _length(r: Record) -> float:
    return float(r.shape.split("x")[-2])


def _panel(r: Record) -> Panel:
    width = f", D = {r.shape.split('x')[-1]}" if _is_attention(r) else ""
    return r.case.replace("scaled_dot_product_", "") + width, r.dtype, r.mode


def _figure(
    records: Sequence[Record],
    x: Callable[[Record], float],
    y: Callable[[Record], float],
    labels: tuple[str, str],
    title: str,
) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(_panel(r) for r in records))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.6 * columns + 0.6, 2.6 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, [r for r in records if _panel(r) == panel], x, y)
            axes.set_title(", ".join(panel), fontsize=7)
        figure.supxlabel(labels[0])
        figure.supylabel(labels[1])
        if title:
            figure.suptitle(title)
        handles = {t: h for a in grid for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
        # An entry is at most 1.5 inches wide.
        ncols = min(5, int(figure.get_figwidth() / 1.5))
        figure.legend(
            handles.values(), handles.keys(), frameon=False, ncols=ncols, loc="outside upper center"
        )
    return figure


def _draw_panel(
    axes: Any,
    records: Sequence[Record],
    x: Callable[[Record], float],
    y: Callable[[Record], float],
) -> None:
    for provider in dict.fromkeys(r.provider for r in records):
        points = sorted((x(r), y(r)) for r in records if r.provider == provider)
        style = "--" if provider == COPY else "-"
        label = "device copy (roofline)" if provider == COPY else provider
        axes.plot(
            *zip(*points, strict=True), style, marker="o", markersize=3, label=label,
            color=COLOURS.get(provider),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
