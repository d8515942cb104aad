"""Dropout, add and norm in torch.

    before:  stream = residual + layer_scale * (x + bias) * multiplier;   out = affine(stream)
    after:   stream = x;   out = residual + affine(stream) * multiplier

    affine(s) = (s - mean) * rstd * weight + norm_bias,   rstd = 1 / sqrt(var + eps)

over the last dimension. For RMSNorm (Zhang and Sennrich 2019) mean is 0 and var is the mean square.
``multiplier`` is the random part of elementwise.py, a constant for the derivative.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import mask
from ...spec.elementwise import NormOptions
from ...spec.operands import Norm, NormBackward
from .elementwise import Dtypes, Multiplier, compute, multiplier, sum_rows, to, unaliased


def moments(stream: Tensor, options: NormOptions) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of each row, [..., 1] each, in two passes over the data."""
    if options.norm == "rms_norm":
        mean = torch.zeros_like(stream[..., :1])
    else:
        mean = stream.mean(-1, keepdim=True)
    variance = (stream - mean).square().mean(-1, keepdim=True)
    return mean, (variance + options.eps).rsqrt()


def gain_of(weight: Tensor | None, options: NormOptions) -> Tensor | None:
    return weight + 1 if weight is not None and options.zero_centered else weight


def _affine(
    normed: Tensor, weight: Tensor | None, norm_bias: Tensor | None, options: NormOptions
) -> Tensor:
    gain = gain_of(weight, options)
    normed = normed if gain is None else normed * gain
    return normed if norm_bias is None else normed + norm_bias


def normalise(
    stream: Tensor, weight: Tensor | None, norm_bias: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(affine(stream), mean, rstd)."""
    mean, rstd = moments(stream, options)
    return _affine((stream - mean) * rstd, weight, norm_bias, options), mean, rstd


def normalise_gradients(
    dout: Tensor,
    stream: Tensor,
    weight: Tensor | None,
    options: NormOptions,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The differentiable gradients of stream, weight and norm_bias in :func:`normalise`."""
    mean, rstd = moments(stream, options)
    normed = (stream - mean) * rstd
    gain = gain_of(weight, options)
    dnormed = dout if gain is None else dout * gain
    total = dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)
    if options.norm != "rms_norm":
        total = total - dnormed.mean(-1, keepdim=True)
    return (
        total * rstd,
        sum_rows(dout * normed) if needs[0] else None,
        sum_rows(dout) if needs[1] else None,
    )


def norm_compose(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    drop: Multiplier,
    options: NormOptions,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, stream, statistics): the stream in ``stream_dtype``, the others in the arguments'."""
    stream: Tensor | None = None
    if options.after:
        normalised = x
    else:
        stream, normalised = _stream(x, bias, layer_scale, residual, drop, options)
    out, mean, rstd = normalise(normalised, weight, norm_bias, options)
    if options.after:
        out = drop(out) if residual is None else residual + drop(out)
    return out, stream, torch.cat((mean, rstd), -1)


def _stream(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    drop: Multiplier,
    options: NormOptions,
) -> tuple[Tensor, Tensor]:
    """The stream in ``stream_dtype``, and the same numbers in the dtype of the arguments."""
    value = x if bias is None else x + bias
    value = drop(value if layer_scale is None else value * layer_scale)
    stream = to(value if residual is None else residual + value, options.stream_dtype)
    return stream, to(stream, value.dtype)  # from the stored stream, which is what backward reads


def composed(operands: Norm, options: NormOptions) -> tuple[Tensor, Tensor | None]:
    """(out, stream) in torch's own operators, layer_norm among them."""
    *tensors, seed, p = operands
    drop = multiplier(tuple(operands.x.shape), seed, p, options)
    wide, b, g, r, w, n = compute(*tensors)
    assert wide is not None
    stream, normalised = None, wide
    if not options.after:
        stream, normalised = _stream(wide, b, g, r, drop, options)
    if options.norm == "layer_norm":
        gain = gain_of(w, options)
        out = F.layer_norm(normalised, normalised.shape[-1:], gain, n, options.eps)
    else:
        out = normalise(normalised, w, n, options)[0]
    if options.after:
        out = drop(out) if r is None else r + drop(out)
    return to(out, options.out_dtype), stream


def norm_forward(
    operands: Norm, options: NormOptions, draw: ModuleType = mask
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, stream, statistics); stream is None where it is x itself or is not kept."""
    *tensors, seed, p = operands
    drop = multiplier(tuple(operands.x.shape), seed, p, options, draw)
    wide = compute(*tensors)
    out, stream, statistics = norm_compose(*wide, drop, options)  # type: ignore[arg-type, call-arg]
    return (
        out.to(options.out_dtype).contiguous(),
        None if stream is None or not options.keep_stream else unaliased(stream, operands.x),
        statistics.to(torch.float32),
    )


def norm_gradients(
    dout: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    drop: Multiplier,
    options: NormOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias, layer_scale, residual, weight and norm_bias; differentiable.

    Only the gradient of layer_scale needs ``x``. With the dropout after the norm, the residual's
    gradient is the incoming gradient, and the result has None for it.
    """
    if options.after:
        dout = drop(dout)
    total, dweight, dnorm_bias = normalise_gradients(
        dout, stream, weight, options, (needs[4], needs[5])
    )
    if dstream is not None:
        total = total + dstream
    dx, dlayer_scale = total, None
    if not options.after:
        if needs[2]:
            assert x is not None
            dlayer_scale = sum_rows(drop(total * (x if bias is None else x + bias)))
        dx = drop(total if layer_scale is None else total * layer_scale)
    return (
        dx if needs[0] else None,
        sum_rows(dx) if needs[1] else None,
        dlayer_scale,
        total if needs[3] and not options.after else None,
        dweight,
        dnorm_bias,
    )


def norm_backward(
    operands: NormBackward, options: NormOptions, dtypes: Dtypes, draw: ModuleType = mask
) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias, layer_scale, residual, weight, norm_bias; None where dtypes have None.

    Where the dropout comes after the norm, the residual's gradient is the incoming gradient, and
    the result has None for it.
    """
    dout, dstream, stream, _, x, bias, layer_scale, weight, seed, p = operands
    drop = multiplier(tuple(dout.shape), seed, p, options, draw)
    wide = compute(dout, dstream, stream, x, bias, layer_scale, weight, dtypes=dtypes)
    needs = tuple(dtype is not None for dtype in dtypes)
    results = norm_gradients(*wide, drop, options, needs)  # type: ignore[call-arg, arg-type]
    dx, *others = (
        None if t is None or dtype is None else t.to(dtype).contiguous()
        for t, dtype in zip(results, dtypes, strict=True)
    )
    # Without dropout the gradients of x and of the residual would be the same tensor.
    return dx, *(t if t is None or dx is None else unaliased(t, dx) for t in others)
