"""The ops of elementwise.py and norm.py on a CPU, each pass a compiled loop of :mod:`tridrop.fast`.

The formulas and the rounding are those of the two files, which compute what numba does not serve:
fp64, a rate in a tensor, alpha and Gaussian noise. What does not depend on data is prepared once
for each shape and set of options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import fast, fast_calls
from ...fast_calls import KINDS, NONE, matrix, vector
from ...memory import all_whole, place
from ...spec import NormOptions, Options, output_shape
from . import elementwise, norm

# As numbered in fast_math.py.
_FUNCTIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_SHORT = 3
_NAMES = ("x", "bias", "layer_scale", "residual")
# grad, u -> grad * f'(u), torch's own.
_BACKWARD: dict[int, Callable[..., Tensor]] = {
    2: torch.ops.aten.gelu_backward.default,
    3: partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    4: torch.ops.aten.silu_backward.default,
}
_NO_SUMS = (0, 0)  # the addresses of two absent sums


class PreparedElementwise(NamedTuple):
    """The elementwise family, for calls with results of one shape."""

    drop: fast_calls.Selection
    shape: tuple[int, ...]
    options: Options
    kind: tuple[int, bool]  # the number of f in fast_math, and whether it is gated
    columns: int
    width: int  # the columns of x: twice those of the result where f is gated

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        """The op; arguments as in ``backends.Backend.forward``."""
        if not self.drop.drops and self._is_torchs(x, bias, layer_scale, residual):
            nothing = elementwise.Multiplier(None, 1.0)
            x, *others = all_whole((x, bias, layer_scale, residual), _NAMES)
            result = elementwise.compose(x, *others, nothing, self.options, False)  # type: ignore[call-arg]
            return result.clone() if elementwise.is_view(result, x) else result
        columns, width, count = self.columns, self.width, self.drop.count
        x, u = place(x, count if width == columns else 2 * count, "x")
        b = g = 0
        r = NONE
        if bias is not None:
            bias, b = vector(bias, width, "bias")
        if layer_scale is not None:
            layer_scale, g = vector(layer_scale, columns, "layer_scale")
        dtype = x.dtype
        if residual is not None:
            residual, r = place(residual, count, "residual")
            dtype = residual.dtype
        out, o = fast_calls.result(x, dtype, None if width == columns else self.shape)
        held = (x, residual, bias, layer_scale, out)
        self.drop.call("forward", seed, held, o, u, b, g, r, self._kind(dtype))
        return out

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The op's gradients; arguments as in ``backends.Backend.backward``."""
        function, gated = self.kind
        if not self.drop.drops and not gated and layer_scale is None:
            if function == 0 and dtypes == (grad.dtype, None, None):
                return grad, None, None
            alike = x is not None and x.dtype == grad.dtype and self._is_torchs(x, bias)
            if x is not None and alike and function in _BACKWARD:
                grad, x, bias = all_whole((grad, x, bias), ("grad", "x", "bias"))
                found = _BACKWARD[function](grad, x if bias is None else x + bias)
                dbias = None if dtypes[1] is None else elementwise.sum_rows(found)
                return (None if dtypes[0] is None else found), dbias, None
        columns, width, count = self.columns, self.width, self.drop.count
        _grad, d = place(grad, count, "grad")
        _x = _bias = _scale = dx = None
        u = at = NONE
        b = g = 0
        if x is not None:
            _x, u = place(x, 2 * count if gated else count, "x")
        if bias is not None:
            _bias, b = vector(bias, width, "bias")
        if layer_scale is not None:
            _scale, g = vector(layer_scale, columns, "layer_scale")
        if dtypes[0] is not None:
            shape = (*self.shape[:-1], width) if gated else None
            dx, at = fast_calls.result(_grad, dtypes[0], shape)
        given, kind = (d, u, b, g, at), self._kind(*dtypes)
        held = (_grad, _x, _bias, _scale, dx)
        if dtypes[1] is None and dtypes[2] is None:
            self.drop.call("backward", seed, held, *given, _NO_SUMS, kind)
            return dx, None, None
        sums = (fast_calls.Sum(width, dtypes[1]), fast_calls.Sum(columns, dtypes[2]))
        dbias, dlayer_scale = self.drop.sum("backward", seed, grad, sums, held, *given, kind)
        return dx, dbias, dlayer_scale

    def _kind(self, *dtypes: torch.dtype | None) -> tuple[int, bool]:
        """``kind`` for results of these dtypes: what is rounded to 16 bits needs no more."""
        if self.kind[0] < 2 or torch.float32 in dtypes:
            return self.kind
        return self.kind[0] + _SHORT, self.kind[1]

    def _is_torchs(self, x: Tensor, *others: Tensor | None) -> bool:
        function, gated = self.kind
        return elementwise.is_torchs((function > 0) + gated, function > 1, x, *others)


