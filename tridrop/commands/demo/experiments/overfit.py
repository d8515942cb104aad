"""Does dropout keep a small network from memorising its training images?

The same network is trained twice, from the same weights and on the same batches: without dropout
and with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import digits
from .measures import judge, paired, spread
from .progress import Bar
from .settings import Settings
from .training import Curves, logits_of, scores, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = {"none": "no dropout", "dropout": "dropout"}
# From the palette of Okabe and Ito, whose colours are distinct for every kind of colour vision.
COLOURS = {"none": "#D55E00", "dropout": "#0072B2"}
# The measures on test images that compare the arms. "stopped" is the network with the lowest
# validation loss, "final" the network after the last step.
MEASURES = ("final_accuracy", "final_loss", "stopped_accuracy", "stopped_loss")
SHOWN = 8


def ticks(settings: Settings) -> int:
    """One per training step."""
    return settings.repeats * len(ARMS) * settings.steps


def measure(settings: Settings, device: torch.device, progress: Bar) -> dict[str, Any]:
    """Train the pairs. Each pair has its own split, initial weights and batches."""
    data = digits.load(device)
    samples: list[dict[str, Any]] = []
    parameters = 0

    def pair(seed: int) -> dict[str, Any]:
        nonlocal parameters
        parts = digits.split(data, seed, settings.train, settings.valid)
        arms, last = {}, {}
        for arm in ARMS:
            progress.begin(f"seed {seed}, {ARMS[arm]}")
            model = digits.network(settings.p if arm == "dropout" else 0.0, seed, device)
            parameters = sum(w.numel() for w in model.parameters())
            curves = train(
                model, parts[0], parts[1],
                seed=seed, steps=settings.steps, every=settings.every, tick=progress.tick,
            )  # fmt: skip
            last[arm] = logits_of(model, parts[2].x)
            arms[arm] = _record(curves, last[arm], model, parts[2])
        said = ", ".join(f"{ARMS[a]} {100 * arms[a]['final_accuracy']:.1f} %" for a in ARMS)
        progress.say(f"seed {seed}, test accuracy: {said}")
        samples.append(_samples(parts[2], last))
        images["test"] = len(parts[2].y)
        return {"seed": seed, "arms": arms}

    images = {"train": settings.train, "valid": settings.valid}
    pairs = progress.each(range(settings.seed, settings.seed + settings.repeats), pair)
    return {
        "parameters": parameters,
        "images": images,
        "pairs": pairs,
        "summary": _summary(pairs),
        "samples": samples[0],
    }


def _record(
    curves: Curves, last: Tensor, model: torch.nn.Module, test: digits.Images
) -> dict[str, Any]:
    """The curves of a training, and its test scores at the end and at the best validation loss."""
    final = scores(last, test.y)
    model.load_state_dict(curves.best)
    stopped = scores(logits_of(model, test.x), test.y)
    return {
        "steps": curves.steps,
        **{
            name: [round(value, 5) for value in getattr(curves, name)]
            for name in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
        },
        "stopped_step": curves.best_step,
        "final_loss": final[0],
        "final_accuracy": final[1],
        "stopped_loss": stopped[0],
        "stopped_accuracy": stopped[1],
    }


def _summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each measure for both arms, and the paired differences."""
    found: dict[str, Any] = {}
    for name in (*MEASURES, "train_loss", "valid_loss", "valid_accuracy"):
        values = {arm: [_last(pair["arms"][arm][name]) for pair in pairs] for arm in ARMS}
        found[name] = {arm: spread(values[arm]) for arm in ARMS}
        found[name]["difference"] = paired(values["none"], values["dropout"])
    return found


def _last(value: Any) -> float:
    return value[-1] if isinstance(value, list) else value


def _samples(test: digits.Images, last: dict[str, Tensor]) -> dict[str, Any]:
    """The first test images, and the first that either network gets wrong; none is hand-picked."""
    wrong = torch.stack([logits.argmax(1) != test.y for logits in last.values()]).any(0)
    found = {}
    for name, chosen in (("first", torch.arange(len(test.y))), ("wrong", wrong.nonzero()[:, 0])):
        chosen = chosen[:SHOWN].to(test.y.device)
        found[name] = [
            {
                "image": (16 * test.x[i, 0]).int().tolist(),
                "digit": int(test.y[i]),
                **{arm: _prediction(logits[i]) for arm, logits in last.items()},
            }
            for i in chosen.tolist()
        ]
    return found


def _prediction(logits: Tensor) -> dict[str, Any]:
    probability, digit = logits.softmax(0).max(0)
    return {"digit": int(digit), "probability": round(float(probability), 4)}


# --------------------------------------------------------------------------------------- sentences


