"""Dropout with any mask that a function of the seed draws; backward calls that function again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.strides import where_kept
from .common import Function, apply_in_backward, by_sample, save, unchanged, whole

# (seed, shape, *options) -> (keep, scale), which both broadcast to shape.
Draw = Callable[..., tuple[Tensor, Tensor]]


@by_sample
class Masked(Function):
    """where(keep, x * scale, 0) with (keep, scale) = draw(seed, x.shape, *options).

    The function is linear in x, so it is its own derivative of any order. It computes in fp32, or
    in fp64 where x is fp64.
    """

    @staticmethod
    def forward(x: Tensor, seed: Tensor, draw: Draw, options: tuple[Any, ...]) -> Tensor:
        x, seed = whole(x, "x"), whole(seed, "seed")
        keep, scale = draw(seed, tuple(x.shape), *options)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out = where_kept(keep, wide * scale.to(wide.dtype))
        # Dynamo of torch 2.11 gives no gradient to a result that `.to` returned as it was.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, ctx.draw, ctx.options = inputs
        save(ctx, (), ("seed",), seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = unchanged(ctx, ctx.saved_tensors)
        return apply_in_backward(Masked, grad, seed, ctx.draw, ctx.options), None, None, None
