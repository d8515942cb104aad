"""Rows of the structured drops: whole branches, layers, tokens, heads, blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from ... import functional
from .case import Case, Inputs
from .family_cases import one_tensor
from .invariants import Found, Invariant, Trial, uneven, z_of_mean


def _rows(p: float, shape: tuple[int, ...]) -> Case:
    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        return functional.stochastic_depth(inputs["x"], p, "row", training, seed=seed)

    noise_shape = (None, *(1,) * (len(shape) - 1))
    return one_tensor("stochastic_depth", shape, noise_shape, p=p, call=call)


def _heads(p: float, shape: tuple[int, ...], dim: int) -> Case:
    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        return functional.head_dropout(inputs["x"], p, training, dim=dim, seed=seed)

    noise_shape = tuple(None if i in (0, dim) else 1 for i in range(len(shape)))
    return one_tensor("head_dropout", shape, noise_shape, p=p, call=call)


CASES: Sequence[Case] = (
    _rows(0.2, (60, 3, 8)),
    _heads(0.4, (6, 8, 5, 3), 1),
    _heads(0.1, (6, 5, 8, 7), 2),
)


def _whole_batch(trial: Trial) -> Iterator[Found]:
    x = trial.ones(4, 8)
    outs = [
        functional.stochastic_depth(x, 0.3, "batch", seed=seed) > 0 for seed in range(trial.seeds)
    ]
    yield Found("shared", float(sum(uneven(kept, (0, 1)) for kept in outs)), 0.0)
    yield Found("rate |z|", *z_of_mean([kept[0, 0].double() for kept in outs], 0.7))


def _subset(trial: Trial) -> Iterator[Found]:
    """Exactly k samples go through the branch, and the sum keeps its expected value."""
    x, k = trial.ones(10, 8), 7
    outs = [
        functional.drop_path_subset(x, torch.ones_like, 0.3, seed=seed) - 1
        for seed in range(trial.seeds)
    ]
    yield Found("kept", float(max(abs(int((out[:, 0] > 0).sum()) - k) for out in outs)), 0.0)
    # The samples of one call are not independent, so one per call is taken.
    yield Found("expectation |z|", *z_of_mean([out[0, 0] for out in outs], 1.0))


def _layers(trial: Trial) -> Iterator[Found]:
    found = [
        torch.tensor([i in kept for i in range(20)])
        for kept in (functional.layer_drop(range(20), 0.2, seed=s) for s in range(trial.seeds))
    ]
    yield Found("rate |z|", *z_of_mean([kept.double() for kept in found], 0.8))
    yield Found("at p = 0", float(len(functional.layer_drop(range(20), 0.0)) - 20), 0.0)


def _patches(trial: Trial) -> Iterator[Found]:
    """Exactly k of n tokens are kept, in their order, and the prefix always."""
    n, k, prefix = 20, 14, 2
    tokens = torch.arange(1 + prefix + n, device=trial.device)[1:].to(trial.dtype).expand(30, -1)
    outs = [
        functional.patch_dropout(tokens, 0.3, num_prefix_tokens=prefix, ordered=True, seed=seed)
        for seed in range(trial.seeds)
    ]
    yield Found("kept", float(sum(out.shape[1] - prefix - k for out in outs)), 0.0)
    moved = sum(int((out[:, :prefix] != tokens[:, :prefix]).sum()) for out in outs)
    repeated = sum(int((out.diff(dim=1) <= 0).sum()) for out in outs)
    yield Found("prefix moved", float(moved), 0.0)
    yield Found("repeated", float(repeated), 0.0)
    # The tokens of one sample are not independent, so one per sample is taken.
    last = [(out[:, -1] == prefix + n).double() for out in outs]
    yield Found("rate |z|", *z_of_mean(last, k / n))


def _kept_heads(trial: Trial) -> Iterator[Found]:
    """Whole heads are dropped, and the kept heads of a sample are scaled to make up for them."""
    x, p = trial.ones(30, 4, 3, 2), 0.4
    outs = [
        functional.head_dropout(x, p, rescale="kept", seed=seed).double()
        for seed in range(trial.seeds)
    ]
    yield Found("shared", float(sum(uneven(out > 0, (2, 3)) for out in outs)), 0.0)
    yield Found("rate |z|", *z_of_mean([(out[:, :, 0, 0] > 0).double() for out in outs], 1 - p))
    means = torch.cat([out.mean((1, 2, 3)) for out in outs])
    wrong = float((means[means > 0] - 1).abs().max())
    yield Found("mean of a sample", wrong, 2 * torch.finfo(trial.dtype).eps)


def _blocks(trial: Trial) -> Iterator[Found]:
    """Every dropped element lies in a dropped square; the rate follows gamma; the mean is kept."""
    p, size, side = 0.25, 3, 8
    x = trial.ones(8, 8, side, side)
    outs = [functional.drop_block2d(x, p, size, seed=s).double() for s in range(trial.seeds)]
    loose = 0
    for out in outs:
        kept = (out > 0).double()
        starts = 1 - max_pool2d(kept, size, stride=1)  # where a whole square is dropped
        squares = max_pool2d(pad(starts, [size - 1] * 4), size, stride=1)
        loose += int((squares + kept != 1).sum())
    yield Found("outside blocks", float(loose), 0.0)
    gamma = p * side**2 / (size**2 * (side - size + 1) ** 2)
    # An element in the middle is kept if no square that would cover it begins.
    middle = [(out[..., side // 2, side // 2] > 0).double() for out in outs]
    yield Found("rate |z|", *z_of_mean(middle, (1 - gamma) ** (size**2)))
    wrong = max(abs(float(out.mean()) - 1) for out in outs)
    yield Found("mean", wrong, 2 * torch.finfo(trial.dtype).eps)


INVARIANTS: Sequence[Invariant] = (
    Invariant("stochastic_depth: the whole batch", "stochastic_depth", _whole_batch),
    Invariant("drop_path_subset: 7 of 10 samples", "drop_path_subset", _subset),
    Invariant("layer_drop: layers at their rate", "layer_drop", _layers),
    Invariant("patch_dropout: 14 of 20 tokens", "patch_dropout", _patches),
    Invariant("head_dropout: scaled by the heads kept", "head_dropout", _kept_heads),
    Invariant("drop_block2d: whole squares", "drop_block2d", _blocks),
)
