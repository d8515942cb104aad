"""Dropout, add and norm on a CPU, in the same way as elementwise.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import Matrix, place
from ...spec.elementwise import NormOptions
from ...spec.operands import Norm, NormBackward, Operands
from .memory import CODES, NONE, result, vector
from .selection import Selection, Sum, selection_of, serves

_NUMBER = torch.empty(1, dtype=torch.float32, device="cpu")


@lru_cache(256)
def _sums_of_norm(columns: int, dtypes: tuple[torch.dtype | None, ...]) -> tuple[Sum, ...]:
    """The sums over rows that are the gradients of bias, layer_scale, weight and norm_bias."""
    return tuple(Sum(columns, dtypes[i], rounded=i > 3) for i in (1, 2, 4, 5))


def _places_of(
    columns: int, bias: Tensor | None, layer_scale: Tensor | None, weight: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, int, Matrix]]:
    """The vectors that forward and backward take, or copies, and where they are."""
    b = g = 0
    w = NONE
    if bias is not None:
        bias, b = vector(bias, columns, "bias")
    if layer_scale is not None:
        layer_scale, g = vector(layer_scale, columns, "layer_scale")
    if weight is not None:
        weight, w = place(weight, columns, "weight")
    return (bias, layer_scale, weight), (b, g, w)


class PreparedNorm(NamedTuple):
    """The norm family, for calls whose tensors have one shape."""

    drop: Selection
    options: NormOptions
    flags: tuple[bool, bool, bool]  # it is RMSNorm; dropout follows the norm; 1 + weight
    keeps_stream: bool
    statistics: Tensor  # one number with the statistics' shape: empty_like is the quickest way

    def forward(self, operands: Norm) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, stream, statistics)."""
        x, bias, layer_scale, residual, weight, norm_bias, seed, _ = operands
        options, columns, count = self.options, self.drop.where.cols, self.drop.count
        _x, u = place(x, count, "x")
        out, o = result(_x, options.out_dtype)
        stream = None
        if self.keeps_stream:
            stream, stored = result(_x, options.stream_dtype)
        else:  # the dtype code says how the stream is rounded all the same
            stored = 0, CODES[options.stream_dtype]
        statistics = torch.empty_like(self.statistics)
        _vectors, places = _places_of(columns, bias, layer_scale, weight)
        _residual = _norm_bias = None
        r = n = NONE
        if residual is not None:
            _residual, r = place(residual, count, "residual")
        if norm_bias is not None:
            _norm_bias, n = place(norm_bias, columns, "norm_bias")
        keep_alive = (_x, _residual, _vectors, _norm_bias, out, stream, statistics)
        arguments = (o, u, stored, r, statistics.data_ptr(), (*places, n))
        self.drop.call("norm_forward", seed, keep_alive, *arguments, (*self.flags, options.eps))
        return out, stream, statistics

    def backward(
        self, operands: NormBackward, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias, layer_scale, residual, weight and norm_bias."""
        dout, dstream, stream, statistics, x, bias, layer_scale, weight, seed, _ = operands
        columns, count = self.drop.where.cols, self.drop.count
        _dout, d = place(dout, count, "dout")
        dx, at = None, NONE
        if dtypes[0] is not None:
            dx, at = result(_dout, dtypes[0])
        dresidual, further = None, NONE
        if dtypes[3] is not None and not self.options.after:
            dresidual, further = result(_dout, dtypes[3])
        _stream, s = place(stream, count, "stream")
        _statistics, m = vector(statistics, 2 * self.drop.where.rows, "statistics")
        _vectors, places = _places_of(columns, bias, layer_scale, weight)
        _dstream = _x = None
        ds = u = NONE
        if dstream is not None:
            _dstream, ds = place(dstream, count, "dstream")
        if x is not None:
            _x, u = place(x, count, "x")
        sums = _sums_of_norm(columns, dtypes)
        arguments = ((d, ds, s, u), m, places, (at, further), self.flags)
        read = (_dout, _dstream, _stream, _x, _vectors, _statistics)
        keep_alive = (read, dx, dresidual)
        found = self.drop.sum("norm_backward", seed, dout, sums, keep_alive, *arguments)
        dbias, dscale, dweight, dnorm_bias = found
        return dx, dbias, dscale, dresidual, dweight, dnorm_bias


@lru_cache(256)
def _prepare(shape: tuple[int, ...], options: NormOptions) -> PreparedNorm:
    flags = (options.norm == "rms_norm", options.after, options.zero_centered)
    keeps_stream = options.keep_stream and not options.after
    statistics = _NUMBER.expand(*shape[:-1], 2)
    drop = selection_of(shape, options)
    return PreparedNorm(drop, options, flags, keeps_stream, statistics)


def prepare(
    shape: tuple[int, ...], options: NormOptions, operands: Operands, wanted: Sequence[Any]
) -> PreparedNorm | None:
    """See elementwise.py's ``prepare``."""
    return _prepare(shape, options) if serves(shape, options, operands, wanted) else None
