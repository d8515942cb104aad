"""The operators and the autograd functions of the elementwise family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import elementwise as reference
from ..base.strides import laid_out, order_of
from ..contract.mask import Shard
from ..distributed import layouts
from ..spec.elementwise import Options, output_shape
from ..spec.operands import Elementwise, ElementwiseBackward, as_operands
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
from .library import Known, composes, define, filled, prepared

# The arguments of the family's operators besides tensors: the fields of Packed.
OPTIONS = (
    "str activation, float p, float drop_path, int[] shared, "
    "SymInt[] global_shape, SymInt[] origin, str noise, str backend"
)


class Packed(NamedTuple):
    """The options in the form that operators take. An empty ``global_shape`` means no shard."""

    activation: str
    p: float
    drop_path: float
    shared: list[int]
    global_shape: list[int]
    origin: list[int]
    noise: str
    backend: str


def pack(options: Options, backend: str) -> Packed:
    """The options and the name of a backend, packed."""
    shard = options.shard
    return Packed(
        options.activation,
        float(options.p),
        float(options.drop_path),
        list(options.shared),
        [] if shard is None else list(shard.global_shape),
        [] if shard is None else list(shard.origin),
        options.noise,
        backend,
    )


def shared_options(packed: Any) -> dict[str, Any]:
    """The options that :func:`pack` packed, for this family and for those that extend it."""
    whole = tuple(packed.global_shape)
    return {
        "activation": packed.activation,
        "p": packed.p,
        "drop_path": packed.drop_path,
        "shared": tuple(packed.shared),
        "shard": Shard(whole, tuple(packed.origin)) if whole else None,
        "noise": packed.noise,
    }


def unpack(packed: Packed) -> Options:
    """The inverse of :func:`pack`."""
    return Options(**shared_options(packed))


_OPERANDS, _INCOMING = len(Elementwise._fields), len(ElementwiseBackward._fields)


def _forward(*arguments: Any) -> Tensor:
    operands, packed = Elementwise(*arguments[:_OPERANDS]), Packed(*arguments[_OPERANDS:])
    x, residual = operands.x, operands.residual
    shape = output_shape(x, packed.activation)
    op, operands = prepared("elementwise", shape, unpack(packed), packed.backend, operands)
    out = op.forward(operands)
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        return out.contiguous()
    return laid_out(out.contiguous(), order_of(residual, x))


def _forward_fake(*arguments: Any) -> Tensor:
    operands, packed = Elementwise(*arguments[:_OPERANDS]), Packed(*arguments[_OPERANDS:])
    x, residual = operands.x, operands.residual
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(output_shape(x, packed.activation), dtype=dtype, device=x.device)
    return laid_out(out, order_of(residual, x))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    operands = ElementwiseBackward(*arguments[:_INCOMING])
    *values, order, x_dtype, bias_dtype, layer_scale_dtype = arguments[_INCOMING:]
    packed, dtypes = Packed(*values), (x_dtype, bias_dtype, layer_scale_dtype)
    grad = operands.grad
    op, operands = prepared(
        "elementwise", grad.shape, unpack(packed), packed.backend, operands, dtypes
    )
    dx, *vectors = op.backward(operands, dtypes)
    if dx is not None:
        dx = reference.unaliased(dx, grad)
        if not grad.is_contiguous():
            dx = laid_out(dx, order_of(grad, order))
    return filled((dx, *vectors), grad)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    grad, gain = arguments[0], ElementwiseBackward(*arguments[:_INCOMING]).layer_scale
    *values, order, x_dtype, bias_dtype, layer_scale_dtype = arguments[_INCOMING:]
    cols = grad.shape[-1] if grad.dim() else 1
    width = 2 * cols if unpack(Packed(*values)).gated else cols
    of_gain = (cols,) if gain is None else tuple(gain.shape)
    shapes = ((*grad.shape[:-1], width) if grad.dim() else (), (width,), of_gain)
    dx, *vectors = (
        None if dtype is None else torch.empty(shape, dtype=dtype, device=grad.device)
        for shape, dtype in zip(shapes, (x_dtype, bias_dtype, layer_scale_dtype), strict=True)
    )
    return filled((None if dx is None else laid_out(dx, order_of(grad, order)), *vectors), grad)


forward = define(
    "forward(Tensor x, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? seed, "
    f"Tensor? p_tensor, {OPTIONS}) -> Tensor",
    _forward,
    _forward_fake,
)
# Absent gradients come back as empty tensors.
backward = define(
    "backward(Tensor grad, Tensor? x, Tensor? bias, Tensor? layer_scale, Tensor? seed, "
    f"Tensor? p_tensor, {OPTIONS}, int[]? order, ScalarType? x_dtype, ScalarType? bias_dtype, "
    "ScalarType? layer_scale_dtype) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class Fused(Function):
    """residual + drop_path(layer_scale * dropout(f(x + bias)))."""

    sharding = staticmethod(layouts.elementwise)

    @staticmethod
    def composed(*arguments: Any) -> Tensor | None:
        *tensors, packed = arguments
        operands = Elementwise(*tensors)
        if not composes(operands.seed):
            return None
        out = reference.composed(operands, unpack(packed))
        return out.clone() if out is operands.x else out

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: Packed | Known,
    ) -> Tensor:
        out: Tensor
        if not isinstance(packed, Known):
            out = forward(x, bias, layer_scale, residual, seed, p, *packed)
            return out
        operands = as_operands(Elementwise, (x, bias, layer_scale, residual, seed, p))
        out = packed.prepared.forward(operands)
        if x.is_contiguous() and (residual is None or residual.is_contiguous()):
            return out
        return laid_out(out, order_of(residual, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, layer_scale, _, seed, p, packed = inputs
        needs = ctx.needs_input_grad
        if not resume(ctx, packed):
            ctx.dtypes = (
                x.dtype if needs[0] else None,
                bias.dtype if needs[1] else None,
                layer_scale.dtype if needs[2] else None,
            )
        # torch's dropout keeps a mask with the strides of x, and so they decide the strides of dx
        # where the incoming gradient has none of its own, such as the gradient of a sum.
        order = None if x.is_contiguous() else order_of(x)
        # Without an activation, only the gradient of layer_scale needs x.
        if ctx.packed.activation == "none" and not needs[2]:
            x = bias = None
        save(ctx, packed, ElementwiseBackward, x, bias, layer_scale, seed, p)
        ctx.order = order  # after what save() notes: another call may have another

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            saved = ctx.saved_tensors
            found = prepared_backward(ctx, ElementwiseBackward, (grad,), saved, ctx.dtypes)
            if found is None:
                given = (grad, *unchanged(ctx, saved), ctx.packed, ctx.order, ctx.dtypes)
                found = apply_in_backward(FusedBackward, *given)
            elif not (grad.is_contiguous() or found[0] is None or found[0] is grad):
                found = (laid_out(found[0], order_of(grad, ctx.order)), *found[1:])
        # The residual is added as it is, so its gradient is the incoming gradient itself.
        dresidual = grad if ctx.needs_input_grad[3] else None
        return *found, dresidual, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return all_samples(Fused.apply, Elementwise, info, in_dims, args)


@by_sample
class FusedBackward(Function):
    """The gradients of :class:`Fused`, as functions of the incoming gradient, x and the vectors."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, order, dtypes = inputs
        return wanted(backward(*tensors, *packed, order, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, _, ctx.dtypes = inputs
        save(ctx, ctx.packed, ElementwiseBackward, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        operands = ElementwiseBackward(*unchanged(ctx, ctx.saved_tensors))
        grad, options = operands.grad, unpack(ctx.packed)
        drop = reference.multiplier(tuple(grad.shape), operands.seed, operands.p, options)
        given = operands._asdict()
        del given["seed"], given["p"]
        found = differentiate(reference.gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found, *(None,) * 5