def findings(result: dict[str, Any]) -> list[str]:
    """The findings, in sentences whose numbers and words follow from the results."""
    found, asked = result["summary"], result["options"]
    none, dropout = (
        [f"{one['mean']:.3f} ± {one['sd']:.3f}" for one in (train_[arm], valid[arm])]
        for train_, valid in [(found["train_loss"], found["valid_loss"])]
        for arm in ARMS
    )
    stopped = "where the validation loss was lowest (early stopping)"
    return [
        f"Without dropout the training loss ended at {none[0]} nats and the validation loss at "
        f"{none[1]}; with dropout (p = {asked['p']}) at {dropout[0]} and {dropout[1]} (mean ± "
        f"standard deviation over {len(result['pairs'])} seeds).",
        _compare("test accuracy after the last step", found["final_accuracy"], 100, " %"),
        _compare("test loss after the last step", found["final_loss"], 1, " nats"),
        _compare(f"test accuracy {stopped}", found["stopped_accuracy"], 100, " %"),
        _compare(f"test loss {stopped}", found["stopped_loss"], 1, " nats"),
    ]


def _compare(what: str, found: dict[str, Any], factor: float, unit: str) -> str:
    """Whether dropout changed a measure by more than its spread over the seeds."""
    arms = (found["none"], found["dropout"], found["difference"])
    return judge(f"Dropout {{}} the {what}", arms, factor, unit)


# ----------------------------------------------------------------------------------------- figures


def draw_curves(result: dict[str, Any]) -> Figure:
    """Loss and accuracy over the steps, and the test accuracies of each pair."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    loss, accuracy, test = figure.subplots(1, 3, width_ratios=(4, 4, 2.2))
    units = {"loss": "nats", "accuracy": "fraction correct"}
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for arm in ARMS:
            _curves(axes, result, arm, name)
        axes.set_title(f"{name}, dropout off")
        axes.set_ylabel(units[name])
        axes.set_xlabel("training step")
    # Without the first steps, which would flatten the rest.
    later = [(run, len(run["steps"]) // 6) for run in _runs(result)]
    loss.set_ylim(0, 1.05 * max(max(run["valid_loss"][i:]) for run, i in later))
    accuracy.set_ylim(min(min(run["valid_accuracy"][i:]) for run, i in later) - 0.005, 1.005)
    for pair in result["pairs"]:
        ends = [pair["arms"][arm]["final_accuracy"] for arm in ARMS]
        test.plot([0, 1], ends, color="grey", linewidth=1, zorder=1)
        test.scatter([0, 1], ends, color=list(COLOURS.values()), zorder=2)
    test.set_xticks([0, 1], list(ARMS.values()))
    test.set_xlim(-0.4, 1.4)
    test.set_title("test, at the end")
    test.set_ylabel("fraction correct; one line per seed")
    for axes in (loss, accuracy, test):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        Line2D([], [], color=COLOURS[arm], label=label) for arm, label in ARMS.items()
    ]
    handles += [
        Line2D([], [], color="grey", label="validation"),
        Line2D([], [], color="grey", linestyle="--", label="training"),
    ]
    seeds = len(result["pairs"])
    band = f"validation, from the lowest to the highest of {seeds} seeds (lines: means)"
    handles += [Patch(color="grey", alpha=0.3, linewidth=0, label=band)]
    figure.legend(handles=handles, ncols=5, frameon=False, loc="outside lower center")
    return figure


def _runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [pair["arms"][arm] for pair in result["pairs"] for arm in ARMS]


def _curves(axes: Axes, result: dict[str, Any], arm: str, name: str) -> None:
    """For one arm, the mean over the seeds; for validation, a band from lowest to highest."""
    runs = [pair["arms"][arm] for pair in result["pairs"]]
    steps = runs[0]["steps"]
    for part, style in (("valid", "-"), ("train", "--")):
        values = list(zip(*(run[f"{part}_{name}"] for run in runs), strict=True))
        if part == "valid":
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
        mean = [sum(v) / len(v) for v in values]
        axes.plot(steps, mean, style, color=COLOURS[arm], linewidth=2)


def draw_samples(result: dict[str, Any]) -> Figure:
    """Test images with the predictions of both networks of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    titles = {"first": "the first test images", "wrong": "the first that either network gets wrong"}
    parts: Any = figure.subfigures(2, 1, hspace=0.05)
    for part, (name, title) in zip(parts, titles.items(), strict=True):
        note = ": orange without dropout, blue with dropout, bold where wrong"
        part.suptitle(title + note * (name == "first"), fontsize=10)
        row = part.subplots(1, SHOWN)
        for axes in row:
            axes.set_axis_off()
        for axes, one in zip(row, result["samples"][name], strict=False):
            _sample(axes, one)
    return figure


def _sample(axes: Axes, one: dict[str, Any]) -> None:
    """An image with its digit above and the predictions of the networks below."""
    axes.imshow(one["image"], cmap="gray_r", vmin=0, vmax=16)
    axes.set_title(f"a {one['digit']}", fontsize=10)
    for place, arm in enumerate(ARMS):
        said = one[arm]
        axes.text(
            0.5,
            -0.16 - 0.18 * place,
            f"{said['digit']} ({100 * said['probability']:.0f} %)",
            transform=axes.transAxes,
            ha="center",
            fontsize=9,
            color=COLOURS[arm],
            weight="normal" if said["digit"] == one["digit"] else "bold",
        )
