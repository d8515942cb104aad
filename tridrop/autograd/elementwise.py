"""The autograd functions of the elementwise family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import elementwise
from ..base.strides import Order, laid, order_of
from ..distributed import layouts
from ..ops.elementwise import backward, forward
from ..ops.library import Known, composes
from .batching import all_samples
from .common import (
    Function,
    apply_in_backward,
    differentiate,
    each_sample,
    packed_and_prepared,
    prepared_backward,
    save,
    unchanged,
    wanted,
)

_SAVED = ("x", "bias", "layer_scale", "seed", "p")


class Fused(Function):
    """residual + drop_path(layer_scale * dropout(f(x + bias)))."""

    sharding = staticmethod(layouts.elementwise)

    @staticmethod
    def composed(*arguments: Any) -> Tensor | None:
        *tensors, packed = arguments
        if not composes(tensors[4]):
            return None
        out = elementwise.composed(*tensors, ops.unpack(*packed[:-1]))  # type: ignore[call-arg]
        return out.clone() if out is tensors[0] else out

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: ops.Packed | Known,
    ) -> Tensor:
        out: Tensor
        if isinstance(packed, Known):
            out = packed.prepared.forward(x, bias, layer_scale, residual, seed)
            if not (x.is_contiguous() and (residual is None or residual.is_contiguous())):
                out = laid(out, order_of(residual, x))
        else:
            out = forward(x, bias, layer_scale, residual, seed, p, *packed)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, layer_scale, _, seed, p, packed = inputs
        ctx.packed, ctx.prepared = packed_and_prepared(packed)
        # The strides that the kept mask of torch's dropout would have: of x, by which a gradient
        # that has none of its own, such as that of a sum, is laid out.
        ctx.order = None if x.is_contiguous() else order_of(x)
        needs = ctx.needs_input_grad
        ctx.dtypes = (
            x.dtype if needs[0] else None,
            bias.dtype if needs[1] else None,
            layer_scale.dtype if needs[2] else None,
        )
        # Without an activation, x matters only to the gradient of layer_scale.
        if ctx.packed[0] == "none" and not needs[2]:
            x = bias = None
        save(ctx, packed, _SAVED, x, bias, layer_scale, seed, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            saved = ctx.saved_tensors
            found = prepared_backward(ctx, (grad,), saved, ctx.dtypes)
            if found is None:
                given = (grad, *unchanged(ctx, saved), ctx.packed, ctx.order, ctx.dtypes)
                found = apply_in_backward(FusedBackward, *given)
            elif not (grad.is_contiguous() or found[0] is None or found[0] is grad):
                found = (laid(found[0], order_of(grad, ctx.order)), *found[1:])
        # The residual is added as it is, so its gradient is the incoming one, unread.
        dresidual = grad if ctx.needs_input_grad[3] else None
        return *found, dresidual, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return all_samples(Fused.apply, info, in_dims, args)


class FusedBackward(Function):
    """The gradients of :class:`Fused` as a function of the incoming gradient, x and the vectors."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: ops.Packed,
        order: Order | None,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        results = backward(grad, x, bias, layer_scale, seed, p, *packed, order, *dtypes)
        return wanted(results, dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, _, ctx.dtypes = inputs
        save(ctx, ctx.packed, ("grad", *_SAVED), *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad, x, bias, layer_scale, seed, p = unchanged(ctx, ctx.saved_tensors)
        options = ops.unpack(*ctx.packed[:-1])
        drop = elementwise.multiplier(tuple(grad.shape), seed, p, options)
        given = {"grad": grad, "x": x, "bias": bias, "layer_scale": layer_scale}
        found = differentiate(elementwise.gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(FusedBackward.apply, info, in_dims, args)
