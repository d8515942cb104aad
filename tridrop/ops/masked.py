"""Masks that are not those of one op: drawn again in backward by the rule that drew them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.strides import where_kept
from .common import Function, apply_in_backward, by_sample, save, unchanged, whole

# (seed, shape, *options) -> what is kept, and what that is multiplied by; both broadcast to shape.
Rule = Callable[..., tuple[Tensor, Tensor]]


@by_sample
class Masked(Function):
    """where(keep, x * scale, 0) with (keep, scale) = rule(seed, x.shape, *options).

    Linear in x, so it is its own derivative, of any order. Computed in fp32, or fp64 where x is.
    """

    @staticmethod
    def forward(x: Tensor, seed: Tensor, rule: Rule, options: tuple[Any, ...]) -> Tensor:
        x, seed = whole(x, "x"), whole(seed, "seed")
        keep, scale = rule(seed, tuple(x.shape), *options)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out = where_kept(keep, wide * scale.to(wide.dtype))
        # Dynamo of torch 2.11 gives no gradient to a result that `.to` returned as it was.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, seed, ctx.rule, ctx.options = inputs
        save(ctx, (), ("seed",), seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = unchanged(ctx, ctx.saved_tensors)
        return apply_in_backward(Masked, grad, seed, ctx.rule, ctx.options), None, None, None
