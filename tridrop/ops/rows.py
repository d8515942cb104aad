"""The autograd function of a dropout in which each row says which row of a mask it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.strides import where_kept
from ..contract import mask
from .common import Function, apply_in_backward, each_sample, save, unchanged, whole
from .masks import keep_mask

_X, _ROWS = 0, 1


class DropRows(Function):
    """``where(keep[rows], x * scale, 0)``: row i of x has the decisions of row ``rows[i]``.

    ``x`` is [..., last] and ``rows`` [...]. ``keep`` is the mask of shape [count, width], where
    width is x's last size, or 1 for one decision per row. Backward needs the rows' numbers and the
    seed. The function is linear in x, so it is its own backward.
    """

    @staticmethod
    def forward(
        x: Tensor,
        rows: Tensor,
        seed: Tensor,
        p_tensor: Tensor | None,
        p: float,
        count: int,
        width: int,
        backend: str,
    ) -> Tensor:
        x, rows = whole(x, "x"), whole(rows, "rows")
        keep = keep_mask(seed, [count, width], p_tensor, p, "elements", [], [], [], backend)
        if p_tensor is None:
            scaled = x * mask.scale(mask.threshold(p))
        else:  # in fp32, since torch would round the 0-d scale to x's half precision first
            wide = torch.promote_types(x.dtype, torch.float32)
            scaled = (x.to(wide) * mask.rate_table(p_tensor)[1]).to(x.dtype)
        return where_kept(keep[rows], scaled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, seed, p_tensor, *ctx.rest = inputs
        save(ctx, (), ("rows", "seed", "p"), rows, seed, p_tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx = apply_in_backward(DropRows, grad, *unchanged(ctx, ctx.saved_tensors), *ctx.rest)
        return dx, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """All samples in one call, since rows name their coordinates; one call per seed or rate."""
        if any(dim is not None for dim in in_dims[_ROWS + 1 :]):
            return each_sample(DropRows.apply, info, in_dims, args)
        x, rows = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(args[:2], in_dims[:2], strict=True)
        )
        return DropRows.apply(x, rows, *args[_ROWS + 1 :]), 0
