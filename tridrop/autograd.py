"""The autograd functions: what is saved, what is returned. No math, no launches.

Forward and backward are opaque operators (ops.py). Backward saves the seed, and x only where the
derivative needs it; the mask is drawn again. The derivative of backward is a composition of plain
torch operations, so it can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends.reference import elementwise as composition

_forward = torch.ops.tridrop.forward.default
_backward = torch.ops.tridrop.backward.default


def _each_sample(
    function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """vmap by calling ``function`` once a sample: coordinates are those of the sample alone.

    Every sample then has the mask that the same call has outside vmap. Samples whose seeds differ
    (randomness="different") have masks of their own.
    """
    outputs = []
    for i in range(info.batch_size):
        picked = [
            a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a
            for a, dim in zip(args, in_dims, strict=True)
        ]
        outputs.append(function(*picked))
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*outputs, strict=True)
    )
    return stacked, tuple(None if column is None else 0 for column in stacked)


class Fused(torch.autograd.Function):
    """residual + drop_path(layer_scale * dropout(f(x + bias)))."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: ops.Packed,
    ) -> Tensor:
        out: Tensor = _forward(x, bias, layer_scale, residual, seed, p, *packed)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, layer_scale, _, seed, p, packed = inputs
        ctx.packed = packed
        ctx.dtypes = tuple(
            t.dtype if t is not None and needed else None
            for t, needed in zip((x, bias, layer_scale), ctx.needs_input_grad[:3], strict=True)
        )
        # Without an activation, x matters only to the gradient of layer_scale.
        keeps_x = packed[0] != "none" or ctx.dtypes[2] is not None
        ctx.save_for_backward(
            x if keeps_x else None, bias if keeps_x else None, layer_scale, seed, p
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx = dbias = dlayer_scale = None
        if any(dtype is not None for dtype in ctx.dtypes):
            # Dynamo cannot trace one autograd function inside the backward of another, and what it
            # compiles has no second derivative anyway.
            compiling = torch.compiler.is_compiling()
            call: Any = FusedBackward.forward if compiling else FusedBackward.apply
            dx, dbias, dlayer_scale = call(grad, *ctx.saved_tensors, ctx.packed, ctx.dtypes)
        # The residual is added as it is, so its gradient is the incoming one, unread.
        dresidual = grad if ctx.needs_input_grad[3] else None
        return dx, dbias, dlayer_scale, dresidual, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _each_sample(Fused.apply, info, in_dims, args)


class FusedBackward(torch.autograd.Function):
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
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        results = _backward(grad, x, bias, layer_scale, seed, p, *packed, *dtypes)
        return tuple(
            None if dtype is None else result for result, dtype in zip(results, dtypes, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad, x, bias, layer_scale, seed, p = ctx.saved_tensors
        options = ops.unpack(*ctx.packed[:-1])
        drop = composition.multiplier(tuple(grad.shape), seed, p, options)
        given = {"grad": grad, "x": x, "bias": bias, "layer_scale": layer_scale}
        names = [name for name, tensor in given.items() if tensor is not None]
        needs = tuple(dtype is not None for dtype in ctx.dtypes)

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            wide = composition.compute(*tensors)
            arguments = {**given, **dict(zip(names, wide, strict=True))}
            results = composition.gradients(**arguments, drop=drop, options=options, needs=needs)  # type: ignore[arg-type]
            return tuple(t for t in results if t is not None)

        outputs, pull_back = torch.func.vjp(  # type: ignore[misc]
            gradients, *(given[name] for name in names)
        )
        wanted = [c for c, need in zip(cotangents, needs, strict=True) if need]
        filled = tuple(
            torch.zeros_like(o) if c is None else c.to(o.dtype)
            for o, c in zip(outputs, wanted, strict=True)
        )
        found = dict(zip(names, pull_back(filled), strict=True))
        return tuple(found.get(name) for name in given) + (None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _each_sample(FusedBackward.apply, info, in_dims, args)
