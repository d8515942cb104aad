"""The elementwise family for CPUs, forward and backward in one pass each.

The formulas are those of ``backends/reference/elementwise.py``, the rounding too: fp32 within, and
once to what is stored. Matrices are pairs (address, kind) and vectors addresses of fp32, 0 where
there is none; ``mask`` and pieces of rows are as in ``mask.next_piece``.
"""

from __future__ import annotations

import numpy as np

from .activations import activate, derive, differentiate
from .mask import (
    LANES,
    STRIP,
    cut,
    following,
    held,
    inline,
    kernel,
    next_piece,
    randoms,
    rule,
    scratch,
)
from .steps import accumulate_selected, add_vector, clear, copy, multiply, multiply_vector
from .storage import add_selected, load, load_rows, store, store_selected, store_selected_rows


@inline(set())
def strips(count):
    """Memory for ``count`` strips, of which the first holds bits."""
    return scratch(4 * STRIP + count * STRIP * LANES)


@inline(set())
def strip(memory, k):
    return cut(memory, (4 + k * LANES) * STRIP, STRIP * LANES, np.float32)


@inline(set())
def load_biased(x, bias, row, rows, width, column, size, into):
    """x + bias of a piece, from ``column`` on in rows of ``width``."""
    if size == width:
        load(x, row * width, rows * size, into)
    else:
        reach = (rows - 1) * width + size
        load_rows(x, row * width + column, reach, rows, width, size, into)
    add_vector(into, rows, size, bias, column)


@inline(set())
def give(dx, dbias, row, rows, width, column, size, u, bits, last, scale):
    """Drop elements of u, store that to dx from ``column`` on in rows of ``width``, sum it up."""
    accumulate_selected(dbias, column, rows, size, u, bits, last, scale)
    if dx[0] == 0:
        return
    if size == width:
        store_selected(dx, row * width, rows * size, u, bits, last, scale)
    else:
        at, reach = row * width + column, (rows - 1) * width + size
        store_selected_rows(dx, at, reach, rows, width, size, u, bits, last, scale)


@kernel
def forward(start, stop, columns, mask, scale, out, x, bias, layer_scale, residual, options):
    """out = residual + layer_scale * f(x + bias) * multiplier, of the rows from start to stop.

    ``options`` are the number of f in activations.FORMS, and whether x holds two halves in twice
    as many columns: then f(first) * second takes the place of f.
    """
    function, gated = options
    width = 2 * columns if gated else columns
    memory = strips(3)
    bits, words = randoms(memory, STRIP * LANES, mask[5])
    u, v = strip(memory, 1), strip(memory, 2)
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, mask, r, done, stop, columns)
        last, factor = rule(mask, scale, r)
        at, count = r * columns + done, rows * size
        kept = bits[lane : lane + count]
        load_biased(x, bias, r, rows, width, done, size, u)
        activate(function, u, count)
        if gated:
            load_biased(x, bias, r, rows, width, columns + done, size, v)
            multiply(u, count, v)
        multiply_vector(u, rows, size, layer_scale, done)
        if residual[0] != 0:
            add_selected(residual, at, count, u, kept, last, factor)
            store(out, at, count, u)
        else:
            store_selected(out, at, count, u, kept, last, factor)
        r, done = following(r, rows, done + size, columns)
    held(memory)


@kernel
def backward(start, stop, columns, mask, scale, grad, x, bias, layer_scale, dx, sums, options):
    """Gradients of x, bias and layer_scale, of the rows from start to stop.

    ``x`` is absent where f is the identity. ``sums`` are where the last two go: a vector of x's
    width and one of ``columns``, of these rows alone.
    """
    function, gated = options
    dbias, dscale = sums
    width = 2 * columns if gated else columns
    memory = strips(6)
    bits, words = randoms(memory, STRIP * LANES, mask[5])
    g, u, v = strip(memory, 1), strip(memory, 2), strip(memory, 3)
    w, product = strip(memory, 4), strip(memory, 5)
    clear(dbias, 0, width)
    clear(dscale, 0, columns)
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, mask, r, done, stop, columns)
        last, factor = rule(mask, scale, r)
        count = rows * size
        kept = bits[lane : lane + count]
        load(grad, r * columns + done, count, g)
        if x[0] != 0:
            load_biased(x, bias, r, rows, width, done, size, u)
        if gated:
            load_biased(x, bias, r, rows, width, columns + done, size, v)
        if gated or dscale != 0:
            differentiate(function, u, w, count)
            multiply(w, count, g)
        if dscale != 0:
            copy(w, count, product)
            if gated:
                multiply(product, count, v)
            accumulate_selected(dscale, done, rows, size, product, kept, last, factor)
        multiply_vector(g, rows, size, layer_scale, done)
        if gated:
            multiply(g, count, v)
            multiply_vector(w, rows, size, layer_scale, done)
            give(dx, dbias, r, rows, width, columns + done, size, w, kept, last, factor)
        # The selection comes last: a dropped element's gradient is 0 whatever its input was.
        if gated or dscale != 0:
            multiply(g, count, u)
        else:
            derive(function, u, g, count)
        give(dx, dbias, r, rows, width, done, size, g, kept, last, factor)
        r, done = following(r, rows, done + size, columns)
    held(memory)
