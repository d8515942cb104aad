"""The operators and the autograd functions of the norm family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import elementwise
from ..backends.reference import norm as reference
from ..base.strides import laid_out, order_of
from ..distributed import layouts
from ..spec.elementwise import NormOptions
from ..spec.operands import Norm, NormBackward, as_operands
from .batching import all_samples
from .common import (
    Function,
    apply_in_backward,
    by_sample,
    differentiate,
    prepared_backward,
    resume,
    save,
    unchanged,
    wanted,
)
from .elementwise import OPTIONS, pack, shared_options
from .library import Known, composes, define, filled, prepared

_NORM = (
    f"{OPTIONS}, str norm, float eps, bool zero_centered, bool after, bool keep_stream, "
    "ScalarType stream_dtype, ScalarType out_dtype"
)


class PackedNorm(NamedTuple):
    """The options of the norm family in the form that operators take."""

    activation: str
    p: float
    drop_path: float
    shared: list[int]
    global_shape: list[int]
    origin: list[int]
    noise: str
    backend: str
    norm: str
    eps: float
    zero_centered: bool
    after: bool
    keep_stream: bool
    stream_dtype: torch.dtype
    out_dtype: torch.dtype


def pack_norm(options: NormOptions, backend: str) -> PackedNorm:
    """The options and the name of a backend, packed."""
    return PackedNorm(
        *pack(options, backend),
        options.norm,
        options.eps,
        options.zero_centered,
        options.after,
        options.keep_stream,
        options.stream_dtype,
        options.out_dtype,
    )


def unpack_norm(packed: PackedNorm) -> NormOptions:
    """The inverse of :func:`pack_norm`."""
    return NormOptions(
        **shared_options(packed),
        norm=packed.norm,
        eps=packed.eps,
        zero_centered=packed.zero_centered,
        after=packed.after,
        keep_stream=packed.keep_stream,
        stream_dtype=packed.stream_dtype,
        out_dtype=packed.out_dtype,
    )


def norm_laid_out(
    results: Sequence[Any], x: Tensor, residual: Tensor | None, packed: Any
) -> tuple[Any, ...]:
    """The contiguous results, laid out in memory as those of the eager composition.

    A sum and an RMSNorm have the strides of an elementwise function of their operands; torch's
    LayerNorm returns a contiguous tensor whatever its operand is.
    """
    out, stream, statistics = results
    rms = packed.norm == "rms_norm"
    if packed.after:
        if rms:
            return laid_out(out, order_of(residual, x)), stream, statistics
        order = None if residual is None else order_of(residual, tuple(range(x.dim())))
        return laid_out(out, order), stream, statistics
    order = order_of(residual, x)
    if order is not None and stream is not None and stream.shape == x.shape:  # kept
        stream = laid_out(stream, order)
    return laid_out(out, order) if rms else out, stream, statistics


_OPERANDS, _INCOMING = len(Norm._fields), len(NormBackward._fields)
_GRADIENTS = 6  # of x, bias, layer_scale, residual, weight and norm_bias


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    operands, packed = Norm(*arguments[:_OPERANDS]), PackedNorm(*arguments[_OPERANDS:])
    x, residual = operands.x, operands.residual
    op, operands = prepared("norm", x.shape, unpack_norm(packed), packed.backend, operands)
    return filled(norm_laid_out(op.forward(operands), x, residual, packed), x)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    operands, packed = Norm(*arguments[:_OPERANDS]), PackedNorm(*arguments[_OPERANDS:])
    x = operands.x
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    has_stream = packed.keep_stream and not packed.after
    stream = x.new_empty(x.shape if has_stream else 0, dtype=packed.stream_dtype)
    out = x.new_empty(x.shape, dtype=packed.out_dtype)
    return norm_laid_out((out, stream, statistics), x, operands.residual, packed)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    operands = NormBackward(*arguments[:_INCOMING])
    packed, dtypes = PackedNorm(*arguments[_INCOMING:-_GRADIENTS]), arguments[-_GRADIENTS:]
    dout = operands.dout
    op, operands = prepared(
        "norm", dout.shape, unpack_norm(packed), packed.backend, operands, dtypes
    )
    return filled(op.backward(operands, dtypes), dout)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    dout, packed = arguments[0], PackedNorm(*arguments[_INCOMING:-_GRADIENTS])
    x, bias, layer_scale, residual, weight, norm_bias = arguments[-_GRADIENTS:]
    vector = dout.shape[-1:]
    shapes = (dout.shape, vector, vector, dout.shape, vector, vector)
    dtypes = (x, bias, layer_scale, None if packed.after else residual, weight, norm_bias)
    return tuple(
        dout.new_empty(0) if dtype is None else dout.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


norm_forward = define(
    "norm_forward(Tensor x, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? weight, "
    f"Tensor? norm_bias, Tensor? seed, Tensor? p_tensor, {_NORM}) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
norm_backward = define(
    "norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor statistics, "
    "Tensor? x, Tensor? bias, Tensor? layer_scale, Tensor? weight, Tensor? seed, "
    f"Tensor? p_tensor, {_NORM}, ScalarType? x_dtype, ScalarType? bias_dtype, "
    "ScalarType? layer_scale_dtype, ScalarType? residual_dtype, ScalarType? weight_dtype, "
    "ScalarType? norm_bias_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class FusedNorm(Function):
    """(out, stream, statistics) of dropout, add and norm; see ``backends/reference/norm.py``."""

    sharding = staticmethod(layouts.norm)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor | None, None] | None:
        *tensors, packed = arguments
        operands = Norm(*tensors)
        if not composes(operands.seed):
            return None
        return *reference.composed(operands, unpack_norm(packed)), None

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
        packed: PackedNorm | Known,
    ) -> tuple[Tensor, ...]:
        operands = (x, bias, layer_scale, residual, weight, norm_bias, seed, p)
        results: tuple[Tensor, ...]
        if not isinstance(packed, Known):
            results = norm_forward(*operands, *packed)
            return results
        results = packed.prepared.forward(as_operands(Norm, operands))
        if x.is_contiguous() and (residual is None or residual.is_contiguous()):
            return results
        return norm_laid_out(results, x, residual, packed.packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, bias, layer_scale, residual, weight, norm_bias, seed, p, packed = inputs
        _, stream, statistics = output
        resumed = resume(ctx, packed)
        after = ctx.packed.after
        needs = ctx.needs_input_grad
        if not resumed:
            ctx.dtypes = (
                x.dtype if needs[0] else None,
                bias.dtype if needs[1] else None,
                layer_scale.dtype if needs[2] else None,
                residual.dtype if needs[3] and not after else None,  # with after, it is dout
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
        save(ctx, packed, NormBackward, stream, statistics, x, bias, layer_scale, weight, seed, p)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstream: Tensor | None, *_: Any) -> Any:
        saved = ctx.saved_tensors
        if ctx.packed.after:
            dstream = None
        if dout is None and dstream is None:
            return (None,) * 9
        incoming = torch.zeros_like(saved[0]) if dout is None else dout
        found = prepared_backward(ctx, NormBackward, (incoming, dstream), saved, ctx.dtypes)
        if found is None:
            given = (incoming, dstream, *unchanged(ctx, saved), ctx.packed, ctx.dtypes)
            found = apply_in_backward(FusedNormBackward, *given)
        if ctx.packed.after and ctx.needs_input_grad[3]:
            found = (*found[:3], dout, *found[4:])
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return all_samples(FusedNorm.apply, Norm, info, in_dims, args)


@by_sample
class FusedNormBackward(Function):
    """The gradients of :class:`FusedNorm`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, dtypes = inputs
        return wanted(norm_backward(*tensors, *packed, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        save(ctx, ctx.packed, NormBackward, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        operands = NormBackward(*unchanged(ctx, ctx.saved_tensors))
        shape, options = tuple(operands.dout.shape), unpack_norm(ctx.packed)
        drop = elementwise.multiplier(shape, operands.seed, operands.p, options)
        # The statistics are functions of the stream, and the formula computes them from it again.
        given = operands._asdict()
        del given["statistics"], given["seed"], given["p"]
        found = differentiate(
            reference.norm_gradients, given, cotangents, drop, options, ctx.dtypes
        )
        return *found[:3], None, *found[3:], None, None, None, None
