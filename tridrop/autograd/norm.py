"""The autograd functions of the norm family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import elementwise, norm
from ..distributed import layouts
from ..ops.library import Known, composes
from ..ops.norm import norm_backward, norm_forward
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

_SAVED = ("stream", "statistics", "x", "bias", "layer_scale", "weight", "seed", "p")


class FusedNorm(Function):
    """(out, stream, statistics) of dropout, add and norm; see ``backends/reference/norm.py``."""

    sharding = staticmethod(layouts.norm)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor | None, None] | None:
        *tensors, packed = arguments
        if not composes(tensors[6]):
            return None
        return *norm.composed(*tensors, ops.unpack_norm(*packed)), None  # type: ignore[call-arg]

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: tuple[Any, ...] | Known,
    ) -> tuple[Tensor, ...]:
        tensors = (x, bias, layer_scale, residual, weight, norm_bias, seed)
        results: tuple[Tensor, ...]
        if isinstance(packed, Known):
            results = packed.prepared.forward(*tensors)
            if not (x.is_contiguous() and (residual is None or residual.is_contiguous())):
                results = ops.laid_norm(results, x, residual, packed.packed)
        else:
            results = norm_forward(*tensors, p, *packed)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, bias, layer_scale, residual, weight, norm_bias, seed, p, packed = inputs
        _, stream, statistics = output
        ctx.packed, ctx.prepared = packed_and_prepared(packed)
        ctx.after = after = ops.is_after(ctx.packed)
        needs = ctx.needs_input_grad
        ctx.dtypes = (
            x.dtype if needs[0] else None,
            bias.dtype if needs[1] else None,
            layer_scale.dtype if needs[2] else None,
            residual.dtype if needs[3] and not after else None,  # else it is the incoming one
            weight.dtype if needs[4] else None,
            norm_bias.dtype if needs[5] else None,
        )
        if after:
            ctx.mark_non_differentiable(statistics, *(() if stream is None else (stream,)))
            stream = x
        else:
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        if not needs[2]:
            x = bias = None
        save(ctx, packed, _SAVED, stream, statistics, x, bias, layer_scale, weight, seed, p)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstream: Tensor | None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        if ctx.after:
            dstream = None
        if dout is None and dstream is None:
            return (None,) * 9
        incoming = torch.zeros_like(saved[0]) if dout is None else dout
        found = prepared_backward(ctx, (incoming, dstream), saved, ctx.dtypes)
        if found is None:
            given = (incoming, dstream, *unchanged(ctx, saved), ctx.packed, ctx.dtypes)
            found = apply_in_backward(FusedNormBackward, *given)
        if ctx.after and ctx.needs_input_grad[3]:
            found = (*found[:3], dout, *found[4:])
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return all_samples(FusedNorm.apply, info, in_dims, args)


class FusedNormBackward(Function):
    """The gradients of :class:`FusedNorm`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, dtypes = inputs
        return wanted(norm_backward(*tensors, *packed, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        save(ctx, ctx.packed, ("dout", "dstream", *_SAVED), *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dstream, stream, _, x, bias, layer_scale, weight, seed, p = unchanged(
            ctx, ctx.saved_tensors
        )
        options = ops.unpack_norm(*ctx.packed)
        drop = elementwise.multiplier(tuple(dout.shape), seed, p, options)
        # The statistics are functions of the stream, and are computed from it again.
        given = {"dout": dout, "dstream": dstream, "stream": stream, "x": x, "bias": bias}
        given |= {"layer_scale": layer_scale, "weight": weight}
        found = differentiate(norm.norm_gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found[:3], None, *found[3:], None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(FusedNormBackward.apply, info, in_dims, args)
