"""The results of the runs: as numbers, as a table, as JSON and as a plot."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

import tridrop

from ...base import terminal
from ...base.files import replacing
from ..info import versions
from .architectures import TITLES
from .options import DemoError, Options
from .plan import Plan
from .train import EAGER, Record, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, whose colours are distinct for every kind of colour vision.
COLOURS = {
    "none": "#D55E00",
    "eager": "#0072B2",
    "tridrop": "#000000",
}
DASHES: Any = (0, (9, 5))


def environment(device: torch.device, backend: str, *packages: str) -> dict[str, Any]:
    """Versions, including those of ``packages``, the device and the backend."""
    found = {"python": platform.python_version(), "tridrop": tridrop.__version__}
    found |= versions("torch", "triton", "transformers", "matplotlib", *packages)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "versions": found,
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "backend": backend,
    }


def summary(
    runs: Sequence[Run],
    record: Record,
    options: Options,
    plan: Plan,
    text: tuple[str, bytes],
    where: dict[str, Any],
    interrupted: bool,
) -> dict[str, Any]:
    """All options and measurements, as JSON values.

    ``record`` has at least one evaluation.
    """
    eager = next(run for run in runs if run.name == "eager")
    return {
        "format": 1,
        **where,
        "options": options.as_json(),
        "text": {
            "name": text[0],
            "bytes": len(text[1]),
            "sha256": hashlib.sha256(text[1]).hexdigest(),
        },
        "parameters": sum(p.numel() for p in eager.model.parameters()),
        "unit": f"nats per {'masked ' * (options.model == 'bert')}byte, in evaluation mode",
        "interrupted": interrupted,
        "steps_planned": plan.steps,
        "steps_scaled": plan.why(),
        "steps_changes": plan.as_json(),
        "training_seconds": round(plan.took, 3),
        "steps_done": record.steps[-1],
        "steps": record.steps,
        "runs": {run.name: _run_summary(run, eager, record) for run in runs},
        "swap": next((run.swapped.to_dict() for run in runs if run.swapped is not None), None),
        "noise": _noise(record),
    }


def _run_summary(run: Run, eager: Run, record: Record) -> dict[str, Any]:
    train, valid = record.train(run.name), record.valid(run.name)
    best = min(range(len(valid)), key=valid.__getitem__)
    return {
        "label": run.label,
        "train": train,
        "valid": valid,
        "train_final": train[-1],
        "train_best": min(train),
        "valid_final": valid[-1],
        "valid_best": valid[best],
        "valid_best_step": record.steps[best],
        "gap_final": valid[-1] - train[-1],
        "step_time_ratio": _time_ratio(run, eager),
        "saved_bytes": run.saved_bytes,
        "saved_ratio": run.saved_bytes / eager.saved_bytes,
        "peak_bytes": run.peak_bytes,
        "peak_ratio": (
            run.peak_bytes / eager.peak_bytes if run.peak_bytes and eager.peak_bytes else None
        ),
    }


def _time_ratio(run: Run, eager: Run) -> dict[str, float] | None:
    """Quartiles, over all steps, of the ratio of a step's time to that of the eager run's step.

    None if fewer than two steps were taken.
    """
    pairs = zip(run.seconds, eager.seconds, strict=False)  # an interrupt may come between the two
    ratios = [time / other for time, other in pairs]
    if len(ratios) < 2:
        return None
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": median, "low": low, "high": high}


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The root mean square difference of two curves."""
    return float(torch.dist(torch.tensor(a), torch.tensor(b))) / len(a) ** 0.5


def _noise(record: Record) -> dict[str, Any]:
    """Root mean square differences of validation curves, in nats per byte: the mean over the pairs
    of eager runs, and the means from tridrop and from no dropout to these. And the last losses: the
    lowest and the highest of the eager runs, and tridrop's."""
    curves = [record.valid(name) for name in EAGER]
    pairs = [_distance(a, b) for i, a in enumerate(curves) for b in curves[:i]]
    found: dict[str, Any] = {"eager_to_eager": statistics.fmean(pairs)}
    for name in ("tridrop", "none"):
        curve = record.valid(name)
        found[f"{name}_to_eager"] = statistics.fmean(_distance(curve, c) for c in curves)
    for what, of in (("train", record.train), ("valid", record.valid)):
        last = [of(name)[-1] for name in EAGER]
        found[f"{what}_final"] = {
            "eager_low": min(last), "eager_high": max(last), "tridrop": of("tridrop")[-1],
        }  # fmt: skip
    return found


def notes(result: dict[str, Any]) -> list[str]:
    """Explanations of the table, of a sentence or two each."""
    noise = result["noise"]
    last = [
        f"{what} {noise[key]['tridrop']:.3f} (eager {noise[key]['eager_low']:.3f} to "
        f"{noise[key]['eager_high']:.3f})"
        for what, key in (("training", "train_final"), ("validation", "valid_final"))
    ]
    lines = [
        "Losses are in nats per byte, with dropout off, after the last step and (best). Time is "
        "the median over the steps of the ratio to the eager run; the runs take turns. The eager "
        "runs differ only in their masks: differences between them are noise.",
        f"Root mean square differences of validation curves: between eager runs "
        f"{noise['eager_to_eager']:.3f}, tridrop to eager runs {noise['tridrop_to_eager']:.3f}, no "
        f"dropout to eager runs {noise['none_to_eager']:.3f}. Last losses of tridrop: "
        f"{', '.join(last)}. A fourth eager run would lie outside of the other three in half of "
        "all cases, so one run cannot show a small difference: repeat it with another --seed.",
    ]
    if result["steps_scaled"]:
        lines.append(f"{result['steps_scaled']}.")
    if result["backend"] != "triton":
        lines.append(
            "This run shows that tridrop is correct, not how fast it is: its kernels are for GPUs, "
            f"and here the {result['backend']} backend runs."
        )
    if result["interrupted"]:
        lines.append(f"Interrupted: results up to step {result['steps_done']}.")
    return lines


