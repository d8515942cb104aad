"""The elementwise family for CPUs, forward and backward in one pass each.

The formulas are those of ``backends/reference/elementwise.py``, the rounding too: fp32 within, and
once to what is stored. Matrices are pairs (address, kind) and vectors addresses of fp32, 0 where
there is none; ``mask`` is as in ``fast_kernels.next_strip``.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from .fast_kernels import LANES, STRIP, kernel, next_strip, part
from .fast_math import activate, derive
from .fast_storage import load, store
from .fast_vectors import accumulate, add, add_vector, clear, multiply, multiply_vector, select


@part(set())
def load_biased(x, bias, row, width, column, size, into):
    """x + bias of a part of a row."""
    load(x, row * width + column, size, into)
    add_vector(into, size, bias, column)


@part(set())
def give(dx, dbias, row, width, column, size, values):
    """Store a part of a row of dx, and add it to dbias."""
    if dx[0] != 0:
        store(dx, row * width + column, size, values)
    accumulate(dbias, column, size, values)


@kernel
def forward(start, stop, columns, mask, scale, out, x, bias, layer_scale, residual, options):
    """out = residual + layer_scale * f(x + bias) * multiplier, of the rows from start to stop.

    ``options`` are the number of f in fast_math, and whether x holds two halves in twice as many
    columns: then f(first) * second takes the place of f.
    """
    function, gated = options
    width = 2 * columns if gated else columns
    bits, words = np.empty(STRIP * LANES, np.uint32), np.empty((4, STRIP), np.uint32)
    u, v = np.empty(STRIP * LANES, np.float32), np.empty(STRIP * LANES, np.float32)
    last, scale = uint32(mask[6]), np.float32(scale)
    for r in range(start, stop):
        done = 0
        while done < columns:
            lane, size = next_strip(bits, words, mask, r, done, columns)
            load_biased(x, bias, r, width, done, size, u)
            activate(function, u, size)
            if gated:
                load_biased(x, bias, r, width, columns + done, size, v)
                multiply(u, size, v)
            multiply_vector(u, size, layer_scale, done)
            select(u, 0, size, bits, lane, last, scale)
            if residual[0] != 0:
                load(residual, r * columns + done, size, v)
                add(u, size, v)
            store(out, r * columns + done, size, u)
            done += size


@kernel
def backward(start, stop, columns, mask, scale, grad, x, bias, layer_scale, dx, sums, options):
    """Gradients of x, bias and layer_scale, of the rows from start to stop.

    ``x`` is absent where f is the identity. ``sums`` are where the last two go: a vector of x's
    width and one of ``columns``, of these rows alone.
    """
    function, gated = options
    dbias, dscale = sums
    width = 2 * columns if gated else columns
    bits, words = np.empty(STRIP * LANES, np.uint32), np.empty((4, STRIP), np.uint32)
    g, u = np.empty(STRIP * LANES, np.float32), np.empty(STRIP * LANES, np.float32)
    v, w = np.empty(STRIP * LANES, np.float32), np.empty(STRIP * LANES, np.float32)
    product = np.empty(STRIP * LANES, np.float32)
    last, scale = uint32(mask[6]), np.float32(scale)
    clear(dbias, 0, width)
    clear(dscale, 0, columns)
    for r in range(start, stop):
        done = 0
        while done < columns:
            lane, size = next_strip(bits, words, mask, r, done, columns)
            load(grad, r * columns + done, size, g)
            if x[0] != 0:
                load_biased(x, bias, r, width, done, size, u)
            if gated:
                load_biased(x, bias, r, width, columns + done, size, v)
            if gated or dscale != 0:
                w[:size] = u[:size]
                activate(function, w, size)
                multiply(w, size, g)
            if dscale != 0:
                product[:size] = w[:size]
                if gated:
                    multiply(product, size, v)
                select(product, 0, size, bits, lane, last, scale)
                accumulate(dscale, done, size, product)
            multiply_vector(g, size, layer_scale, done)
            if gated:
                multiply(g, size, v)
                multiply_vector(w, size, layer_scale, done)
                select(w, 0, size, bits, lane, last, scale)
                give(dx, dbias, r, width, columns + done, size, w)
            # The selection comes last: a dropped element's gradient is 0 whatever its input was.
            derive(function, u, g, size)
            select(g, 0, size, bits, lane, last, scale)
            give(dx, dbias, r, width, done, size, g)
            done += size
