"""Softmax and dropout of attention scores, and functions that all attention ops share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, overload

from torch import Tensor

from .. import backends, ops
from ..base import arguments as spec_values
from ..contract import seeds
from ..ops import SoftmaxDropout, apply
from ..spec import attention as spec_attention
from ..spec import elementwise as spec
from ..spec.attention import AttentionOptions, SoftmaxOptions
from ..spec.operands import Softmax
from . import known
from .elementwise import ShardLike, distinct, seed_of

_O = TypeVar("_O", bound=AttentionOptions)

_FAMILY = known.Family("softmax", SoftmaxDropout, ops.pack_softmax, Softmax)


def as_four(mask: Tensor | None, leading: Sequence[int]) -> Tensor | None:
    """``mask``, which broadcasts to scores [*leading, queries, keys], in four dimensions.

    If there are more than four, the dimensions before the heads become one. The result is a view,
    unless the mask is broadcast along some of these dimensions and not along others.

    >>> import torch
    >>> as_four(torch.zeros(5, 1), (2, 3)).shape
    torch.Size([1, 1, 5, 1])
    """
    if mask is None:
        return None
    if mask.dim() <= 4:
        return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if any(n != 1 for n in mask.shape[:-3]):
        mask = mask.expand(*leading[:-1], *mask.shape[-3:])
    return mask.flatten(0, -4)


def rated_attention(
    p: float | Tensor, training: bool, options: _O
) -> tuple[_O, Tensor | None, bool]:
    """(the options with their rate, p if it is a tensor, whether anything is dropped)."""
    spec_values.check_flag(training, "training")
    if not training:
        return options, None, False
    if isinstance(p, Tensor):
        return options, p, True
    options = replace(options, p=float(p))
    return options, None, options.p > 0


def settle_attention(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    seed: int | Tensor | None,
    options: _O,
    batch: int | None,
    name: str = "p",
) -> tuple[_O, Tensor | None, Tensor | None]:
    """(the options with their rate, p if it is a tensor, the seed if anything is dropped).

    ``batch`` is the number of sequences, or None where a shard says which ones they are.
    """
    spec.check_rate(p, x.device, name)
    options, p_tensor, drops = rated_attention(p, training, options)
    if not drops:
        return options, p_tensor, None
    if seeds.in_batch() and batch is not None:
        options = replace(options, origin=(seeds.batch_origin(batch), *options.origin[1:]))
    return options, p_tensor, seed_of(x, seed)


@overload
def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    *,
    mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_softmax: Literal[False] = ...,
    shard: ShardLike | None = ...,
    seed: int | Tensor | None = ...,
) -> Tensor: ...


@overload
def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    *,
    mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_softmax: Literal[True],
    shard: ShardLike | None = ...,
    seed: int | Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_softmax: bool = False,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The middle of attention in one kernel, for models that need the probabilities themselves.

        out = dropout(softmax(scale * scores + mask))

    over the keys, the last dimension. The dropout mask is that of
    :func:`tridrop.scaled_dot_product_attention` and :func:`tridrop.attention_keep_mask`, at the
    coordinates (batch, head, query, key): the dimension before the queries is the head, and all
    dimensions before it together are the batch. Backward keeps the scores, ``mask``, one number per
    row and the seed, but neither probabilities nor decisions.

    Args:
        scores: ``[..., Sq, Sk]`` of any strides; float16, bfloat16, float32, or float64 (reference
            backend).
        p: the probability of dropping, as in :func:`tridrop.dropout`.
        training: False stands for p = 0.
        mask: the attention mask: bool (True: the key takes part) or floating-point (added to the
            scores), broadcastable to scores. It is read through its strides and never expanded; its
            gradient is summed in fp32 over the dimensions along which it is broadcast.
        is_causal: query i sees only the keys j <= i; with a mask, only those that both allow. In a
            shard, i and j are indices of the larger tensor.
        scale: the factor of the scores, 1 by default.
        return_softmax: return (out, softmax), the second before dropout. Both have gradients.
        shard: where ``scores``, of four dimensions, lie in larger ones:
            ``tridrop.Shard(global_shape, origin)``. The dropout masks of the shards are then pieces
            of the mask of the larger tensor. The softmax is over the given keys alone.
        seed: as in :func:`tridrop.dropout`.

    Returns:
        A contiguous tensor of scores' shape and dtype, computed in fp32 and rounded once. An
        excluded key has exactly the probability 0, and so have all keys of a row in which every key
        is excluded. On a CPU this is so even in a row with a score that is NaN.

    Raises:
        ValueError: scores of fewer than two dimensions, or of other than four with a shard; a mask
            that does not broadcast to scores; p outside [0, 1]; a scale that is not finite.
        TypeError: scores, mask, p, scale or seed of another type or dtype.

    >>> import torch
    >>> scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> softmax_dropout(scores, 0.0, is_causal=True)
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000]])
    >>> softmax_dropout(torch.zeros(1, 4), 0.5, return_softmax=True, seed=1)
    (tensor([[0.0000, 0.0000, 0.0000, 0.5000]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    key = None
    if (
        (training is True or training is False)
        and (is_causal is False or is_causal is True)
        and (return_softmax is False or return_softmax is True)
    ):
        settings = ("softmax", type(scale), scale, training, is_causal, return_softmax)
        key = known.key_of(settings, p, None, shard, scores, mask)
    found = known.recall(key)
    if found is not None:
        out, softmax, _ = known.call(_FAMILY, found, seed, scores, mask)
        return (out, softmax) if return_softmax else out
    spec_values.check_flag(is_causal, "is_causal")
    spec_values.check_flag(return_softmax, "return_softmax")
    spec.check_input(scores, "scores")
    if scores.dim() < 2:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; give [..., queries, keys], two dimensions or "
            "more"
        )
    spec.check_probability(p, tensor_allowed=True)
    spec_attention.check_mask(mask, scores.shape, scores, "mask")
    if shard is not None and scores.dim() != 4:
        raise ValueError(
            f"shard is for scores [batch, head, query, key]; given shape {tuple(scores.shape)}: "
            "reshape them to four dimensions"
        )
    origin = spec_attention.resolve_origin(shard, scores.shape)
    _, upper = spec_attention.resolve_band(is_causal, None)
    if upper is not None:
        upper += origin[2] - origin[3]  # key - query in local indices
    options = SoftmaxOptions(
        scale=spec_attention.resolve_scale(scale, 1.0),
        upper=upper,
        origin=origin,
        return_softmax=return_softmax,
    )
    if key is not None:
        options, _, drops = rated_attention(p, training, options)
        found = known.learn(_FAMILY, key, tuple(scores.shape), options, drops, scores, mask)
        out, softmax, _ = known.call(_FAMILY, found, seed, scores, mask)
        return (out, softmax) if return_softmax else out
    batch = None if shard is not None or scores.dim() < 4 else math.prod(scores.shape[:-3])
    options, p_tensor, drawn = settle_attention(scores, p, training, seed, options, batch)
    packed = ops.pack_softmax(options, backends.name_for(scores.device))
    out, softmax, _ = apply(SoftmaxDropout, *distinct(scores, mask), drawn, p_tensor, packed)
    return (out, softmax) if return_softmax else out
