"""The operators of the norm family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.strides import laid, order_of
from ..spec.elementwise import NormOptions, Options
from .elementwise import OPTIONS, pack, unpack_shared
from .library import define, filled, read_rate

_NORM = (
    f"{OPTIONS}, str norm, float eps, bool zero_centered, bool after, bool keep_stream, "
    "ScalarType stream_dtype, ScalarType out_dtype"
)
_NORM_FIELDS = dataclasses.fields(NormOptions)[len(dataclasses.fields(Options)) :]
# Of packed options; a shard is two arguments.
_BACKEND = len(dataclasses.fields(Options)) + 1
_NAMES = [field.name for field in _NORM_FIELDS]
_AFTER = _BACKEND + 1 + _NAMES.index("after")
_KIND = _BACKEND + 1 + _NAMES.index("norm")


def pack_norm(options: NormOptions, backend: str) -> tuple[Any, ...]:
    """The options of the norm family as the arguments that its operators take."""
    own = [getattr(options, field.name) for field in _NORM_FIELDS]
    return (*pack(options, backend), *own)


def is_after(packed: tuple[Any, ...]) -> bool:
    """Whether the dropout of a call goes after its norm."""
    return bool(packed[_AFTER])


def unpack_norm(*packed: Any) -> NormOptions:
    """The inverse of :func:`pack_norm`."""
    own = packed[-len(_NORM_FIELDS) :]
    shared = unpack_shared(*packed[: -len(_NORM_FIELDS) - 1])
    return NormOptions(**shared, **dict(zip(_NAMES, own, strict=True)))


def laid_norm(
    results: Sequence[Any], x: Tensor, residual: Tensor | None, packed: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The results, contiguous ones, in the order in which eager's lie.

    A sum and an RMSNorm are elementwise functions of what goes into them; torch's LayerNorm gives a
    contiguous tensor whatever it gets.
    """
    out, stream, statistics = results
    rms = packed[_KIND] == "rms_norm"
    if is_after(packed):
        if rms:
            return laid(out, order_of(residual, x)), stream, statistics
        order = None if residual is None else order_of(residual, tuple(range(x.dim())))
        return laid(out, order), stream, statistics
    order = order_of(residual, x)
    if order is not None and stream is not None and stream.shape == x.shape:  # kept
        stream = laid(stream, order)
    return laid(out, order) if rms else out, stream, statistics


def _norm_forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, p_tensor, packed = arguments[:7], arguments[7], arguments[8:]
    p_tensor, options = read_rate(p_tensor, unpack_norm(*packed))
    module = backends.serving(packed[_BACKEND], *tensors[:6])
    results = module.norm_forward(*tensors, p_tensor, options)  # type: ignore[call-arg]
    results = laid_norm(results, tensors[0], tensors[3], packed)
    return filled(results, tensors[0])


def _norm_forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options = unpack_norm(*arguments[7:])
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    has_stream = options.keep_stream and not options.after
    stream = x.new_empty(x.shape if has_stream else 0, dtype=options.stream_dtype)
    out = x.new_empty(x.shape, dtype=options.out_dtype)
    return laid_norm((out, stream, statistics), x, arguments[2], arguments[7:])


def _norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, p_tensor, packed = arguments[:9], arguments[9], arguments[10:-6]
    p_tensor, options = read_rate(p_tensor, unpack_norm(*packed))
    module = backends.serving(packed[_BACKEND], tensors[0], *tensors[4:8])
    results = module.norm_backward(*tensors, p_tensor, options, arguments[-6:])  # type: ignore[call-arg]
    return filled(results, tensors[0])


def _norm_backward_fake(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dtypes, options = arguments[-6:], unpack_norm(*arguments[9:-6])
    vector = dout.shape[-1:]
    shapes = (dout.shape, vector, vector, dout.shape, vector, vector)
    wanted = [*dtypes[:3], None if options.after else dtypes[3], *dtypes[4:]]
    return tuple(
        dout.new_empty(0) if dtype is None else dout.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, wanted, strict=True)
    )


norm_forward = define(
    "norm_forward(Tensor x, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? weight, "
    f"Tensor? norm_bias, Tensor? seed, Tensor? p_tensor, {_NORM}) "
    "-> (Tensor, Tensor, Tensor)",
    _norm_forward,
    _norm_forward_fake,
)
norm_backward = define(
    "norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor statistics, "
    "Tensor? x, Tensor? bias, Tensor? layer_scale, Tensor? weight, Tensor? seed, "
    f"Tensor? p_tensor, {_NORM}, ScalarType? x_dtype, ScalarType? bias_dtype, "
    "ScalarType? layer_scale_dtype, ScalarType? residual_dtype, ScalarType? weight_dtype, "
    "ScalarType? norm_bias_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_backward,
    _norm_backward_fake,
)
