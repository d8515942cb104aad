"""The elementwise family for CPUs, forward and backward in one pass each.

The formulas are those of ``backends/reference/elementwise.py``, the rounding too: fp32 within, and
once to what is stored. Matrices are pairs (address, kind) and vectors addresses of fp32, 0 where
there is none; ``mask`` and pieces of rows are as in ``fast_kernels.next_piece``.
"""

from __future__ import annotations

import numpy as np
from numba import uint32

from .fast_kernels import LANES, STRIP, following, kernel, next_piece, part
from .fast_math import activate, derive
from .fast_storage import load, store
from .fast_vectors import (
    accumulate,
    add,
    add_vector,
    clear,
    multiply,
    multiply_vector,
    row_of,
    select,
)


@part(set())
def load_biased(x, bias, row, rows, width, column, size, into):
    """x + bias of a piece, from ``column`` on in rows of ``width``."""
    if size == width:
        load(x, row * width, rows * size, into)
    else:
        for k in range(rows):
            load(x, (row + k) * width + column, size, row_of(into, k, size))
    add_vector(into, rows, size, bias, column)


@part(set())
def give(dx, dbias, row, rows, width, column, size, values):
    """Store a piece of dx, from ``column`` on in rows of ``width``, and add it to dbias."""
    if dx[0] != 0 and size == width:
        store(dx, row * width, rows * size, values)
    elif dx[0] != 0:
        for k in range(rows):
            store(dx, (row + k) * width + column, size, row_of(values, k, size))
    accumulate(dbias, column, rows, size, values)


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
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, mask, r, done, stop, columns)
        at, count = r * columns + done, rows * size
        load_biased(x, bias, r, rows, width, done, size, u)
        activate(function, u, count)
        if gated:
            load_biased(x, bias, r, rows, width, columns + done, size, v)
            multiply(u, count, v)
        multiply_vector(u, rows, size, layer_scale, done)
        select(u, count, bits, lane, last, scale)
        if residual[0] != 0:
            load(residual, at, count, v)
            add(u, count, v)
        store(out, at, count, u)
        r, done = following(r, rows, done + size, columns)


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
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, mask, r, done, stop, columns)
        count = rows * size
        load(grad, r * columns + done, count, g)
        if x[0] != 0:
            load_biased(x, bias, r, rows, width, done, size, u)
        if gated:
            load_biased(x, bias, r, rows, width, columns + done, size, v)
        if gated or dscale != 0:
            w[:count] = u[:count]
            activate(function, w, count)
            multiply(w, count, g)
        if dscale != 0:
            product[:count] = w[:count]
            if gated:
                multiply(product, count, v)
            select(product, count, bits, lane, last, scale)
            accumulate(dscale, done, rows, size, product)
        multiply_vector(g, rows, size, layer_scale, done)
        if gated:
            multiply(g, count, v)
            multiply_vector(w, rows, size, layer_scale, done)
            select(w, count, bits, lane, last, scale)
            give(dx, dbias, r, rows, width, columns + done, size, w)
        # The selection comes last: a dropped element's gradient is 0 whatever its input was.
        derive(function, u, g, count)
        select(g, count, bits, lane, last, scale)
        give(dx, dbias, r, rows, width, done, size, g)
        r, done = following(r, rows, done + size, columns)
