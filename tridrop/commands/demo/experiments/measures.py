"""Means, spreads, paired differences, sentences about these, and calibration."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

BINS = 15  # as in Guo et al. 2017


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (with n - 1) of at least two values.

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951}
    """
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """What changes from ``first`` to ``second``, pair by pair.

    It gives the mean difference with its 95 % interval by Student's t, and the number of pairs in
    which the second value is higher.

    >>> found = paired([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    >>> found["mean"], [round(x, 3) for x in found["interval"]], found["higher"], found["pairs"]
    (2.0, [-0.484, 4.484], 3, 3)
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    found = spread(differences)
    student = importlib.import_module("scipy.stats").t  # scikit-learn brings scipy
    half = float(student.ppf(0.975, len(differences) - 1)) * found["sd"] / len(differences) ** 0.5
    return {
        "mean": found["mean"],
        "interval": [found["mean"] - half, found["mean"] + half],
        "higher": sum(d > 0 for d in differences),
        "pairs": len(differences),
    }


def judge(
    claim: str,
    found: tuple[dict[str, float], dict[str, float], dict[str, Any]],
    factor: float,
    unit: str,
) -> str:
    """A sentence about a difference; it says "raised" or "lowered" only if the interval excludes 0.

    Args:
        claim: a sentence with {} in place of the verb.
        found: the :func:`spread` before and after, and the :func:`paired` difference.
        factor: multiplies all numbers; 100 for fractions in %.
        unit: is written after the numbers.

    >>> same = spread([0.4, 0.6])
    >>> print(judge("It {} this", (same, same, paired([0.4, 0.6], [0.6, 0.4])), 1, " nats"))
    It did not measurably change this: 0.500 ± 0.141 nats and 0.500 ± 0.141 nats; mean difference \
+0.000, 95 % interval -2.541 to +2.541; higher in 1 of 2.
    """
    before, after, difference = found
    low, high = (factor * end for end in difference["interval"])
    verb = "raised" if low > 0 else "lowered" if high < 0 else "did not measurably change"
    places = 2 if factor == 100 else 3
    link = "and" if low <= 0 <= high else "to"

    def shown(one: dict[str, float]) -> str:
        return f"{factor * one['mean']:.{places}f} ± {factor * one['sd']:.{places}f}{unit}"

    return (
        f"{claim.format(verb)}: {shown(before)} {link} {shown(after)}; mean difference "
        f"{factor * difference['mean']:+.{places}f}, 95 % interval {low:+.{places}f} to "
        f"{high:+.{places}f}; higher in {difference['higher']} of {difference['pairs']}."
    )


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[dict[str, Any]]:
    """Predictions grouped by confidence, in ``bins`` intervals (low, high] of equal width.

    Args:
        confidence: the probability of the predicted class, [n], in (0, 1].
        right: whether the prediction is right, bool [n].

    Returns:
        for each interval low, high, count, and the means "confidence" and "accuracy" (None if the
        interval is empty).
    """
    number = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for i in range(bins):
        inside = number == i
        count = int(inside.sum())
        found.append(
            {
                "low": i / bins,
                "high": (i + 1) / bins,
                "count": count,
                "confidence": float(confidence[inside].double().mean()) if count else None,
                "accuracy": float(right[inside].double().mean()) if count else None,
            }
        )
    return found


def calibration_error(found: Sequence[dict[str, Any]]) -> float:
    """The expected calibration error, from the intervals of :func:`reliability`.

        ECE = sum over intervals of count / n * |accuracy - confidence|

    Guo, Pleiss, Sun, Weinberger: "On calibration of modern neural networks", ICML 2017.

    >>> import torch
    >>> right = torch.tensor([True, False, True])
    >>> round(calibration_error(reliability(torch.tensor([0.9, 0.9, 0.6]), right, bins=10)), 6)
    0.4
    """
    total = sum(one["count"] for one in found)
    gaps = (
        one["count"] * abs(one["accuracy"] - one["confidence"]) for one in found if one["count"]
    )
    return math.fsum(gaps) / total
