"""Does a network know when it does not know? One pass without dropout against Monte Carlo dropout.

Networks that were trained with dropout on nine of the ten digits predict test images of these, the
same images rotated, and images of the tenth digit. Gal and Ghahramani, "Dropout as a Bayesian
approximation: representing model uncertainty in deep learning", ICML 2016.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tridrop

from . import digits
from .measures import BINS, calibration_error, judge, paired, reliability, spread
from .progress import Bar
from .settings import Settings
from .training import logits_of, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {"single": "one pass, dropout off", "ensemble": "Monte Carlo dropout, averaged"}
COLOURS = {"single": "#D55E00", "ensemble": "#0072B2", "information": "#009E73"}
ANGLES = range(0, 181, 30)
_CHUNK = 1024  # how many pairs of a member and an image are computed together


def ticks(settings: Settings) -> int:
    """One per training step, and one per set of images that a network predicts."""
    return settings.repeats * (settings.steps + 2 + len(ANGLES))


def measure(settings: Settings, device: torch.device, progress: Bar) -> dict[str, Any]:
    """Train the networks, each without one digit, and let them predict known and unknown digits."""
    data = digits.load(device)
    judged: list[tuple[dict[str, Tensor], Tensor]] = []

    def network(i: int) -> dict[str, Any]:
        seed, left_out = settings.seed + i, i % digits.CLASSES
        progress.begin(f"seed {seed}, without the {left_out}")
        known = data.take(data.y != left_out)
        parts = digits.split(known, seed, settings.train, settings.valid)
        model = digits.network(settings.p, seed, device)
        train(
            model, parts[0], parts[1],
            seed=seed, steps=settings.steps, every=settings.steps, tick=progress.tick,
        )  # fmt: skip
        shown = _Shown(model, settings.samples, seed, progress)
        test, strange = shown(parts[2].x), shown(data.take(data.y == left_out).x)
        found: dict[str, Any] = {
            "seed": seed,
            "left_out": left_out,
            "images": {"test": len(parts[2].y), "left_out": len(strange["information"])},
            "test": {way: _quality(test[way], parts[2].y) for way in WAYS},
            "known": _entropies(test),
            "unknown": _entropies(strange),
            "separation": _separation(test, strange),
            "rotated": _rotated(shown, parts[2].take(torch.arange(settings.rotated))),
        }
        one, many = (100 * found["test"][way]["accuracy"] for way in WAYS)
        progress.say(
            f"seed {seed}, without the {left_out}, test accuracy: one pass {one:.1f} %, "
            f"ensemble {many:.1f} %"
        )
        judged.append((test, parts[2].y))
        return found

    networks = progress.each(range(settings.repeats), network)
    return {
        "bins": BINS,
        "angles": list(ANGLES),
        "networks": networks,
        "reliability": _pooled(judged[: len(networks)]),
        "summary": _summary(networks),
    }


class _Shown:
    """The predictions of a network, by one pass and as an ensemble."""

    def __init__(self, model: nn.Module, samples: int, seed: int, progress: Bar) -> None:
        self.model, self.samples, self.seed, self.progress = model, samples, seed, progress

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Probabilities [n, classes] by each of WAYS, and the mutual information [n]."""
        said = tridrop.mc_predict(
            self.model, x, samples=self.samples, seed=self.seed, output="logits", chunk=_CHUNK
        )
        assert said.mutual_information is not None  # it is None only for output="values"
        self.progress.tick()
        return {
            "single": logits_of(self.model, x).softmax(1),
            "ensemble": said.mean,
            "information": said.mutual_information,
        }