def table(result: dict[str, Any]) -> Table:
    """The summary as a table for the terminal."""
    on_gpu = result["device"]["type"] == "cuda"
    # Narrow enough for 80 columns; with the peak of a GPU the last ones wrap rather than be cut.
    columns = ["train loss\n(best)", "valid loss\n(best)", "gap", "time\n/ eager"]
    columns += ["saved MiB\n(/ eager)"]
    columns += ["peak MiB\n(/ eager)"] if on_gpu else []
    view = terminal.table(
        f"size {result['options']['size']}: {result['parameters']:,} parameters, "
        f"{result['steps_done']} steps"
    )
    view.add_column("run", no_wrap=True)
    for column in columns:
        view.add_column(column, justify="right", no_wrap="MiB" not in column)
    for run in result["runs"].values():
        ratio = run["step_time_ratio"]
        cells = [
            f"{run['train_final']:.2f} ({run['train_best']:.2f})",
            f"{run['valid_final']:.2f} ({run['valid_best']:.2f})",
            f"{run['gap_final']:.2f}",
            f"{ratio['median']:.2f}" if ratio else "-",
            _memory(run["saved_bytes"], run["saved_ratio"]),
        ]
        cells += [_memory(run["peak_bytes"], run["peak_ratio"])] if on_gpu else []
        view.add_row(run["label"], *cells)
    return view


def _memory(size: int, ratio: float) -> str:
    return f"{size / 2**20:.1f} ({ratio:.2f})"


def write_json(result: dict[str, Any], folder: Path, name: str = "results") -> Path:
    """Write ``name``.json into ``folder`` and return its path."""
    path = folder / f"{name}.json"
    with replacing(path) as draft:
        draft.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def check_plotting() -> None:
    """Raise a DemoError that says what to install, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("the plot needs matplotlib: pip install 'tridrop[demo]'")


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the curves into demo.png and demo.svg in ``folder`` and return their paths."""
    return save(lambda: _draw(result), folder, "demo")


def save(draw: Callable[[], Figure], folder: Path, name: str) -> list[Path]:
    """Write the figure of ``draw`` as ``name``.png and .svg into ``folder``; return their paths."""
    import matplotlib

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Without a date and with a fixed salt, the same curves give the same file.
    settings: dict[Any, Any] = {
        "svg.hashsalt": "tridrop",
        "svg.fonttype": "none",
        "lines.scale_dashes": False,
    }
    with matplotlib.rc_context(settings):
        figure = draw()
        with replacing(paths[0]) as draft:
            figure.savefig(draft, dpi=120)
        with replacing(paths[1]) as draft:
            figure.savefig(draft, metadata={"Date": None})
    return paths


def _draw(result: dict[str, Any]) -> Figure:
    """The training and validation curves of all runs."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    steps, runs = result["steps"], result["runs"]
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for part, style in (("valid", "-"), ("train", DASHES)):
        curves = [runs[name][part] for name in EAGER]
        low, high = (list(map(pick, zip(*curves, strict=True))) for pick in (min, max))
        # The band shows differences due to masks alone. It has an edge, so that it is visible where
        # it is narrow; tridrop is a thin line over it.
        axes.fill_between(
            steps, low, high, color=COLOURS["eager"], alpha=0.35, linewidth=2.5,
            label=f"eager dropout, {len(EAGER)} draws of masks" if part == "valid" else None,
        )  # fmt: skip
        for name, width in (("none", 2.0), ("tridrop", 1.2)):
            label = runs[name]["label"] if part == "valid" else None
            axes.plot(
                steps, runs[name][part], linestyle=style, color=COLOURS[name], linewidth=width,
                label=label,
            )  # fmt: skip
    none = runs["none"]
    if none["valid_best_step"] < result["steps_done"]:
        axes.plot(none["valid_best_step"], none["valid_best"], "o", color=COLOURS["none"])
        axes.annotate(
            f"without dropout: best at step {none['valid_best_step']}",
            (steps[-1], none["valid_final"]),
            xytext=(0, 8),
            textcoords="offset points",
            color=COLOURS["none"],
            ha="right",
        )
    options = result["options"]
    title = f"The same {TITLES[options['model']]} on the same {options['train_bytes']:,} bytes"
    axes.set_title(f"{title}, p = {options['p']}")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss in nats per byte, dropout off")
    # The losses of the first steps, from log(256) down, would flatten all that follows.
    axes.set_ylim(0, 1.15 * max(max(r["valid"][len(steps) // 10 :]) for r in runs.values()))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    grey: dict[str, Any] = {"color": "grey", "linewidth": 2}
    kinds = [
        Line2D([], [], label="validation", **grey),
        Line2D([], [], label="training", linestyle=DASHES, **grey),
    ]
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *kinds], frameon=False, ncols=3, loc="outside lower center")
    return figure
