"""Rows of the dropout family: the other dropouts of torch.nn and Keras, and their invariants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ... import functional
from ...contract import noise
from ...contract.mask import threshold
from .case import Case, Drop, Inputs
from .invariants import Found, Invariant, Trial, uneven, z_of_mean

NoiseShape = tuple[int | None, ...]


def one_tensor(
    op: str,
    shape: tuple[int, ...],
    noise_shape: NoiseShape | None = None,
    *,
    p: float = 0.3,
    **options: Any,
) -> Case:
    """A function of one tensor whose result is ``drop(x)``, unless ``options`` say otherwise."""
    function = getattr(functional, op)

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        out: Tensor = function(inputs["x"], p, training, seed=seed)
        return out

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        return drop("elements", inputs["x"])

    return Case(
        name=f"{op}: plain {list(shape)}",
        op=op,
        p=p,
        shapes={"x": shape, "out": shape},
        rates={"elements": p},
        noise_shape=noise_shape,
        **{"call": call, "eager": eager} | options,
    )


def _alpha(
    op: str, shape: tuple[int, ...], noise_shape: NoiseShape | None = None, *, p: float
) -> Case:
    """a * where(keep, x, ALPHA) + b, as a function of dropout's keep * x / (1 - p)."""
    a = noise.scale("alpha", threshold(p))
    b = -a * p * noise.ALPHA
    function = getattr(functional, op)

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        kept = drop("elements", inputs["x"] - noise.ALPHA) * (1 - p)
        return a * (kept + noise.ALPHA) + b

    def probe(inputs: Inputs, seed: Any) -> Tensor:
        # A dropped element does not depend on x: it is finite even if x is infinite.
        x = inputs["x"]
        dropped = function(x.detach() + math.inf, p, True, seed=seed).isfinite()
        out: Tensor = function(x, p, True, seed=seed)
        return out.masked_fill(dropped, 0)

    return one_tensor(
        op, shape, noise_shape, p=p, eager=eager, probe=probe, plain=lambda inputs: inputs["x"]
    )


CASES: Sequence[Case] = (
    one_tensor("dropout1d", (6, 7, 9), (None, None, 1)),
    one_tensor("dropout2d", (5, 6, 4, 5), (None, None, 1, 1), p=0.5),
    one_tensor("dropout3d", (3, 8, 2, 3, 5), (None, None, 1, 1, 1), p=0.1),
    _alpha("alpha_dropout", (6, 11, 40), p=0.2),
    _alpha("alpha_dropout", (700, 1), p=0.9),
    _alpha("feature_alpha_dropout", (6, 10, 7, 3), (None, None, 1, 1), p=0.5),
    one_tensor("gaussian_dropout", (6, 11, 40), gaussian=True),
    one_tensor("gaussian_dropout", (350, 2), gaussian=True, p=0.8),
)


def _moments(op: str, mean: float, variance: float, p: float, **options: Any) -> Invariant:
    """The mean and variance of the result for standard normal input."""
    function = getattr(functional, op)

    def measure(trial: Trial) -> Iterator[Found]:
        outs = [
            function(trial.normal(64, 64), p, True, seed=seed, **options).double().flatten()
            for seed in range(trial.seeds)
        ]
        yield Found("mean |z|", *z_of_mean(outs, mean))
        yield Found("variance |z|", *z_of_mean([(out - mean) ** 2 for out in outs], variance))

    return Invariant(f"{op}: moments, p = {p}", op, measure)


def _shared(op: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> Invariant:
    """Counts decisions that differ along dimensions that share one; checks the rate."""
    function: Callable[..., Tensor] = getattr(functional, op)
    p = 0.3

    def measure(trial: Trial) -> Iterator[Found]:
        x = trial.ones(*shape)
        kept = [function(x, p, True, seed=seed) > 0 for seed in range(trial.seeds)]
        yield Found("shared", float(sum(uneven(k, dims) for k in kept)), 0.0)
        decisions = [k.double().mean(dims).flatten() for k in kept]
        yield Found("rate |z|", *z_of_mean(decisions, 1 - p))

    return Invariant(f"{op}: whole maps", op, measure)


def _samples(p: float) -> Invariant:
    """drop_path drops whole samples, at its rate."""

    def measure(trial: Trial) -> Iterator[Found]:
        x = trial.ones(40, 3, 8)
        kept = [
            functional.dropout_add(x, 0 * x, 0.0, True, drop_path=p, seed=seed) > 0
            for seed in range(trial.seeds)
        ]
        yield Found("shared", float(sum(uneven(k, (1, 2)) for k in kept)), 0.0)
        yield Found("rate |z|", *z_of_mean([k[:, 0, 0].double() for k in kept], 1 - p))

    return Invariant(f"dropout_add: drop_path = {p} of samples", "dropout_add", measure)


INVARIANTS: Sequence[Invariant] = (
    _moments("alpha_dropout", 0.0, 1.0, 0.2),
    _moments("alpha_dropout", 0.0, 1.0, 0.7),
    # Both have noise of mean 1 and variance p / (1 - p).
    _moments("gaussian_dropout", 0.0, 1 / (1 - 0.4), 0.4),
    _moments("dropout", 0.0, 1 / (1 - 0.4), 0.4),
    _shared("dropout1d", (8, 16, 5), (2,)),
    _shared("dropout2d", (8, 16, 3, 5), (2, 3)),
    _shared("dropout3d", (8, 16, 2, 2, 3), (2, 3, 4)),
    _samples(0.2),
)