def _quality(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats and expected calibration error."""
    confidence, guess = probabilities.max(1)
    return {
        "accuracy": float((guess == y).double().mean()),
        "loss": float(F.nll_loss(probabilities.log(), y)),
        "calibration_error": calibration_error(reliability(confidence, guess == y)),
    }


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _doubts(said: dict[str, Tensor]) -> dict[str, Tensor]:
    """The uncertainty about each image: entropies of both ways, and the members' disagreement."""
    return {
        **{way: _entropy(said[way]) for way in WAYS},
        "information": said["information"],
    }


def _entropies(said: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(doubt.mean()) for name, doubt in _doubts(said).items()}


def _separation(known: dict[str, Tensor], unknown: dict[str, Tensor]) -> dict[str, float]:
    """The area under the ROC curve: how often an image of the unknown digit is more uncertain than
    one of a known digit; 0.5 is chance."""
    area = importlib.import_module("sklearn.metrics").roc_auc_score
    strange = torch.tensor([0] * len(known["information"]) + [1] * len(unknown["information"]))
    return {
        name: float(area(strange.numpy(), torch.cat((doubt, _doubts(unknown)[name])).cpu().numpy()))
        for name, doubt in _doubts(known).items()
    }


def _rotated(shown: _Shown, images: digits.Images) -> list[dict[str, Any]]:
    """Accuracies and uncertainties for images rotated by ANGLES."""
    found = []
    for angle in ANGLES:
        said = shown(rotate(images.x, angle))
        right = {way: (said[way].argmax(1) == images.y).double().mean() for way in WAYS}
        found.append(
            {
                "angle": angle,
                "accuracy": {way: float(share) for way, share in right.items()},
                "doubt": _entropies(said),
            }
        )
    return found


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Images [n, 1, height, width] rotated counter-clockwise about their centres.

    The interpolation is bilinear, with 0 outside of the image.

    >>> x = torch.arange(4.0).view(1, 1, 2, 2)
    >>> rotate(x, 90).round().view(2, 2)
    tensor([[1., 3.],
            [0., 2.]])
    """
    turn = math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _pooled(judged: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Any]:
    """The intervals of confidence over the test images of all networks together."""
    found = {}
    for way in WAYS:
        confidence, guess = torch.cat([said[way] for said, _ in judged]).max(1)
        found[way] = reliability(confidence, guess == torch.cat([y for _, y in judged]))
    return found


def _summary(networks: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over the networks, and the differences between the two ways."""
    found: dict[str, Any] = {}
    for name in ("accuracy", "loss", "calibration_error"):
        values = {way: [one["test"][way][name] for one in networks] for way in WAYS}
        found[name] = _both(values)
    for name in ("known", "unknown", "separation"):
        values = {key: [one[name][key] for one in networks] for key in COLOURS}
        found[name] = _both(values) | {"information": spread(values["information"])}
    found["rotated"] = [
        {key: spread([one["rotated"][i]["doubt"][key] for one in networks]) for key in COLOURS}
        | {
            "angle": angle,
            "accuracy": _both(
                {way: [one["rotated"][i]["accuracy"][way] for one in networks] for way in WAYS}
            ),
        }
        for i, angle in enumerate(ANGLES)
    ]
    return found


def _both(values: dict[str, list[float]]) -> dict[str, Any]:
    return {way: spread(values[way]) for way in WAYS} | {
        "difference": paired(values["single"], values["ensemble"])
    }


# --------------------------------------------------------------------------------------- sentences


def findings(result: dict[str, Any]) -> list[str]:
    """The findings, in sentences whose numbers and words follow from the results."""
    found, asked = result["summary"], result["options"]
    turned = found["rotated"][result["angles"].index(90)]
    right = [f"{100 * turned['accuracy'][way]['mean']:.0f} %" for way in WAYS]
    return [
        f"{len(result['networks'])} networks, each trained without one digit (p = {asked['p']}); "
        f"{asked['samples']} ensemble members each; mean ± standard deviation over the networks; "
        "entropy and loss in nats.",
        _judge("Averaging the members {} the test accuracy", found["accuracy"], 100, " %"),
        _judge("Averaging the members {} the test loss", found["loss"], 1, ""),
        _judge(
            "Averaging the members {} the expected calibration error "
            f"({result['bins']} bins, separately for each network)",
            found["calibration_error"],
            100,
            " %",
        ),
        f"Mean entropy on known test digits: {_both_plain(found['known'])}; on the digit that was "
        f"left out: {_both_plain(found['unknown'])}.",
        f"On known digits rotated by 90 degrees: {_both_plain(turned)}, where {right[0]} and "
        f"{right[1]} are correct.",
        _judge(
            "Averaging the members {} how well entropy tells the left-out digit from known ones "
            "(area under the ROC curve; 0.5 is chance)",
            found["separation"],
            1,
            "",
        ),
        "The mutual information of the members tells these apart with an area of "
        f"{_plain(found['separation']['information'])}.",
    ]


def _judge(claim: str, found: dict[str, Any], factor: float, unit: str) -> str:
    return judge(claim, (found["single"], found["ensemble"], found["difference"]), factor, unit)


def _both_plain(found: dict[str, Any]) -> str:
    return f"one pass {_plain(found['single'])}, ensemble {_plain(found['ensemble'])}"


def _plain(one: dict[str, float]) -> str:
    return f"{one['mean']:.3f} ± {one['sd']:.3f}"


# ----------------------------------------------------------------------------------------- figures


def draw(result: dict[str, Any]) -> Figure:
    """Uncertainty and accuracy against the angle; uncertainty of known and left-out digits."""
    from matplotlib.figure import Figure

    networks, angles = result["networks"], result["angles"]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    doubt, right, classes = figure.subplots(1, 3)
    turned = [[one["rotated"][i] for one in networks] for i in range(len(angles))]
    for key, label in _LABELS.items():
        style: dict[str, Any] = {"color": COLOURS[key], "capsize": 3}
        points = [[one["doubt"][key] for one in at] for at in turned]
        doubt.errorbar(angles, *_range(points), label=label, **style)
        ends = [[one[name][key] for one in networks] for name in ("known", "unknown")]
        classes.errorbar([0, 1], *_range(ends), **style)
    for way in WAYS:
        points = [[one["accuracy"][way] for one in at] for at in turned]
        right.errorbar(angles, *_range(points), color=COLOURS[way], capsize=3)
    doubt.set_title("known digits, rotated: uncertainty")
    right.set_title("known digits, rotated: accuracy")
    classes.set_title("not rotated: uncertainty, by class")
    classes.set_xticks([0, 1], ["known", "left out"])
    classes.set_xlim(-0.4, 1.4)
    for axes in (doubt, right):
        axes.set_xlabel("angle in degrees")
        axes.set_xticks(angles)
    for axes, label in ((doubt, "nats"), (right, "fraction correct"), (classes, "nats")):
        axes.set_ylabel(label)
        axes.set_ylim(0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"mean over {len(networks)} networks; bars from the lowest to the highest"
    figure.legend(ncols=3, frameon=False, loc="outside lower center", title=title)
    return figure


def _range(points: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """For each point the mean, and its distances to the lowest and the highest value.

    Bars of a standard deviation could exceed the bounds of entropies and accuracies.
    """
    means = [sum(values) / len(values) for values in points]
    below = [mean - min(values) for mean, values in zip(means, points, strict=True)]
    above = [max(values) - mean for mean, values in zip(means, points, strict=True)]
    return means, [below, above]


_LABELS = {
    "single": "entropy of one pass",
    "ensemble": "entropy of the averaged ensemble",
    "information": "mutual information of the members",
}


def draw_reliability(result: dict[str, Any]) -> Figure:
    """Accuracy against confidence, and the number of test images for each confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for i, way in enumerate(WAYS):
        error = calibration_error(result["reliability"][way])
        _reliability(panels[:, i], result["reliability"][way], COLOURS[way])
        panels[0, i].set_title(f"{WAYS[way]}\nall networks: ECE {100 * error:.2f} %", fontsize=10)
        panels[1, i].set_xlabel("confidence")
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("images")
    panels[1, 0].set_yscale("log")
    return figure


def _reliability(panels: Any, found: list[dict[str, Any]], colour: str) -> None:
    """Bars of accuracy, and marks at (confidence, accuracy), which should lie on the diagonal."""
    top, bottom = panels
    full = [one for one in found if one["count"]]
    width = 1 / len(found)
    left = [one["low"] for one in full]
    heights = [one["accuracy"] for one in full]
    top.bar(left, heights, width, align="edge", color=colour, alpha=0.35, edgecolor="white")
    top.plot([one["confidence"] for one in full], heights, "o", color=colour, markersize=4)
    top.plot([0, 1], [0, 1], color="grey", linewidth=1)
    bottom.bar(left, [one["count"] for one in full], width, align="edge", color=colour, alpha=0.6)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
