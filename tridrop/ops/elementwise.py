"""The operators of the elementwise family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.strides import laid, order_of
from ..contract.mask import Shard
from ..spec.elementwise import Options, output_shape
from .library import define, filled, read_rate

# What every op of the family is told besides its tensors; pack() below makes the values. An empty
# global_shape means the tensor is whole.
OPTIONS = (
    "str activation, float p, float drop_path, int[] shared, "
    "SymInt[] global_shape, SymInt[] origin, str noise, str backend"
)

Packed = tuple[str, float, float, list[int], list[int], list[int], str, str]


def pack(options: Options, backend: str) -> Packed:
    """The options as the arguments that an operator takes."""
    shard = options.shard
    return (
        options.activation,
        float(options.p),
        float(options.drop_path),
        list(options.shared),
        [] if shard is None else list(shard.global_shape),
        [] if shard is None else list(shard.origin),
        options.noise,
        backend,
    )


def unpack(
    activation: str,
    p: float,
    drop_path: float,
    shared: Sequence[int],
    global_shape: Sequence[int],
    origin: Sequence[int],
    noise: str = "mask",
) -> Options:
    """The inverse of :func:`pack`."""
    shard = Shard(tuple(global_shape), tuple(origin)) if len(global_shape) else None
    return Options(activation, p, drop_path, tuple(shared), shard, noise)


_NAMES = tuple(field.name for field in dataclasses.fields(Options))


def unpack_shared(*packed: Any) -> dict[str, Any]:
    """The same by their names, for the options of other families. (Dynamo reads no ``vars``.)"""
    options = unpack(*packed)
    return {name: getattr(options, name) for name in _NAMES}


def _forward(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> Tensor:
    *values, backend = packed
    p_tensor, options = read_rate(p_tensor, unpack(*values))  # type: ignore[arg-type]
    module = backends.serving(str(backend), x, bias, layer_scale, residual)
    out = module.forward(x, bias, layer_scale, residual, seed, p_tensor, options)
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        return out.contiguous()
    return laid(out.contiguous(), order_of(residual, x))


def _forward_fake(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    activation: str,
    *_: object,
) -> Tensor:
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(output_shape(x, activation), dtype=dtype, device=x.device)
    return laid(out, order_of(residual, x))


def _backward(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> tuple[Tensor, ...]:
    *values, backend, order, x_dtype, bias_dtype, layer_scale_dtype = packed
    p_tensor, options = read_rate(p_tensor, unpack(*values))  # type: ignore[arg-type]
    module = backends.serving(str(backend), grad, x, bias, layer_scale)
    dtypes = (x_dtype, bias_dtype, layer_scale_dtype)
    dx, *vectors = module.backward(grad, x, bias, layer_scale, seed, p_tensor, options, dtypes)  # type: ignore[arg-type]
    if dx is not None and not grad.is_contiguous():
        dx = laid(dx, order_of(grad, order))  # type: ignore[arg-type]
    return filled((dx, *vectors), grad)


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> tuple[Tensor, Tensor, Tensor]:
    *values, _backend, order, x_dtype, bias_dtype, layer_scale_dtype = packed
    cols = grad.shape[-1] if grad.dim() else 1
    width = 2 * cols if unpack(*values).gated else cols  # type: ignore[arg-type]
    gain = (cols,) if layer_scale is None else tuple(layer_scale.shape)
    shapes = ((*grad.shape[:-1], width) if grad.dim() else (), (width,), gain)
    dtypes = (x_dtype, bias_dtype, layer_scale_dtype)
    a, b, c = (
        grad.new_empty(0) if dtype is None else torch.empty(shape, dtype=dtype, device=grad.device)  # type: ignore[call-overload]
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return a if x_dtype is None else laid(a, order_of(grad, order)), b, c  # type: ignore[arg-type]


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
