"""``tridrop bench``: time with a progress bar, print a table, write JSON, CSV and a plot."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..inspection import DTYPES
from . import plots
from .gate import PASSED
from .machine import Machine
from .options import Options
from .providers import PROVIDERS
from .records import Record
from .rows import OPS
from .run import run
from .timing import COPY, MODES

CLONE = Path(__file__).parents[2] / "benchmarks" / "results"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, N,...") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop bench``."""
    for option, known, default in (
        ("op", ("all", *OPS), "all"),
        ("dtype", tuple(DTYPES), "bf16 on cuda, fp32 and bf16 on a cpu"),
        ("mode", MODES, "all"),
        ("provider", PROVIDERS, "all"),
    ):
        parser.add_argument(
            f"--{option}",
            type=_names,
            metavar="NAME,...",
            help=f"of {', '.join(known)} (default: {default})",
        )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: cuda where there is one)')
    parser.add_argument(
        "--size", type=_names, metavar="ROWSxCOLS,...", help="of all ops but attention"
    )
    parser.add_argument("--length", type=_numbers, metavar="N,...", help="lengths of attention")
    parser.add_argument("--head-dim", type=_numbers, metavar="N,...", help="widths of its heads")
    parser.add_argument("--p", type=float, default=0.1, help="beside 0 (default %(default)s)")
    parser.add_argument("--rounds", type=int, help="default: 30 on cuda, 15 on a cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a cpu (default: torch's)")
    parser.add_argument(
        "--quick", action="store_true", help="few ops, sizes and rounds, one row an op"
    )
    parser.add_argument(
        "--all-rows", action="store_true", help="every row of tridrop check that has other sizes"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results of a clone)"
    )
    parser.add_argument("--label", default="", help="a part of the files' names")


def main(args: argparse.Namespace) -> int:
    """Run it; 0, or 1 where a check failed, or 2 where it cannot run as it was asked to."""
    threads = torch.get_num_threads()
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads {args.threads}: give 1 or more")
            torch.set_num_threads(args.threads)
        return _main(args)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"tridrop bench: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def _main(args: argparse.Namespace) -> int:
    out = folder(args.out)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib: pip install 'tridrop[demo]'")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options.of(
        device,
        ops=args.op,
        dtypes=args.dtype,
        sizes=args.size,
        lengths=args.length,
        head_dims=args.head_dim,
        modes=args.mode,
        providers=args.provider,
        p=args.p,
        rounds=args.rounds,
        quick=args.quick,
        all_rows=args.all_rows,
    )
    machine = Machine(device)
    records = _run(options)
    paths = write([asdict(r) for r in records], machine, out, args.label)
    paths += plots.draw(records, paths[0].with_suffix(""))
    # Into a file or a pipe goes the whole table, whatever a terminal's width.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table(records))
    for line in notes(records):
        console.print(line, highlight=False)
    console.print("Written: " + ", ".join(map(str, paths)), soft_wrap=True, highlight=False)
    return 1 if failures(records) else 0


def _run(options: Options) -> list[Record]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("timing", total=None)
        done = iter((0,))

        def on_row(what: str) -> None:
            progress.update(task, advance=next(done, 1), description=what.replace("[", r"\["))

        return run(options, lambda total: progress.update(task, total=total), on_row)


def folder(given: Path | None) -> Path:
    """Where results go; ValueError where that was not said and there is no clone."""
    if given is None and not CLONE.is_dir():
        raise ValueError("this is no clone of the repository: say --out FOLDER")
    found = given or CLONE
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(records: Sequence[dict[str, Any]], machine: Machine, out: Path, label: str) -> list[Path]:
    """Write bench-DEVICE-DATE[-LABEL].json and .csv; return their paths."""
    about = machine.about()
    stem = "-".join(filter(None, ("bench", machine.slug, about["date"], label)))
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    (out / f"{stem}.json").write_text(
        f'{{"about":{json.dumps(about)},\n"records":[\n{lines}\n]}}\n'
    )
    with (out / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return [out / f"{stem}.json", out / f"{stem}.csv"]


def failures(records: Sequence[Record]) -> list[str]:
    """What makes the run a failure: checks that failed, and rows that tridrop could not compute."""
    found = []
    for r in records:
        what = f"{r.case} {r.shape} {r.dtype}"
        if r.check and r.check != PASSED:
            found.append(f"{what}: no speed-up is given, since its check {r.check}")
        elif r.check and r.why_not:
            found.append(f"{what}: {r.provider} cannot run: {r.why_not}")
    return list(dict.fromkeys(found))


def table(records: Sequence[Record]) -> Table:
    """A line for every provider, row, dtype and mode; p = 0 shows in the cost of dropout."""
    grid = Table(
        title="Time, and what follows from it",
        caption="of copy: the bytes that the row must move, over the time, as a share of a device "
        "copy's speed; host: time of the call; x: times as fast as",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
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
            _shown(r.median_ms), f"{_shown(r.q20_ms)} - {_shown(r.q80_ms)}",
            _shown(r.copy_fraction), _shown(r.tflops), _mib(r.saved_bytes), _mib(r.peak_bytes),
            _shown(r.host_us), _shown(r.launches),
            "[bold red]FAIL[/]" if failed else _shown(r.speedup_over_eager),
            "[bold red]FAIL[/]" if failed else _shown(r.speedup_over_compile),
            "-" if r.dropout_cost is None else f"{r.dropout_cost:+.1%}",
        )  # fmt: skip
    return grid


def _shown(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def _mib(x: int | None) -> str:
    return "-" if x is None else f"{x / 2**20:.2f}"


def notes(records: Sequence[Record]) -> list[str]:
    """What failed, and who could not run and why."""
    lines = [f"[bold red]FAIL[/] {_plain(text)}" for text in failures(records)]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        if r.why_not:
            reasons.setdefault((r.provider, r.op, r.why_not), []).append(f"{r.p:g}")
    for (provider, op, why), rates in reasons.items():
        at = " and ".join(dict.fromkeys(rates))
        lines.append(f"[yellow]not run:[/] {provider}, {op}, p = {at}: {_plain(why)}")
    return lines


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


COLUMNS = tuple(f.name for f in fields(Record))