@lru_cache(256)
def _sums_of_norm(columns: int, dtypes: norm.Dtypes) -> tuple[fast_calls.Sum, ...]:
    """Gradients of bias, layer_scale, weight and norm_bias."""
    return tuple(fast_calls.Sum(columns, dtypes[i], rounded=i > 3) for i in (1, 2, 4, 5))


class PreparedNorm(NamedTuple):
    """The norm family, for calls with tensors of one shape."""

    drop: fast_calls.Selection
    shape: tuple[int, ...]
    options: NormOptions
    kind: tuple[bool, bool, bool]  # is RMSNorm; the dropout comes after it; adds 1 to the weight

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The op; arguments as in ``backends.Backend.norm_forward``."""
        options = self.options
        columns, count = self.drop.where.cols, self.drop.count
        (_x, u), (_residual, r) = place(x, count, "x"), matrix(residual, count, "residual")
        out, o = fast_calls.result(_x, options.out_dtype)
        # Where the stream is not kept, its kind still says how it is rounded.
        stream, stored = None, (0, KINDS[options.stream_dtype])
        if options.keep_stream and not options.after:
            stream, stored = fast_calls.result(_x, options.stream_dtype)
        statistics = x.new_empty((*self.shape[:-1], 2), dtype=torch.float32)
        _bias, b = vector(bias, columns, "bias")
        _scale, g = vector(layer_scale, columns, "layer_scale")
        _weight, w = matrix(weight, columns, "weight")
        _norm_bias, n = matrix(norm_bias, columns, "norm_bias")
        held = (_x, _residual, _bias, _scale, _weight, _norm_bias, out, stream, statistics)
        given = (o, u, stored, r, statistics.data_ptr(), (b, g, w, n))
        self.drop.call("norm_forward", seed, held, *given, (*self.kind, float(options.eps)))
        return out, stream, statistics

    def backward(
        self,
        dout: Tensor,
        dstream: Tensor | None,
        stream: Tensor,
        statistics: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor | None,
        seed: Tensor | None,
        dtypes: norm.Dtypes,
    ) -> tuple[Tensor | None, ...]:
        """The op's gradients; arguments as in ``backends.Backend.norm_backward``."""
        columns, count = self.drop.where.cols, self.drop.count
        (_dout, d), (_dstream, ds) = place(dout, count, "dout"), matrix(dstream, count, "dstream")
        dx, at = None, NONE
        if dtypes[0] is not None:
            dx, at = fast_calls.result(_dout, dtypes[0])
        dresidual, further = None, NONE
        if dtypes[3] is not None and not self.options.after:
            dresidual, further = fast_calls.result(_dout, dtypes[3])
        (_stream, s), (_x, u) = place(stream, count, "stream"), matrix(x, count, "x")
        _bias, b = vector(bias, columns, "bias")
        _scale, g = vector(layer_scale, columns, "layer_scale")
        _weight, w = matrix(weight, columns, "weight")
        _statistics, m = vector(statistics, 2 * self.drop.where.rows, "statistics")
        sums = _sums_of_norm(columns, dtypes)
        given = ((d, ds, s, u), m, (b, g, w), (at, further), self.kind)
        held = (_dout, _dstream, _stream, _x, _bias, _scale, _weight, _statistics, dx, dresidual)
        found = self.drop.sum("norm_backward", seed, dout, sums, held, *given)
        dbias, dscale, dweight, dnorm_bias = found
        return dx, dbias, dscale, dresidual, dweight, dnorm_bias


