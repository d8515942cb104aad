"""The command line, also ``python -m tridrop``: check, bench, demo, inspect, warmup and info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from . import demo, warmup
    from .bench import report as timed
    from .check import report
    from .inspection import report as inspected

    top = argparse.ArgumentParser(
        prog="tridrop",
        description="Dropout fused into transformer blocks, with a mask that anyone can check.",
    )
    top.add_argument("--version", action="version", version=f"tridrop {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="compare every op with eager PyTorch under the same mask",
        description="Checks each op, dtype and backend: values and gradients against eager PyTorch "
        "under the exported mask, expected values over many seeds, that forward and backward use "
        "the exported mask, and the bytes saved for backward. The exit status is 1 if anything "
        "fails. On a machine without a GPU, TRITON_INTERPRET=1 in the environment runs the Triton "
        "kernels too.",
    )
    report.add_arguments(check)
    check.set_defaults(run=report.main)

    bench = commands.add_parser(
        "bench",
        help="check every op, and time it against eager PyTorch and torch.compile",
        description="Times the rows of tridrop check at the sizes of a transformer, in rounds in "
        "which eager PyTorch, torch.compile, torch's attentions, tridrop and a device copy take "
        "turns. Reports time, bandwidth, memory, host time, launches, and what dropout costs. If a "
        "check fails, the exit status is 1 and that row shows no speed-up. docs/performance.md "
        "explains the figures.",
    )
    timed.add_arguments(bench)
    bench.set_defaults(run=timed.main)

    shown = commands.add_parser(
        "demo",
        help="train a small GPT on real text: without dropout, with eager dropout, with tridrop",
    )
    demo.add_arguments(shown)
    shown.set_defaults(run=demo.run)

    inspect = commands.add_parser(
        "inspect",
        help="compile every kernel, without a GPU: instructions per element, registers, limits",
        description="Compiles the kernels as they would be launched for the sizes of a "
        "transformer, for GPUs that this machine need not have, and counts in the machine code: "
        "instructions per element, registers, spills, shared memory, widths of loads and stores, "
        "Philox rounds. Next to each kernel stands the same without dropout, and for dropout_add "
        "one with a Philox call per element. docs/performance.md explains the figures.",
    )
    inspected.add_arguments(inspect)
    inspect.set_defaults(run=inspected.main)

    warm = commands.add_parser(
        "warmup",
        help="compile the CPU loops ahead, so that no first call waits for it",
        description="Compiles the CPU loops for this machine in several processes, and keeps them "
        "on disk, where every later process finds them. Triton's kernels are not compiled here: "
        "Triton compiles and keeps them at their first launch, for the sizes of that launch.",
    )
    warmup.add_arguments(warm)
    warm.set_defaults(run=warmup.main)

    info = commands.add_parser("info", help="versions, devices and backends, for a bug report")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return top


def _info(args: argparse.Namespace) -> int:
    from . import info

    return info.main(args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    from ..base import terminal

    command = ""
    try:
        args = parser().parse_args(argv)
        command = args.command
        status: int = args.run(args)
        sys.stdout.flush()  # here, where a reader that has stopped is no error
    except KeyboardInterrupt:
        return terminal.interrupted(command)
    except BrokenPipeError:
        return terminal.unread()
    return status
