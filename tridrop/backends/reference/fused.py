"""The ops of elementwise.py and norm.py on a CPU: the same compositions, a block of rows at a time.

A block's intermediate tensors stay in the cache, the dropout is a compiled loop,
:class:`tridrop.fast.Selection`, and torch's own functions of one pass take the place of the
derivatives' and norms' formulas. Where numba does not serve, the two files compute the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import fast
from ...spec import NormOptions, Options, output_shape
from . import elementwise, norm
from .elementwise import compute

# Elements of a block: 1 MiB in fp32. gelu and dropout of [8192, 1024] in bf16, forward and
# backward: 49 ms at 2^15, 23 at 2^16, 18 at 2^17, 17 at 2^18 (two threads of a busy machine).
_BLOCK = 1 << 18

_aten = torch.ops.aten


def _gradient(grad: Tensor, function: str, u: Tensor) -> Tensor:
    """elementwise.activation_gradient in one pass."""
    if function == "none":
        return grad
    if function == "relu":
        return _aten.threshold_backward(grad, u, 0)
    if function == "silu":
        return _aten.silu_backward(grad, u)
    return _aten.gelu_backward(grad, u, approximate="tanh" if function == "gelu_tanh" else "none")


def _normalise(
    stream: Tensor, weight: Tensor | None, norm_bias: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """norm.normalise in one pass, where torch has one."""
    if options.norm != "layer_norm":
        return norm.normalise(stream, weight, norm_bias, options)
    gain = norm.gain_of(weight, options)
    return torch.native_layer_norm(stream, stream.shape[-1:], gain, norm_bias, options.eps)


def _normalise_gradients(
    dout: Tensor,
    stream: Tensor,
    weight: Tensor | None,
    options: NormOptions,
    needs: tuple[bool, bool],
    *,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """norm.normalise_gradients in one pass, where torch has one."""
    if options.norm != "layer_norm":
        return norm.normalise_gradients(dout, stream, weight, options, needs)
    size, gain = stream.shape[-1:], norm.gain_of(weight, options)
    like_bias = torch.empty(size, device="cpu") if needs[1] else None
    found = _aten.native_layer_norm_backward(
        dout, stream, size, mean, rstd, gain, like_bias, [True, *needs]
    )
    return found[0], found[1] if needs[0] else None, found[2] if needs[1] else None


def _selection(
    shape: tuple[int, ...],
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
    *tensors: Tensor | None,
) -> fast.Selection | None:
    """The random part where it is one mask of elements, computed in fp32, and numba serves."""
    elements, path = options.thresholds()
    if seed is None or p is not None or path > 0 or 0 in shape:
        return None
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return None
    return fast.selection(seed, shape, elements, shared=options.shared, shard=options.shard)


def _rows(t: Tensor | None, rows: int) -> Any:
    """As a matrix, without history."""
    return None if t is None else t.detach().reshape(rows, -1)


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _cut(t: Tensor | None, rows: slice) -> Any:
    return None if t is None else t[rows]


Block = Callable[[slice, fast.Selection], Sequence[Tensor | None]]


def _in_blocks(drop: fast.Selection, shape: Sequence[int], block: Block) -> list[Tensor | None]:
    """Call ``block`` for all rows; the sums, over the blocks, of the vectors that it returns."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if len(shape) else 1
    step = max(1, _BLOCK // columns)
    sums: list[Tensor | None] = []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        vectors = block(slice(start, stop), drop.part(start, stop))
        if start == 0:
            sums = list(vectors)
        else:
            pairs = zip(sums, vectors, strict=True)
            sums = [None if a is None or b is None else a.add_(b) for a, b in pairs]
    return sums


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
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(shape, dtype=dtype, device="cpu")
    rows = math.prod(shape[:-1])
    o, u, r = out.view(rows, -1), _rows(x, rows), _rows(residual, rows)
    if options.activation == "none" and bias is layer_scale is None and fast.can_store(x, out):
        drop.add(u.contiguous(), None if r is None else r.contiguous(), o)
        return out
    b, g = compute(_plain(bias), _plain(layer_scale))

    def block(at: slice, its: fast.Selection) -> Sequence[Tensor]:
        value: Any
        value, rest = compute(_cut(u, at), _cut(r, at))
        o[at] = elementwise.compose(value, b, g, rest, its, options)
        return ()

    _in_blocks(drop, x.shape, block)
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
    rows = math.prod(shape[:-1])
    g, u = _rows(grad, rows), _rows(x, rows)
    width = (shape[-1] if shape else 1) * (2 if options.gated else 1)
    whole = (*shape[:-1], width) if shape else shape
    dx = None if dtypes[0] is None else torch.empty(whole, dtype=dtypes[0], device="cpu")
    d = None if dx is None else dx.view(rows, -1)
    needs = (dtypes[0] is not None, dtypes[1] is not None, dtypes[2] is not None)
    alone = x is None and layer_scale is None and needs == (True, False, False)
    if alone and d is not None and fast.can_store(g, d):
        drop.add(g.contiguous(), None, d)
        return dx, None, None
    b, s = compute(_plain(bias), _plain(layer_scale))

    def block(at: slice, its: fast.Selection) -> Sequence[Tensor | None]:
        dout, value = compute(_cut(g, at), _cut(u, at))
        assert dout is not None
        found, *sums = elementwise.gradients(dout, value, b, s, its, options, needs, _gradient)
        if d is not None and found is not None:
            d[at] = found
        return sums

    sums = _in_blocks(drop, whole, block)
    dbias, dlayer_scale = (
        None if t is None or dtype is None else t.to(dtype)
        for t, dtype in zip(sums, dtypes[1:], strict=True)
    )
    return dx, dbias, dlayer_scale


def _one_pass(x: Tensor, stream: Tensor, residual: Tensor | None, options: NormOptions) -> bool:
    """Whether torch normalises the stream as it is stored, in fp32 within, rounding once.

    It does with a weight and a bias of fp32.
    """
    layer_norm = options.norm == "layer_norm" and options.out_dtype == stream.dtype
    return layer_norm and fast.can_store(x, residual, stream)


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
    rows = math.prod(shape[:-1])
    u, r = _rows(x, rows), _rows(residual, rows)
    vectors = compute(*map(_plain, (bias, layer_scale, weight, norm_bias)))
    b, g, w, nb = vectors
    stream = None
    if options.keep_stream and not options.after:
        stream = torch.empty(shape, dtype=options.stream_dtype, device="cpu")
    kept = _rows(stream, rows)
    if kept is not None and bias is layer_scale is None and _one_pass(x, kept, residual, options):
        drop.add(u.contiguous(), None if r is None else r.contiguous(), kept)
        gain = norm.gain_of(w, options)
        gain = torch.ones(kept.shape[1], device="cpu") if gain is None else gain
        shift = torch.zeros_like(gain) if nb is None else nb
        found = torch.native_layer_norm(kept, kept.shape[1:], gain, shift, options.eps)
        return found[0].view(shape), stream, found[1].view(rows), found[2].view(rows)

    out = torch.empty(shape, dtype=options.out_dtype, device="cpu")
    mean = torch.empty(rows, dtype=torch.float32, device="cpu")
    rstd = torch.empty_like(mean)
    o = out.view(rows, -1)

    def block(at: slice, its: fast.Selection) -> Sequence[Tensor]:
        value: Any
        value, rest = compute(_cut(u, at), _cut(r, at))
        found: Any = norm.norm_compose(value, b, g, rest, w, nb, its, options, _normalise)
        o[at], mean[at], rstd[at] = found[0], found[2][:, 0], found[3][:, 0]
        if kept is not None:
            kept[at] = found[1]
        return ()

    _in_blocks(drop, shape, block)
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
    rows = math.prod(shape[:-1])
    matrices = [_rows(t, rows) for t in tensors[:4]]
    vectors = compute(*map(_plain, tensors[4:]))
    needs = tuple(dtype is not None for dtype in dtypes)
    made = [torch.empty(shape, dtype=dtypes[i], device="cpu") if needs[i] else None for i in (0, 3)]
    if options.after:
        made[1] = None
    dx, dresidual = (_rows(t, rows) for t in made)

    def block(at: slice, its: fast.Selection) -> Sequence[Tensor | None]:
        wide = compute(*(_cut(t, at) for t in matrices))
        through = partial(_normalise_gradients, mean=mean[at, None], rstd=rstd[at, None])
        arguments: Any = (*wide, *vectors, its, options, needs, through)
        found: Any = norm.norm_gradients(*arguments)
        if dx is not None:
            dx[at] = found[0]
        if dresidual is not None:
            dresidual[at] = found[3]
        return found[1], found[2], found[4], found[5]

    sums = _in_blocks(drop, shape, block)
    dbias, dscale, dweight, dnorm_bias = (
        None if t is None else t.to(dtype)
        for t, dtype in zip(sums, (dtypes[1], dtypes[2], dtypes[4], dtypes[5]), strict=True)
    )
    return made[0], dbias, dscale, made[1], dweight, dnorm_bias
