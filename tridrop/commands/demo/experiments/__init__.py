"""``tridrop demo --experiment``: what dropout does, on real data that comes with a package.

Each experiment is a function of settings, a device and a progress bar with a result of JSON values;
of functions that draw the result into figures; and of one that says in sentences what was found.
docs/experiments.md tells how to read them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from .. import report
from ..place import backend_of, check_backend, device_of
from ..stops import INTERRUPTED, Terminations
from . import lora, masks, overfit, uncertainty
from .progress import Bar, bar
from .settings import Settings, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]


@dataclass(frozen=True)
class _Experiment:
    """``ticks`` is how many steps of the bar ``measure`` takes."""

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
    """Run the experiment that ``args`` names, and write and say what it found; the exit status.

    Raises DemoError where it cannot run as it was asked to.
    """
    settings = resolve(args)
    report.check_plotting()
    device = device_of(settings.device)
    experiment = _EXPERIMENTS[settings.experiment]
    with backend_of(settings.backend), _one_thread(), Terminations() as terminations:
        where = report.environment(device, check_backend(device), "scikit-learn", "peft")
        try:
            with bar(console, experiment.ticks(settings)) as progress:
                measured = experiment.measure(settings, device, progress)
        except KeyboardInterrupt:
            console.print("Interrupted before there was anything to keep: nothing is written.")
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
            f"Interrupted: these are the seeds that were done, of {settings.repeats}."
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    written = [report.write_json(result, settings.out, settings.experiment)]
    for name, draw in experiment.figures.items():
        written += report.save(partial(draw, result), settings.out, name)
    for line in result["findings"]:
        console.print(line)
    console.print("Written: " + ", ".join(str(path) for path in written), soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The images are small: a second thread would only wait. Sums then have one order anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
