"""``tridrop demo``: shows on real text what dropout is for, and that tridrop's dropout does it.

It trains one small model without dropout, with PyTorch's and with tridrop's, from the same weights
and on the same order of the data, and writes a table, results.json, demo.png and demo.svg, which
docs/demo.md explains. ``--experiment`` runs one of the experiments of docs/experiments.md instead.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from . import architectures, experiments, report, text, train
from .display import Display
from .options import DemoError, Options, add_arguments, resolve
from .place import backend_of, check_backend, device_of
from .plan import Plan
from .stops import INTERRUPTED, TERMINATED, Terminated, Terminations

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the demo with the arguments of :func:`add_arguments`; return the exit status.

    0: done. 1: a loss is no longer finite. 2: it cannot run with these options. 130: interrupted.
    143: ended by SIGTERM. After 1, 130 and 143 the results so far are written.
    """
    console = Console(highlight=False)
    try:
        if args.experiment is not None:
            return experiments.run(console, args)
        options = resolve(args)
        plan = Plan(options.steps, options.eval_every, options.seconds)
        report.check_plotting()
        architectures.check(options.model)
        device = device_of(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        source = text.load(options.text)
        slices = text.split(source[1], options.train_bytes, options.valid_bytes)
        with backend_of(options.backend), Terminations() as terminations:
            backend = check_backend(device)
            status = _run(console, options, plan, device, backend, source, slices, terminations)
            return terminations.status(status)
    except Terminated:  # before there was anything to keep
        return TERMINATED
    except (DemoError, OSError) as error:
        print(f"tridrop demo: error: {error}", file=sys.stderr)
        return 2


def _run(
    console: Console,
    options: Options,
    plan: Plan,
    device: torch.device,
    backend: str,
    source: tuple[str, bytes],
    slices: tuple[torch.Tensor, torch.Tensor],
    terminations: Terminations,
) -> int:
    """Train, then write and show the results."""
    runs = train.make_runs(options, device, plan)
    record = train.Record()
    console.print(
        f"Training on {options.train_bytes:,} bytes of {source[0]} on {device} (tridrop's backend: "
        f"{backend}), validating on {options.valid_bytes:,} others. Ctrl-C keeps the results so "
        "far."
    )
    status, threads = 0, torch.get_num_threads()
    try:
        with Display(console, runs, options) as display:
            train.train(runs, *slices, options, plan, record, display)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except train.Diverged as error:
        print(f"tridrop demo: error: {error}", file=sys.stderr)
        status = 1
    finally:
        terminations.finish()
        ran = torch.get_num_threads()
        torch.set_num_threads(threads)
    if not record.steps:
        console.print("Nothing has been measured yet.")
        return status
    where = report.environment(device, backend)
    where["device"]["threads"] = ran
    result = report.summary(
        runs, record, options, plan, source, where, interrupted=status == INTERRUPTED
    )
    written = [report.write_json(result, options.out), *report.plot(result, options.out)]
    for made in (run.swapped for run in runs if run.swapped is not None):
        console.print(made)
    console.print(report.table(result))
    for note in report.notes(result):
        console.print(note)
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)
    return status
