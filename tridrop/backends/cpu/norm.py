"""Dropout, add and norm on a CPU, in the same way as elementwise.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import Facts
from ...spec.elementwise import NormOptions
from ...spec.operands import Norm, NormBackward, Operands
from .memory import CODES, NONE, NUMBERS, SEED, Operand, Reads, blanks, result, vectors
from .selection import Selection, Sum, selection_of, serves


@lru_cache(256)
def _sums_of_norm(columns: int, dtypes: tuple[torch.dtype | None, ...]) -> tuple[Sum, ...]:
    """The sums over rows that are the gradients of bias, layer_scale, weight and norm_bias."""
    return tuple(Sum(columns, dtypes[i]) for i in (1, 2, 4, 5))


class PreparedNorm(NamedTuple):
    """The norm family, for calls whose tensors have one shape."""

    drop: Selection
    options: NormOptions
    flags: tuple[bool, bool, bool]  # it is RMSNorm; dropout follows the norm; 1 + weight
    keeps_stream: bool
    like: dict[torch.dtype, Tensor]  # how results are made, and the statistics
    statistics: Tensor
    forward_reads: Reads  # what the loops read, the seed first
    backward_reads: Reads

    def forward(self, operands: Norm) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, stream, statistics)."""
        x, bias, layer_scale, residual, weight, norm_bias, seed, _ = operands
        options = self.options
        out, o = result(self.like[options.out_dtype])
        stream = None
        if self.keeps_stream:
            stream, stored = result(self.like[options.stream_dtype])
        else:  # the dtype code says how the stream is rounded all the same
            stored = 0, CODES[options.stream_dtype]
        statistics = torch.empty_like(self.statistics)
        reads = self.forward_reads
        bias, layer_scale = vectors(bias, layer_scale, reads)
        tensors = (seed, x, bias, layer_scale, residual, weight, norm_bias)
        arguments = (o, stored, statistics.data_ptr(), (*self.flags, options.eps))
        held = (out, stream, statistics)
        self.drop.call("norm_forward", tensors, reads, held, *arguments)
        return out, stream, statistics

    def backward(
        self, operands: NormBackward, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias, layer_scale, residual, weight and norm_bias."""
        dout, dstream, stream, statistics, x, bias, layer_scale, weight, seed, _ = operands
        dx, at = None, NONE
        if dtypes[0] is not None:
            dx, at = result(self.like[dtypes[0]])
        dresidual, further = None, NONE
        if dtypes[3] is not None and not self.options.after:
            dresidual, further = result(self.like[dtypes[3]])
        reads = self.backward_reads
        bias, layer_scale = vectors(bias, layer_scale, reads)
        tensors = (seed, dout, dstream, stream, x, statistics, bias, layer_scale, weight)
        sums = _sums_of_norm(self.drop.where.cols, dtypes)
        dbias, dscale, dweight, dnorm_bias = self.drop.sum(
            "norm_backward", tensors, reads, sums, (dx, dresidual),
            (at, further), self.flags,
        )  # fmt: skip
        return dx, dbias, dscale, dresidual, dweight, dnorm_bias

    def held_to(self, saved: tuple[Facts, ...]) -> tuple[PreparedNorm, tuple[Facts, ...]]:
        """See :class:`tridrop.spec.operands.Prepared`."""
        reads, others = self.backward_reads.held_to(saved)
        return self._replace(backward_reads=reads), others


@lru_cache(256)
def _prepare(shape: tuple[int, ...], options: NormOptions) -> PreparedNorm:
    flags = (options.norm == "rms_norm", options.after, options.zero_centered)
    keeps_stream = options.keep_stream and not options.after
    drop = selection_of(shape, options)
    columns, count, rows = drop.where.cols, drop.count, drop.where.rows
    x, weight = Operand("x", count), Operand("weight", columns)
    vectors = Operand("bias", columns, NUMBERS), Operand("layer_scale", columns, NUMBERS)
    forward = Reads.of(
        SEED, x, *vectors, Operand("residual", count), weight, Operand("norm_bias", columns)
    )
    matrices = Operand("dout", count), Operand("dstream", count), Operand("stream", count), x
    backward = Reads.of(SEED, *matrices, Operand("statistics", 2 * rows, NUMBERS), *vectors, weight)
    statistics = blanks((*shape[:-1], 2))[torch.float32]
    return PreparedNorm(
        drop, options, flags, keeps_stream, blanks(shape), statistics, forward, backward
    )


def prepare(
    shape: tuple[int, ...], options: NormOptions, operands: Operands, wanted: Sequence[Any]
) -> PreparedNorm | None:
    """See elementwise.py's ``prepare``."""
    return _prepare(shape, options) if serves(shape, options, operands, wanted) else None
