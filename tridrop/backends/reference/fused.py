"""The ops of elementwise.py and norm.py on a CPU, each pass a compiled loop of :mod:`tridrop.fast`.

The formulas and the rounding are those of the two files, which compute what numba does not serve:
fp64, a rate in a tensor, drop_path, and masks shared along the columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import fast
from ...spec import NormOptions, Options, output_shape
from . import elementwise, norm

# As numbered in fast_math.py.
_FUNCTIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def _selection(
    shape: tuple[int, ...],
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
    *tensors: Tensor | None,
) -> fast.Selection | None:
    """The random part where it is one mask of elements, computed in fp32, and numba serves."""
    if options.noise != "mask":
        return None
    if seed is None or p is not None or options.drop_path > 0 or 0 in shape:
        return None
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return None
    elements = options.thresholds()[0]
    return fast.selection(seed, shape, elements, shared=options.shared, shard=options.shard)


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _vector(t: Tensor | None) -> Tensor | None:
    """In fp32."""
    return None if t is None else t.detach().to(torch.float32).contiguous()


def _matrix(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _result(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else fast.empty(shape, dtype)


def _to(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if t is None or dtype is None else t.to(dtype)


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
    shape = output_shape(x, options.activation)
    drop = _selection(shape, seed, p, options, x, bias, layer_scale, residual)
    if drop is None:
        return elementwise.forward(x, bias, layer_scale, residual, seed, p, options)
    out = fast.empty(shape, x.dtype if residual is None else residual.dtype)
    u, r, b, g = _matrix(x), _matrix(residual), _vector(bias), _vector(layer_scale)
    drop.call(
        "forward",
        *_sizes(shape),
        fast.matrix(out),
        fast.matrix(u),
        _address(b),
        _address(g),
        fast.matrix(r),
        (_FUNCTIONS[options.function], options.gated),
    )
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
    shape = tuple(grad.shape)
    drop = _selection(shape, seed, p, options, grad, x, bias, layer_scale)
    if drop is None:
        return elementwise.backward(grad, x, bias, layer_scale, seed, p, options, dtypes)
    rows, columns = _sizes(shape)
    width = 2 * columns if options.gated else columns
    dx = _result((*shape[:-1], width) if shape else shape, dtypes[0])
    g, u, b, s = _matrix(grad), _matrix(x), _vector(bias), _vector(layer_scale)
    dbias, dlayer_scale = drop.call(
        "backward",
        rows,
        columns,
        fast.matrix(g),
        fast.matrix(u),
        _address(b),
        _address(s),
        fast.matrix(dx),
        (_FUNCTIONS[options.function], options.gated),
        widths=(width if dtypes[1] else 0, columns if dtypes[2] else 0),
    )
    return dx, _to(dbias, dtypes[1]), _to(dlayer_scale, dtypes[2])


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The op; arguments as in ``backends.Backend.norm_forward``."""
    tensors = (x, bias, layer_scale, residual, weight, norm_bias)
    shape = tuple(x.shape)
    drop = _selection(shape, seed, p, options, *tensors)
    if drop is None:
        return norm.norm_forward(*tensors, seed, p, options)
    rows, columns = _sizes(shape)
    out, stream = fast.empty(shape, options.out_dtype), None
    if options.keep_stream and not options.after:
        stream = fast.empty(shape, options.stream_dtype)
    mean = torch.empty(rows, dtype=torch.float32, device="cpu")
    rstd = torch.empty_like(mean)
    u, r = _matrix(x), _matrix(residual)
    b, g, nb = map(_vector, (bias, layer_scale, norm_bias))
    w = norm.gain_of(_vector(weight), options)
    drop.call(
        "norm_forward",
        rows,
        columns,
        fast.matrix(out),
        fast.matrix(u),
        (_address(stream), fast.KINDS[options.stream_dtype]),
        fast.matrix(r),
        (mean.data_ptr(), rstd.data_ptr()),
        (_address(b), _address(g), _address(w), _address(nb)),
        (options.norm == "rms_norm", options.after, float(options.eps)),
    )
    return out, stream, mean, rstd


def norm_backward(
    dout: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
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
    tensors = (dout, dstream, stream, x, bias, layer_scale, weight)
    shape = tuple(dout.shape)
    drop = _selection(shape, seed, p, options, *tensors)
    if drop is None:
        given = (dout, dstream, stream, mean, rstd, x, bias, layer_scale, weight)
        return norm.norm_backward(*given, seed, p, options, dtypes)
    rows, columns = _sizes(shape)
    dx = _result(shape, dtypes[0])
    dresidual = _result(shape, None if options.after else dtypes[3])
    matrices = [_matrix(t) for t in tensors[:4]]
    b, g = _vector(bias), _vector(layer_scale)
    w = norm.gain_of(_vector(weight), options)
    means = [t.contiguous() for t in (mean, rstd)]
    wanted = [dtypes[i] for i in (1, 2, 4, 5)]
    sums: Any = drop.call(
        "norm_backward",
        rows,
        columns,
        tuple(map(fast.matrix, matrices)),
        tuple(t.data_ptr() for t in means),
        (_address(b), _address(g), _address(w)),
        (fast.matrix(dx), fast.matrix(dresidual)),
        (options.norm == "rms_norm", options.after),
        widths=[columns if dtype else 0 for dtype in wanted],
    )
    dbias, dscale, dweight, dnorm_bias = map(_to, sums, wanted)
    return dx, dbias, dscale, dresidual, dweight, dnorm_bias