@lru_cache(256)
def _prepare(shape: tuple[int, ...], options: Options) -> PreparedElementwise | PreparedNorm:
    elements, path = options.thresholds()
    drop = fast_calls.selection(
        shape,
        elements,
        math.prod(options.scales()),
        shared=options.shared,
        shard=options.shard,
        path_threshold=path,
    )
    if isinstance(options, NormOptions):
        kind = (options.norm == "rms_norm", options.after, options.zero_centered)
        return PreparedNorm(drop, shape, options, kind)
    function = (_FUNCTIONS[options.function], options.gated)
    columns = drop.where.cols
    width = 2 * columns if options.gated else columns
    return PreparedElementwise(drop, shape, options, function, columns, width)


def prepare(shape: tuple[int, ...], options: Options, *tensors: Tensor | None) -> Any:
    """Both directions of calls with results of ``shape`` and such tensors, where numba serves them.

    That is with masks or nothing to drop, on a CPU, and in fp32.
    """
    if 0 in shape or (options.noise != "mask" and options.p > 0) or not fast.serves():
        return None
    for t in tensors:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu"):
            return None
    return _prepare(shape, options)


def _prepared(
    seed: Tensor | None,
    p: Tensor | None,
    shape: tuple[int, ...],
    options: Options,
    *tensors: Tensor | None,
    dtypes: Sequence[torch.dtype | None] = (),
) -> Any:
    """The same, where the host can also read the random part.

    ``dtypes`` are those of results: an operand that is not kept for backward may be fp64.
    """
    if p is not None or torch.float64 in dtypes or not fast.readable(seed):
        return None
    return prepare(shape, options, *tensors)


def forward(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
) -> Tensor:
    """The op; arguments as in ``backends.Backend.forward``."""
    tensors = (x, bias, layer_scale, residual)
    found = _prepared(seed, p, output_shape(x, options.activation), options, *tensors)
    if found is None:
        return elementwise.forward(*tensors, seed, p, options)
    out: Tensor = found.forward(*tensors, seed)
    return out


def backward(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The op's gradients; arguments as in ``backends.Backend.backward``."""
    tensors = (grad, x, bias, layer_scale)
    found = _prepared(seed, p, tuple(grad.shape), options, *tensors, dtypes=dtypes)
    if found is None:
        return elementwise.backward(*tensors, seed, p, options, dtypes)
    dx, dbias, dlayer_scale = found.backward(*tensors, seed, dtypes)
    return dx if dx is None else elementwise.own(dx, grad), dbias, dlayer_scale


def norm_forward(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The op; arguments as in ``backends.Backend.norm_forward``."""
    tensors = (x, bias, layer_scale, residual, weight, norm_bias)
    found = _prepared(seed, p, tuple(x.shape), options, *tensors)
    if found is None:
        return norm.norm_forward(*tensors, seed, p, options)
    results: tuple[Tensor, Tensor | None, Tensor] = found.forward(*tensors, seed)
    return results


def norm_backward(
    dout: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    statistics: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: NormOptions,
    dtypes: norm.Dtypes,
) -> tuple[Tensor | None, ...]:
    """The op's gradients; arguments as in ``backends.Backend.norm_backward``."""
    tensors = (dout, dstream, stream, statistics, x, bias, layer_scale, weight)
    found = _prepared(seed, p, tuple(dout.shape), options, *tensors, dtypes=dtypes)
    if found is None:
        return norm.norm_backward(*tensors, seed, p, options, dtypes)
    results: tuple[Tensor | None, ...] = found.backward(*tensors, seed, dtypes)
    return results
