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
from .backends.reference import elementwise, norm

_forward = torch.ops.tridrop.forward.default
_backward = torch.ops.tridrop.backward.default
_norm_forward = torch.ops.tridrop.norm_forward.default
_norm_backward = torch.ops.tridrop.norm_backward.default


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


def _wanted(
    results: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for; an operator returns an empty tensor for the others."""
    return tuple(
        None if dtype is None else result for result, dtype in zip(results, dtypes, strict=True)
    )


def _differentiate(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    given: dict[str, Tensor | None],
    cotangents: Sequence[Tensor | None],
    drop: elementwise.Multiplier,
    options: Any,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The derivative of an op's gradients: of the reference composition, in plain torch.

    ``given`` holds the differentiable arguments of ``gradients``; the result has an entry for each.
    """
    names = [name for name, tensor in given.items() if tensor is not None]
    needs = tuple(dtype is not None for dtype in dtypes)

    def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
        computed = dict(zip(names, elementwise.compute(*tensors), strict=True))
        results = gradients(**{**given, **computed}, drop=drop, options=options, needs=needs)
        return tuple(t for t in results if t is not None)

    outputs, pull_back = torch.func.vjp(  # type: ignore[misc]
        wide, *(given[name] for name in names)
    )
    wanted = [c for c, need in zip(cotangents, needs, strict=True) if need]
    filled = tuple(
        torch.zeros_like(o) if c is None else c.to(o.dtype)
        for o, c in zip(outputs, wanted, strict=True)
    )
    found = dict(zip(names, pull_back(filled), strict=True))
    return [found.get(name) for name in given]


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
        return _wanted(results, dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        grad, x, bias, layer_scale, seed, p = ctx.saved_tensors
        options = ops.unpack(*ctx.packed[:-1])
        drop = elementwise.multiplier(tuple(grad.shape), seed, p, options)
        given = {"grad": grad, "x": x, "bias": bias, "layer_scale": layer_scale}
        found = _differentiate(elementwise.gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _each_sample(FusedBackward.apply, info, in_dims, args)


class FusedNorm(torch.autograd.Function):
    """(out, stream, mean, rstd) of dropout, add and norm; see ``backends/reference/norm.py``."""

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
        packed: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _norm_forward(
            x, bias, layer_scale, residual, weight, norm_bias, seed, p, *packed
        )
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, seed, p, packed = inputs
        x, bias, layer_scale, _, weight, _ = tensors
        _, stream, mean, rstd = output
        ctx.packed = packed
        ctx.after = ops.unpack_norm(*packed).after
        dtypes = [
            t.dtype if t is not None and needed else None
            for t, needed in zip(tensors, ctx.needs_input_grad[:6], strict=True)
        ]
        if ctx.after:
            dtypes[3] = None  # the residual's gradient is then the incoming one
        ctx.dtypes = tuple(dtypes)
        ctx.mark_non_differentiable(mean, rstd, *((stream,) if ctx.after else ()))
        ctx.set_materialize_grads(False)
        scaled = ctx.dtypes[2] is not None
        ctx.save_for_backward(
            x if ctx.after else stream,
            mean,
            rstd,
            x if scaled else None,
            bias if scaled else None,
            layer_scale,
            weight,
            seed,
            p,
        )

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstream: Tensor | None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        if ctx.after:
            dstream = None
        if dout is None and dstream is None:
            return (None,) * 9
        incoming = torch.zeros_like(saved[0]) if dout is None else dout
        compiling = torch.compiler.is_compiling()  # as in Fused
        call: Any = FusedNormBackward.forward if compiling else FusedNormBackward.apply
        found = list(call(incoming, dstream, *saved, ctx.packed, ctx.dtypes))
        if ctx.after and ctx.needs_input_grad[3]:
            found[3] = dout
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _each_sample(FusedNorm.apply, info, in_dims, args)


class FusedNormBackward(torch.autograd.Function):
    """The gradients of :class:`FusedNorm`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, dtypes = inputs
        return _wanted(_norm_backward(*tensors, *packed, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dstream, stream, _, _, x, bias, layer_scale, weight, seed, p = ctx.saved_tensors
        options = ops.unpack_norm(*ctx.packed)
        drop = elementwise.multiplier(tuple(dout.shape), seed, p, options)
        # The statistics are functions of the stream, and are computed from it again.
        given = {"dout": dout, "dstream": dstream, "stream": stream, "x": x, "bias": bias}
        given |= {"layer_scale": layer_scale, "weight": weight}
        found = _differentiate(norm.norm_gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found[:3], None, None, *found[3:], None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _each_sample(FusedNormBackward.apply, info, in_dims, args)
