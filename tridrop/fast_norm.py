"""The norm family for CPUs, forward and backward in one pass each over rows that stay in the cache.

The formulas are those of ``backends/reference/norm.py``, the rounding too: fp32 within, the stream
rounded to its dtype before it is normalised. Arguments are as in ``fast_elementwise.py``.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from .fast_elementwise import give, load_biased
from .fast_kernels import LANES, STRIP, kernel, next_strip, part, vector
from .fast_storage import load, store
from .fast_vectors import (
    accumulate,
    accumulate_product,
    add,
    clear,
    multiply,
    multiply_vector,
    select,
)

_ZERO, _ONE = np.float32(0), np.float32(1)
_any_order = {"reassoc", "contract", "nsz"}  # sums of a row, in as many parts as a vector has


@part(_any_order)
def total(u):
    found = _ZERO
    for j in range(u.size):
        found += u[j]
    return found


@part(_any_order)
def squares(u, mean):
    found = _ZERO
    for j in range(u.size):
        found += (u[j] - mean) * (u[j] - mean)
    return found


@part(_any_order)
def dot(u, v):
    found = _ZERO
    for j in range(u.size):
        found += u[j] * v[j]
    return found


@part({"contract"})
def centre(u, mean, rstd):
    """u = (u - mean) * rstd."""
    for j in range(u.size):
        u[j] = (u[j] - mean) * rstd


@part({"contract"})
def affine(u, mean, rstd, weight, bias):
    """u = (u - mean) * rstd * weight + bias, of vectors of which each may be absent."""
    size = u.size
    if weight != 0 and bias != 0:
        w, b = vector(weight, size, np.float32), vector(bias, size, np.float32)
        for j in range(size):
            u[j] = (u[j] - mean) * rstd * w[j] + b[j]
        return
    centre(u, mean, rstd)
    multiply_vector(u, size, weight, 0)
    if bias != 0:
        add(u, size, vector(bias, size, np.float32))


@part(_any_order)
def gather(d, u, weight, dweight, dnorm_bias):
    """The sums over a row for one whose vectors are all there, in one pass: d becomes d * weight.

    Returns the sums of d * weight * u and of d * weight.
    """
    size = d.size
    w = vector(weight, size, np.float32)
    of_weight = vector(dweight, size, np.float32)
    of_bias = vector(dnorm_bias, size, np.float32)
    along, whole = _ZERO, _ZERO
    for j in range(size):
        grad = d[j]
        of_bias[j] += grad
        of_weight[j] += grad * u[j]
        grad *= w[j]
        d[j] = grad
        along += grad * u[j]
        whole += grad
    return along, whole


@part({"contract"})
def project(d, normed, along, mean, rstd):
    """d = (d - normed * along - mean) * rstd."""
    for j in range(d.size):
        d[j] = (d[j] - normed[j] * along - mean) * rstd


@part(set())
def drop_row(u, row, columns, mask, scale, bits, words):
    """Apply the random part to a whole row."""
    done = 0
    while done < columns:
        lane, size = next_strip(bits, words, mask, row, done, columns)
        select(u, done, size, bits, lane, uint32(mask[6]), scale)
        done += size


@kernel
def forward(start, stop, columns, mask, scale, out, x, stream, residual, found, vectors, options):
    """out, stream, mean and rstd of the rows from start to stop.

    ``found`` are the addresses of mean and rstd; ``vectors`` bias, layer_scale, weight, norm_bias;
    ``options`` whether it is RMSNorm, whether the dropout comes after the norm, and eps. Where the
    stream is not kept, only its kind counts.
    """
    bias, layer_scale, weight, norm_bias = vectors
    rms, after, eps = options
    bits, words = np.empty(STRIP * LANES, np.uint32), np.empty((4, STRIP), np.uint32)
    u, v = np.empty(columns, np.float32), np.empty(columns, np.float32)
    spare = np.empty(columns, np.float32)
    means = vector(found[0], stop, np.float32)
    rstds = vector(found[1], stop, np.float32)
    scale, size = np.float32(scale), np.float32(columns)
    for r in range(start, stop):
        at = r * columns
        load_biased(x, bias, r, columns, 0, columns, u)
        if residual[0] != 0:
            load(residual, at, columns, v)
        if not after:
            multiply_vector(u, columns, layer_scale, 0)
            drop_row(u, r, columns, mask, scale, bits, words)
            if residual[0] != 0:
                add(u, columns, v)
            # Through memory, so that what is normalised is what backward reads.
            kept, place = (stream, at) if stream[0] != 0 else ((spare.ctypes.data, stream[1]), 0)
            store(kept, place, columns, u)
            load(kept, place, columns, u)
        mean = _ZERO if rms else total(u) / size
        rstd = _ONE / np.sqrt(squares(u, mean) / size + np.float32(eps))
        means[r], rstds[r] = mean, rstd
        affine(u, mean, rstd, weight, norm_bias)
        if after:
            drop_row(u, r, columns, mask, scale, bits, words)
            if residual[0] != 0:
                add(u, columns, v)
        store(out, at, columns, u)


@kernel
def backward(start, stop, columns, mask, scale, given, found, vectors, results, sums, options):
    """Gradients of the rows from start to stop.

    ``given`` are dout, dstream, stream and x; ``found`` and ``vectors`` as in :func:`forward`,
    without norm_bias; ``results`` dx and dresidual; ``sums`` where the gradients of bias,
    layer_scale, weight and norm_bias go, of these rows alone; ``options`` as in :func:`forward`.
    """
    dout, dstream, stream, x = given
    bias, layer_scale, weight = vectors
    dx, dresidual = results
    dbias, dscale, dweight, dnorm_bias = sums
    rms, after = options
    bits, words = np.empty(STRIP * LANES, np.uint32), np.empty((4, STRIP), np.uint32)
    d, u = np.empty(columns, np.float32), np.empty(columns, np.float32)
    means = vector(found[0], stop, np.float32)
    rstds = vector(found[1], stop, np.float32)
    scale, size = np.float32(scale), np.float32(columns)
    for address in sums:
        clear(address, 0, columns)
    for r in range(start, stop):
        at = r * columns
        load(dout, at, columns, d)
        if after:
            drop_row(d, r, columns, mask, scale, bits, words)
        load(stream, at, columns, u)
        centre(u, means[r], rstds[r])
        if weight != 0 and dweight != 0 and dnorm_bias != 0:
            along, whole = gather(d, u, weight, dweight, dnorm_bias)
        else:
            accumulate(dnorm_bias, 0, columns, d)
            accumulate_product(dweight, columns, d, u)
            multiply_vector(d, columns, weight, 0)
            along, whole = dot(d, u), total(d)
        project(d, u, along / size, _ZERO if rms else whole / size, rstds[r])
        if dstream[0] != 0:
            load(dstream, at, columns, u)
            add(d, columns, u)
        if not after:
            if dresidual[0] != 0:
                store(dresidual, at, columns, d)
            if dscale != 0:
                load_biased(x, bias, r, columns, 0, columns, u)
                multiply(u, columns, d)
                drop_row(u, r, columns, mask, scale, bits, words)
                accumulate(dscale, 0, columns, u)
            multiply_vector(d, columns, layer_scale, 0)
            drop_row(d, r, columns, mask, scale, bits, words)
        give(dx, dbias, r, columns, 0, columns, d)
