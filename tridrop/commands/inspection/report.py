"""``tridrop inspect``: compiles with a progress bar, and prints a table, JSON or a plot."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ...base import terminal
from ...base.files import replacing
from . import ARCHS, DTYPES, OPS, run
from .devices import DEVICES
from .rows import FUSED, NAIVE, NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
METHODS = {NONE: "without dropout", FUSED: "tridrop", NAIVE: "one Philox call per element"}
# From the palette of Okabe and Ito, as in the demo.
COLOURS = {NONE: "#56B4E9", FUSED: "#000000", NAIVE: "#D55E00"}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop inspect``."""
    for option, names, default in (
        ("op", OPS, "all"),
        ("arch", ARCHS, "all"),
        ("dtype", tuple(DTYPES), "bf16"),
    ):
        parser.add_argument(
            f"--{option}",
            type=_names,
            metavar="NAME,...",
            help=f"some of: {', '.join(names)} (default: {default})",
        )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--json", metavar="PATH", help='write a JSON list of records to PATH; "-" prints it'
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH.png", help="draw the instructions per element"
    )


def main(args: argparse.Namespace) -> int:
    """Run it. Returns 0, 2 if it cannot run with these options, and 130 after Ctrl-C, which still
    prints what was compiled."""
    records: list[Record] = []
    status = 0
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: give 1 or more")
        if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("the plot needs matplotlib: pip install 'tridrop[demo]'")
        try:
            _run(args, records)
        except KeyboardInterrupt:
            kept = f": {len(records)} kernels are kept" if records else ""
            status = terminal.interrupted("inspect", kept)
            if not records:
                return status
        if args.plot is not None:
            plot(records, args.plot)
        if args.json and args.json != "-":
            with replacing(args.json) as draft:
                draft.write_text(dumps(records))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"tridrop inspect: error: {error}", file=sys.stderr)
        return 2
    if args.json == "-":
        print(dumps(records), end="")
        return status
    terminal.show([table(records)])
    console = Console(highlight=False)
    for line in notes(records):
        console.print(line, soft_wrap=not console.is_terminal)
    return status


def _run(args: argparse.Namespace, records: list[Record]) -> None:
    """Compile, and add the records to ``records`` as they come."""
    with terminal.bar() as progress:
        task = progress.add_task("compiling", total=None)
        run(
            args.op,
            args.arch,
            args.dtype,
            args.jobs,
            on_start=lambda total: progress.update(task, total=total),
            on_done=lambda what: progress.update(task, advance=1, description=what),
            on_records=records.extend,
        )


def dumps(records: Sequence[Record]) -> str:
    """The records as JSON, one per line."""
    return "[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in records) + "\n]\n"


