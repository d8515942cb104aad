"""Structured drops of depth: whole branches, samples of a branch, layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import backends
from ..base import arguments as spec_values
from ..contract import choice
from ..contract.seeds import host_seed, refuse_batch, seed_for
from ..spec import elementwise as spec
from ..spec.elementwise import Options
from .elementwise import dropout
from .masks import kept_indices

_T = TypeVar("_T")


def stochastic_depth(
    input: Tensor,
    p: float | Tensor,
    mode: str,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Drop a residual branch, for single samples or for the whole batch; torchvision's function.

        out = where(keep, input / (1 - p), 0)

    with one decision per index of the first dimension (``mode="row"``) or one for all
    (``mode="batch"``). Huang et al., "Deep networks with stochastic depth", ECCV 2016. The masks
    are those of :func:`tridrop.dropout` with a ``noise_shape`` of ``(None, 1, ...)`` or
    ``(1, 1, ...)``.

    Args, raises: as :func:`tridrop.dropout`; ValueError for another mode, and for a scalar.

    >>> stochastic_depth(torch.ones(3, 2), 0.5, "row", seed=2)
    tensor([[0., 0.],
            [0., 0.],
            [2., 2.]])
    """
    spec.check_input(input, "input")
    spec_values.check_choice(mode, "mode", ("batch", "row"))
    if input.dim() == 0:
        raise ValueError("input is a scalar; its first dimension must be that of the samples")
    first = None if mode == "row" else 1
    noise_shape = (first, *(1,) * (input.dim() - 1))
    return dropout(input, p, training, noise_shape=noise_shape, seed=seed)


def drop_path_subset(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A residual branch that is computed only for the samples that keep it.

        kept = k of the b samples,    k = max(1, floor(b (1 - p)))
        out = x;    out[kept] += b / k * branch(x[kept])

    This is stochastic depth with a fixed number of samples, which saves the work for the others
    (Oquab et al., "DINOv2: learning robust visual features without supervision", 2023, section 5).
    For every p the expectation is that of ``x + branch(x)``. ``kept`` is
    :func:`tridrop.kept_indices` of ``(b,)``, in rising order. Backward keeps the indices.

    The k samples are the batch of dropouts inside the branch, whose masks belong to the positions
    in it, and of batch norms.

    Args:
        x: the stream, [b, ...].
        branch: a function of [k, ...] that gives [k, ...].
        p: the rate of dropping, a number in [0, 1]. At 1 no sample keeps its branch, and the branch
            is not called; below 1 at least one sample keeps it.
        training: False gives ``x + branch(x)``, as p = 0 does.
        seed: as in :func:`tridrop.dropout`.

    Raises:
        ValueError: p outside [0, 1]; a branch that changes the shape.
        TypeError: p or seed of another type.

    >>> drop_path_subset(torch.zeros(4, 2), torch.ones_like, 0.5, seed=1)
    tensor([[2., 2.],
            [0., 0.],
            [2., 2.],
            [0., 0.]])
    """
    spec.check_input(x)
    spec.check_probability(p)
    if not callable(branch):
        raise TypeError(f"{spec_values.given(branch, 'branch')}; give a function of x, or a module")
    if x.dim() == 0:
        raise ValueError("x is a scalar; its first dimension must be that of the samples")
    batch = x.shape[0]
    if not spec.drops(p, training) or batch == 0:
        return x + branch(x)
    if p == 1:
        return x
    refuse_batch("drop_path_subset")
    k = choice.left(batch, p)
    kept = kept_indices(seed_for(x.device, seed), (batch,), k).sort().values
    out = branch(x.index_select(0, kept))
    spec_values.check_tensor(out, "what branch returns")
    if out.shape != (k, *x.shape[1:]):
        raise ValueError(
            f"branch made {tuple(out.shape)} of {(k, *x.shape[1:])}; a residual branch must keep "
            "the shape"
        )
    dtype = torch.promote_types(x.dtype, out.dtype)  # as x + branch(x) promotes
    scaled = out.to(dtype) * (batch / k)
    # index_add would keep the branch's result for backward, to know its shape.
    return x.to(dtype).index_put((kept,), scaled, accumulate=True)


def layer_drop(
    layers: Sequence[_T],
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> list[_T]:
    """The layers that remain of a stack in which each layer is skipped with probability ``p``.

    Fan, Grave, Joulin, "Reducing transformer depth on demand with structured dropout", ICLR 2020.
    Nothing is scaled, in training or in evaluation. A skipped layer costs nothing, and a network
    that was trained in this way also works with fewer layers. Layer i remains where
    ``tridrop.keep_mask(seed, (n,), p)[i]`` is True.

    The host must know which layers to run. It does not wait for an accelerator if the seed is an
    int (here or in :func:`tridrop.rng`) or is drawn, which happens from the CPU's generator; it
    does wait for a seed tensor on an accelerator. torch.compile breaks its graph here, and a
    captured CUDA graph always runs the same layers.

    Args:
        layers: any sequence.
        p: a number in [0, 1].
        training: False returns all layers, as p = 0 does.
        seed: as in :func:`tridrop.dropout`.

    Raises:
        ValueError: p outside [0, 1].
        TypeError: p or seed of another type.

    >>> layer_drop(["first", "second", "third"], 0.5, seed=1)
    ['first', 'third']
    """
    spec.check_probability(p)
    spec_values.check_sequence(layers, "layers", "a list of them")
    if not spec.drops(p, training):
        return list(layers)
    return left_layers(layers, p, host_seed(seed))


def left_layers(layers: Sequence[_T], p: float, seed: Tensor) -> list[_T]:
    """The result of :func:`layer_drop` for a seed tensor on the CPU."""
    # The reference can always run on the host; the named backend perhaps only on an accelerator.
    reference = backends.load("reference")
    keep = reference.keep_mask(seed, (len(layers),), None, Options(p=float(p)), "elements")
    return [layer for layer, kept in zip(layers, keep.tolist(), strict=True) if kept]
