"""``tridrop bench``: times with a progress bar, prints a table, writes JSON, CSV and a plot."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ...base import terminal
from ...base.files import replacing, write_csv
from ..inspection import DTYPES
from . import models, op_report, plots, step_report, steps
from .machine import Machine
from .options import Options
from .providers import PROVIDERS
from .rows import OPS
from .run import run
from .timing import MODES

CLONE = Path(__file__).parents[3] / "benchmarks" / "results"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers separated by commas"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop bench``."""
    for option, names, default in (
        ("op", ("all", *OPS), "all"),
        ("dtype", tuple(DTYPES), "bf16 on cuda, fp32 and bf16 on a cpu"),
        ("mode", MODES, "all"),
        ("provider", (*PROVIDERS, steps.MEMORY, steps.BOTH), "all"),
    ):
        parser.add_argument(
            f"--{option}",
            type=_names,
            action="extend",
            metavar="NAME,...",
            help=f"some of: {', '.join(names)} (default: {default})",
        )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: cuda if there is a GPU)')
    parser.add_argument(
        "--size", type=_names, action="extend", metavar="ROWSxCOLS,...",
        help="sizes of all ops except attention",
    )  # fmt: skip
    for option, text in (
        ("length", "sequence lengths of attention"),
        ("head-dim", "head dimensions of attention"),
    ):
        parser.add_argument(
            f"--{option}", type=_numbers, action="extend", metavar="N,...", help=text
        )
    parser.add_argument(
        "--p", type=float, default=0.1, help="the rate, timed next to 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, help="number of rounds (default: 30 on cuda, 15 on a cpu)"
    )
    parser.add_argument(
        "--threads", type=int, help="number of torch's threads on a cpu (default: torch's)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer ops, sizes and rounds, and one row per op"
    )
    parser.add_argument(
        "--all-rows",
        action="store_true",
        help="time every row of tridrop check that can have other sizes",
    )
    parser.add_argument(
        "--steps",
        type=_names,
        action="extend",
        metavar="NAME,...",
        help=f"time training steps instead of ops, of some of: {', '.join(models.ARCHITECTURES)}",
    )
    parser.add_argument(
        "--model-size",
        help='with --steps: "full" or "tiny" (default: full on cuda without --quick)',
    )
    parser.add_argument("--batch", type=int, help="with --steps: sequences or images per step")
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: benchmarks/results in a clone)"
    )
    parser.add_argument("--label", default="", help="is added to the names of the files")


def main(args: argparse.Namespace) -> int:
    """Run it. Returns 0, 1 if a check failed, 2 if it cannot run with these options, and 130 after
    Ctrl-C, which still writes what was timed."""
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
    console = Console(highlight=False)
    times = _time_steps if args.steps else _time_ops
    return times(args, device, lambda kind: Files(Machine(device), out, args.label, kind), console)


Open = Callable[[str], "Files"]


def _time_ops(args: argparse.Namespace, device: str, files: Open, console: Console) -> int:
    for name in ("model_size", "batch"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --steps")
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
    written = files("bench")
    records, status = _with_progress(run, options, written)
    if not records:
        return status
    terminal.show([op_report.table(records)])
    return _conclude(
        console, op_report.failures(records), op_report.reasons(records),
        written.paths + plots.draw(records, written.stem), status,
    )  # fmt: skip


def _time_steps(args: argparse.Namespace, device: str, files: Open, console: Console) -> int:
    for name in ("op", "size", "length", "head_dim", "mode", "all_rows"):
        if getattr(args, name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is for ops, --steps for models: give only one of them")
    options = steps.StepOptions.of(
        device,
        args.steps,
        dtypes=args.dtype,
        providers=args.provider,
        size=args.model_size,
        batch=args.batch,
        p=args.p,
        rounds=args.rounds,
        quick=args.quick,
    )
    written = files("bench-steps")
    records, status = _with_progress(steps.run, options, written)
    if not records:
        return status
    terminal.show([step_report.table(records)])
    for line in step_report.headlines(records):
        console.print(line, soft_wrap=not console.is_terminal)
    return _conclude(
        console, step_report.failures(records), step_report.reasons(records),
        written.paths + step_report.draw(records, written.stem), status,
    )  # fmt: skip


def _conclude(
    console: Console,
    failures: Sequence[str],
    reasons: Sequence[str],
    paths: Sequence[Path],
    status: int,
) -> int:
    """Print what failed, what could not run and what was written; return the exit status."""
    for text in failures:
        console.print(f"[bold red]FAIL[/] {escape(text)}", soft_wrap=not console.is_terminal)
    for text in reasons:
        console.print(f"[yellow]not run:[/] {escape(text)}", soft_wrap=not console.is_terminal)
    console.print("Written: " + ", ".join(map(str, paths)), soft_wrap=True)
    return status or (1 if failures else 0)


def _with_progress(
    time: Callable[..., list[Any]], options: Any, files: Files
) -> tuple[list[Any], int]:
    """The records, and 0 or the exit status of an interrupt."""
    kept: list[Any] = []

    def on_records(records: list[Any]) -> None:
        files.write([asdict(r) for r in records])
        kept[:] = records

    with terminal.bar() as progress:
        task = progress.add_task("timing", total=None)
        done = iter((0,))
        try:
            records = time(
                options,
                on_start=lambda total: progress.update(task, total=total),
                on_row=lambda what: progress.update(
                    task, advance=next(done, 1), description=escape(what)
                ),
                on_records=on_records,
            )
        except KeyboardInterrupt:
            said = ": what was timed is kept" if kept else ": nothing was timed yet"
            return kept, terminal.interrupted("bench", said)
    return records, 0


def folder(given: Path | None) -> Path:
    """The folder for results; raises ValueError if none is given and this is no clone."""
    if given is None and not CLONE.is_dir():
        raise ValueError("this is no clone of the repository: give --out FOLDER")
    found = given or CLONE
    found.mkdir(parents=True, exist_ok=True)
    return found


class Files:
    """KIND-DEVICE-DATE[-LABEL].json and .csv. Both are rewritten as records come, so that an
    interrupted run keeps what was timed."""

    def __init__(self, machine: Machine, out: Path, label: str, kind: str) -> None:
        self._about = machine.about()
        parts = (kind, machine.slug, self._about["date"], label)
        self.stem = out / "-".join(filter(None, parts))
        # The stem may contain dots, which with_suffix would take for a suffix.
        self.paths = [Path(f"{self.stem}.json"), Path(f"{self.stem}.csv")]

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records, of which there must be at least one."""
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
        with replacing(self.paths[0]) as draft:
            draft.write_text(f'{{"about":{json.dumps(self._about)},\n"records":[\n{lines}\n]}}\n')
        write_csv(self.paths[1], records)