def group(records: Sequence[Record]) -> dict[tuple[str, str, str], dict[str, Record]]:
    """(kernel's name, arch, dtype) -> records by method; the naive kernel is with the fused one."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    own: dict[tuple[str, ...], tuple[str, str, str]] = {}
    for r in records:
        call = (r["op"], r["variant"], r["direction"], r["arch"], r["dtype"])
        part = r["kernel"].removeprefix("attention_").removesuffix("_kernel")
        name = " ".join(filter(None, call[:3]))
        if r["op"] == "scaled_dot_product_attention" and part != r["direction"]:
            name += f" {part}"
        key = (name, r["arch"], r["dtype"])
        key = own[call] if r["method"] == NAIVE else own.setdefault((*call, part), key)
        own.setdefault(call, key)
        found.setdefault(key, {})[r["method"]] = r
    return found


def table(records: Sequence[Record]) -> Table:
    """A row per kernel, architecture and dtype."""
    grid = terminal.table(
        "Instructions per element, and other figures from the machine code",
        "three figures: without dropout / tridrop / one Philox call per element; "
        "the other columns are for tridrop",
    )
    grid.add_column("kernel")
    for heading in ("arch", "dtype"):
        grid.add_column(heading, no_wrap=True)
    for heading in (
        "instructions", "regis-\nters", "spilled\nbytes", "shared\nbytes", "programs\nper SM",
        "load / store\nbits", "loads\npending", "Philox\nrounds", "exposed,\nof it Philox",
        "product\ngroups", "limit met, and ps per element",
    ):  # fmt: skip
        grid.add_column(heading, justify="left" if heading.startswith("limit") else "right")
    for (name, arch, dtype), methods in group(records).items():
        r = methods.get(FUSED) or methods[NONE]
        grid.add_row(
            name,
            arch,
            dtype,
            " / ".join(f"{m['instructions_per_element']:.1f}" for m in methods.values()),
            str(r["registers"]),
            str(r["spill_bytes"] or "-"),
            str(r["shared_bytes"] or "-"),
            str(r["programs"]),
            f"{_widest(r['loads'])} / {_widest(r['stores'])}",
            "-" if r["loads_pending"] is None else str(r["loads_pending"]),
            f"{r['philox_rounds']:.2f}" if r["p_positive"] else "-",
            *_products(r["products"]),
            "\n".join(_limits(list(methods.values()), i) for i in range(len(r["limits"]))),
        )
    return grid


def _widest(bits: dict[str, int]) -> str:
    return max(bits, key=int) if bits else "-"


def _products(found: dict[str, int] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{found['instructions']}, {found['philox']}", str(found["groups"])


def _limits(records: Sequence[Record], device: int) -> str:
    found = [r["limits"][device] for r in records]
    shown = " / ".join(f"{f['limit']} {f['ps'][f['limit']]:.3g}" for f in found)
    return f"{found[0]['device']}: {shown}"


def notes(records: Sequence[Record]) -> list[str]:
    """Explanations of the table."""
    archs = {r["arch"] for r in records}
    lines = [
        "Counts are static: each instruction counts once, and of several loops the shortest. "
        "Limits are bounds from published figures, and nothing is timed: memory bandwidth, issue "
        "slots, the rates of integer multiplication, of logic and of special functions, tensor "
        "cores.",
        "Exposed (only sm_90, with asynchronous products): the instructions of an iteration from "
        "each wait for all products to the next product, the products of Philox among these, and "
        "the groups of products that are waited for. Loads pending: groups of asynchronous copies "
        "that keep running while an iteration waits.",
    ]
    lines += [f"{d.name} ({d.arch}): {d.source}." for d in DEVICES if d.arch in archs]
    return lines


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw bars of instructions per element, one panel per architecture."""
    import matplotlib

    # For a name without a suffix matplotlib adds .png.
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    with matplotlib.rc_context({"font.size": 8}), replacing(path) as draft:
        _draw(records).savefig(draft, dpi=100)


def _draw(records: Sequence[Record]) -> Figure:
    from matplotlib.figure import Figure

    groups = group(records)
    panels = list(dict.fromkeys((arch, dtype) for _, arch, dtype in groups))
    names = list(dict.fromkeys(name for name, _, _ in groups))
    size = (4 + 2.6 * len(panels), 1.6 + 0.27 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (arch, dtype) in zip(grid[0], panels, strict=True):
        for i, (method, label) in enumerate(METHODS.items()):
            bars = [
                (at, groups[name, arch, dtype][method]["instructions_per_element"])
                for at, name in enumerate(names)
                if method in groups.get((name, arch, dtype), {})
            ]
            at = [n + (i - 1) * 0.28 for n, _ in bars]
            axes.barh(at, [n for _, n in bars], 0.28, color=COLOURS[method], label=label)
        axes.set_title(f"{arch}, {dtype}")
        axes.set_yticks(range(len(names)), [n.replace("scaled_dot_product_", "") for n in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("instructions per element")
    handles = {t: h for a in grid[0] for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), frameon=False, ncols=3, loc="outside upper center"
    )
    return figure
