"""The norm family for CPUs, forward and backward in one pass each over rows that stay in the cache.

The formulas are those of ``backends/reference/norm.py``, the rounding too: fp32 within, the stream
rounded to its dtype before it is normalised. Arguments are as in ``fast_elementwise.py``.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from .fast_elementwise import give, load_biased
from .fast_kernels import LANES, STRIP, inline, kernel, next_piece, part, vector
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
    multiply_vector(u, 1, size, weight, 0)
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


@inline(set())
def bits_for(columns):
    """Memory for the bits of a row, which may begin and end inside a group."""
    return np.empty(max(STRIP * LANES, columns + 2 * LANES), np.uint32)


@part(set())
def row_bits(bits, words, mask, row, stop, columns):
    """Make the bits of a whole row, or of several short ones: (rows, lane)."""
    rows, lane, done = next_piece(bits, words, mask, row, 0, stop, columns)
    while done < columns:
        done += next_piece(bits[lane + done :], words, mask, row, done, stop, columns)[2]
    return rows, lane


@kernel
def forward(start, stop, columns, mask, scale, out, x, stream, residual, found, vectors, options):
    """out, stream, mean and rstd of the rows from start to stop.

    ``found`` are the addresses of mean and rstd; ``vectors`` bias, layer_scale, weight, norm_bias;
    ``options`` whether it is RMSNorm, whether the dropout comes after the norm, and eps. Where the
    stream is not kept, only its kind counts.
    """
    bias, layer_scale, weight, norm_bias = vectors
    rms, after, eps = options
    bits, words = bits_for(columns), np.empty((4, STRIP), np.uint32)
    u, v = np.empty(columns, np.float32), np.empty(columns, np.float32)
    spare = np.empty(columns, np.float32)
    means = vector(found[0], stop, np.float32)
    rstds = vector(found[1], stop, np.float32)
    last, scale, size = uint32(mask[6]), np.float32(scale), np.float32(columns)
    lane, drawn = 0, start
    for r in range(start, stop):
        if r == drawn:
            rows, lane = row_bits(bits, words, mask, r, stop, columns)
            drawn += rows
        at = r * columns
        load_biased(x, bias, r, 1, columns, 0, columns, u)
        if residual[0] != 0:
            load(residual, at, columns, v)
        if not after:
            multiply_vector(u, 1, columns, layer_scale, 0)
            select(u, columns, bits, lane, last, scale)
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
            select(u, columns, bits, lane, last, scale)
            if residual[0] != 0:
                add(u, columns, v)
        store(out, at, columns, u)
        lane += columns


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
    bits, words = bits_for(columns), np.empty((4, STRIP), np.uint32)
    d, u = np.empty(columns, np.float32), np.empty(columns, np.float32)
    means = vector(found[0], stop, np.float32)
    rstds = vector(found[1], stop, np.float32)
    last, scale, size = uint32(mask[6]), np.float32(scale), np.float32(columns)
    lane, drawn = 0, start
    for address in sums:
        clear(address, 0, columns)
    for r in range(start, stop):
        if r == drawn:
            rows, lane = row_bits(bits, words, mask, r, stop, columns)
            drawn += rows
        at = r * columns
        load(dout, at, columns, d)
        if after:
            select(d, columns, bits, lane, last, scale)
        load(stream, at, columns, u)
        centre(u, means[r], rstds[r])
        if weight != 0 and dweight != 0 and dnorm_bias != 0:
            along, whole = gather(d, u, weight, dweight, dnorm_bias)
        else:
            accumulate(dnorm_bias, 0, 1, columns, d)
            accumulate_product(dweight, columns, d, u)
            multiply_vector(d, 1, columns, weight, 0)
            along, whole = dot(d, u), total(d)
        project(d, u, along / size, _ZERO if rms else whole / size, rstds[r])
        if dstream[0] != 0:
            load(dstream, at, columns, u)
            add(d, columns, u)
        if not after:
            if dresidual[0] != 0:
                store(dresidual, at, columns, d)
            if dscale != 0:
                load_biased(x, bias, r, 1, columns, 0, columns, u)
                multiply(u, columns, d)
                select(u, columns, bits, lane, last, scale)
                accumulate(dscale, 0, 1, columns, u)
            multiply_vector(d, 1, columns, layer_scale, 0)
            select(d, columns, bits, lane, last, scale)
        give(dx, dbias, r, 1, columns, 0, columns, d)
        lane += columns
