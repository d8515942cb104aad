"""``tridrop demo --experiment``: shows what dropout does, on real data from an installed package.

An experiment consists of a function that measures, of functions that draw its result into figures,
and of one that states the findings in sentences. docs/experiments.md explains them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from .. import report
from ..place import backend_of, check_backend, device_of, one_thread
from ..stops import INTERRUPTED, Terminations
from . import lora, masks, overfit, uncertainty
from .progress import Bar, bar
from .settings import Settings, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]


@dataclass(frozen=True)
class _Experiment:
    """``ticks`` gives the number of steps by which ``measure`` advances the bar."""

    ticks: Callable[[Settings], int]
    measure: Callable[[Settings, torch.device, Bar], dict[str, Any]]
    figures: dict[str, Callable[[dict[str, Any]], Figure]]
    findings: Callable[[dict[str, Any]], list[str]]


_EXPERIMENTS = {
    "overfit": _Experiment(
        overfit.ticks,
        overfit.measure,
        {"overfit": overfit.draw_curves, "overfit-samples": overfit.draw_samples},
        overfit.findings,
    ),
    "uncertainty": _Experiment(
        uncertainty.ticks,
        uncertainty.measure,
        {"uncertainty": uncertainty.draw, "calibration": uncertainty.draw_reliability},
        uncertainty.findings,
    ),
    "lora": _Experiment(lora.ticks, lora.measure, {"lora": lora.draw}, lora.findings),
    "masks": _Experiment(masks.ticks, masks.measure, {"masks": masks.draw}, masks.findings),
}


def run(console: Console, args: argparse.Namespace) -> int:
    """Run the experiment that ``args`` names, write and print its findings; return the exit status.

    Raises DemoError if it cannot run with these options.
    """
    settings = resolve(args)
    report.check_plotting()
    device = device_of(settings.device)
    experiment = _EXPERIMENTS[settings.experiment]
    # Images are small: more threads would only wait, and with one sums have one order anywhere.
    with backend_of(settings.backend), one_thread(), Terminations() as terminations:
        where = report.environment(device, check_backend(device), "scikit-learn", "peft")
        try:
            with bar(console, experiment.ticks(settings)) as progress:
                measured = experiment.measure(settings, device, progress)
        except KeyboardInterrupt:
            console.print(
                "Interrupted before there were results, of two seeds or more: nothing is written."
            )
            return terminations.status(INTERRUPTED)
        terminations.finish()
        _write(console, settings, experiment, where, measured, progress.interrupted)
        return terminations.status(INTERRUPTED if progress.interrupted else 0)


def _write(
    console: Console,
    settings: Settings,
    experiment: _Experiment,
    where: dict[str, Any],
    measured: dict[str, Any],
    interrupted: bool,
) -> None:
    result = {
        "format": 1,
        "experiment": settings.experiment,
        **where,
        "options": settings.as_json(),
        **measured,
        "interrupted": interrupted,
    }
    result["findings"] = experiment.findings(result)
    if interrupted:
        result["findings"].append(
            f"Interrupted: these are results of the seeds that were done, of {settings.repeats}."
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    written = [report.write_json(result, settings.out, settings.experiment)]
    for name, draw in experiment.figures.items():
        written += report.save(partial(draw, result), settings.out, name)
    for line in result["findings"]:
        console.print(line)
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)
