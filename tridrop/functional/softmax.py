"""Softmax and dropout of attention scores, and what all attention ops settle alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..seeds import seed_for
from ..spec_attention import AttentionOptions


def as_four(mask: Tensor | None, leading: Sequence[int]) -> Tensor | None:
    """``mask``, which broadcasts to scores [*leading, queries, keys], in four dimensions.

    A view for up to four dimensions. Of more, those before the heads become one: a view as well,
    but for a mask that is shared along some of them and not along others.

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


def settle_attention(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    seed: int | Tensor | None,
    options: AttentionOptions,
) -> tuple[AttentionOptions, Tensor | None, Tensor | None]:
    """The options with their rate, p where it is a tensor, and the seed where anything drops."""
    p_tensor = p if training and isinstance(p, Tensor) else None
    if training and not isinstance(p, Tensor):
        options = replace(options, p=float(p))
    drops = p_tensor is not None or options.p > 0
    return options, p_tensor, seed_for(x.device, seed) if drops else None
