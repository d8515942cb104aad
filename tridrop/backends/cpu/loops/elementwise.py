"""The elementwise family for CPUs, forward and backward in one pass each.

The formulas and the rounding are those of ``backends/reference/elementwise.py``: fp32 within, and
one rounding of what is stored. A matrix is a pair (address, dtype code), a vector an address of
fp32 numbers; the address 0 stands for an absent one. ``mask.next_piece`` describes ``decisions``
and the pieces of rows.
"""

from __future__ import annotations

import numpy as np

from .activations import activate, derive, differentiate
from .mask import (
    LANES,
    STRIP,
    cut,
    following,
    inline,
    keep_alive,
    kernel,
    last_and_factor,
    next_piece,
    randoms,
    scratch,
)
from .steps import accumulate_selected, add_vector, clear, copy, multiply, multiply_vector
from .storage import add_selected, load, load_rows, store, store_selected, store_selected_rows


@inline(set())
def strips(count):
    """Memory for ``count`` strips; the first one holds the random bits."""
    return scratch(4 * STRIP + count * STRIP * LANES)


@inline(set())
def strip(memory, k):
    return cut(memory, (4 + k * LANES) * STRIP, STRIP * LANES, np.float32)


@inline(set())
def load_biased(x, bias, row, rows, width, column, size, into):
    """into = x + bias of a piece, which begins at ``column`` in rows of ``width``."""
    if size == width:
        load(x, row * width, rows * size, into)
    else:
        reach = (rows - 1) * width + size
        load_rows(x, row * width + column, reach, rows, width, size, into)
    add_vector(into, rows, size, bias, column)


@inline(set())
def store_gradient(dx, dbias, row, rows, width, column, size, u, bits, last, scale):
    """Drop elements of u, add the rows of that to dbias, and store it to a piece of dx.

    The piece begins at ``column`` in rows of ``width``.
    """
    accumulate_selected(dbias, column, rows, size, u, bits, last, scale)
    if dx[0] == 0:
        return
    if size == width:
        store_selected(dx, row * width, rows * size, u, bits, last, scale)
    else:
        at, reach = row * width + column, (rows - 1) * width + size
        store_selected_rows(dx, at, reach, rows, width, size, u, bits, last, scale)


@kernel
def forward(start, stop, columns, decisions, scale, out, x, bias, layer_scale, residual, options):
    """out = residual + layer_scale * f(x + bias) * multiplier, for the rows from start to stop.

    ``options`` are the number of f in activations.FORMS, and whether f is gated: then x has twice
    as many columns, two halves, and f(first) * second takes the place of f.
    """
    function, gated = options
    width = 2 * columns if gated else columns
    memory = strips(3)
    bits, words = randoms(memory, STRIP * LANES, decisions[5])
    u, v = strip(memory, 1), strip(memory, 2)
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, decisions, r, done, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
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
    keep_alive(memory)


@kernel
def backward(start, stop, columns, decisions, scale, grad, x, bias, layer_scale, dx, sums, options):
    """Gradients of x, bias and layer_scale, from the rows from start to stop.

    ``x`` is absent where f is the identity. ``sums`` are the vectors for the last two gradients, of
    x's width and of ``columns``, summed over these rows alone.
    """
    function, gated = options
    dbias, dscale = sums
    width = 2 * columns if gated else columns
    memory = strips(6)
    bits, words = randoms(memory, STRIP * LANES, decisions[5])
    g, u, v = strip(memory, 1), strip(memory, 2), strip(memory, 3)
    w, product = strip(memory, 4), strip(memory, 5)
    clear(dbias, 0, width)
    clear(dscale, 0, columns)
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, decisions, r, done, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
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
            store_gradient(dx, dbias, r, rows, width, columns + done, size, w, kept, last, factor)
        # The selection comes last: a dropped element's gradient is 0 whatever its input was.
        if gated or dscale != 0:
            multiply(g, count, u)
        else:
            derive(function, u, g, count)
        store_gradient(dx, dbias, r, rows, width, done, size, g, kept, last, factor)
        r, done = following(r, rows, done + size, columns)
    keep_alive(memory)
