"""The elementwise family for CPUs, forward and backward in one pass each.

The formulas and the rounding are those of ``backends/reference/elementwise.py``: fp32 within, and
one rounding of what is stored. A matrix is a pair (address, dtype code); the address 0 stands for
an absent one. ``given`` are the matrices that are read, the seed first; vectors among them are of
fp32. ``mask.next_piece`` describes ``decisions`` and the pieces of rows.
"""

from __future__ import annotations

import numpy as np

from .activations import activate, derive, differentiate
from .decorators import NOTHING, inline, written_out
from .kernels import kernel, sum_of_part, summing_kernel
from .mask import (
    LANES,
    STRIP,
    following,
    last_and_factor,
    next_piece,
    randoms,
)
from .memory import part_of, release, scratch, vector
from .steps import accumulate_selected, add_vector, clear, copy, multiply, multiply_vector
from .storage import add_selected, load_rows, store, store_selected, store_selected_rows


@written_out
def strips(count):
    """Memory for ``count`` strips; the first one holds the random bits."""
    return scratch(4 * STRIP + count * STRIP * LANES)


@written_out
def strip(memory, k):
    return vector(memory + 4 * (4 + k * LANES) * STRIP, STRIP * LANES, np.float32)


@inline(set())
def load_biased(x, bias, row, rows, width, column, size, into):
    """into = x + bias of a piece, which begins at ``column`` in rows of ``width``."""
    at, reach = row * width + column, (rows - 1) * width + size
    # Whole rows lie one after the other, and are one long loop.
    count, length = (1, rows * size) if size == width else (rows, size)
    load_rows(x, at, reach, count, width, length, into)
    add_vector(into, rows, size, bias, column)


@inline(set())
def store_gradient(dx, dbias, row, rows, width, column, size, u, bits, last, scale):
    """Drop elements of u, add the rows of that to dbias, and store it to a piece of dx.

    The piece begins at ``column`` in rows of ``width``.
    """
    accumulate_selected(dbias, column, rows, size, u, bits, last, scale)
    if dx[0] != 0:
        at, reach = row * width + column, (rows - 1) * width + size
        count, length = (1, rows * size) if size == width else (rows, size)
        store_selected_rows(dx, at, reach, count, width, length, u, bits, last, scale)


@kernel
def forward(start, stop, given, columns, decisions, scale, out, options):
    """out = residual + layer_scale * f(x + bias) * multiplier, for the rows from start to stop.

    ``given`` are the seed, x, bias, layer_scale and residual. ``options`` are the address of f's
    loops (activations.Form), and whether f is gated: then x has twice as many columns, two halves,
    and f(first) * second takes the place of f.
    """
    seed, x, (bias, _), (layer_scale, _), residual = given
    function, gated = options
    halves = 2 if gated else 1  # in a loop, so that what is done to both is compiled once
    width = halves * columns
    memory = strips(3)
    bits, words = randoms(memory, STRIP * LANES, decisions[4])
    u, v = strip(memory, 1), strip(memory, 2)
    r, done = start, NOTHING
    while r < stop:
        rows, lane, size = next_piece(bits, words, seed, decisions, r, done, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
        at, count = r * columns + done, rows * size
        kept = part_of(bits, lane, count)
        for half in range(halves):
            first = half * columns + done
            load_biased(x, bias, r, rows, width, first, size, strip(memory, 1 + half))
        activate(function, u, count)
        if gated:
            multiply(u, count, v)
        multiply_vector(u, rows, size, layer_scale, done)
        if residual[0] != 0:
            add_selected(residual, at, count, u, kept, last, factor)
            store(out, at, count, u)
        else:
            store_selected(out, at, count, u, kept, last, factor)
        r, done = following(r, rows, done + size, columns)
    release(memory)


@summing_kernel
def backward(start, stop, given, columns, decisions, scale, dx, options, sums):
    """Gradients of x, bias and layer_scale, from a part of the rows.

    ``given`` are the seed, grad, x, which is absent where f is the identity, bias and layer_scale.
    ``sums`` say where the last two gradients go, see :func:`summing_kernel`.
    """
    seed, grad, x, (bias, _), (layer_scale, _) = given
    function, gated = options
    halves = 2 if gated else 1  # in a loop, so that what is done to both is compiled once
    width = halves * columns
    dbias, dscale = sum_of_part(sums, 0, start), sum_of_part(sums, 1, start)
    memory = strips(6)
    bits, words = randoms(memory, STRIP * LANES, decisions[4])
    g, u, v = strip(memory, 1), strip(memory, 2), strip(memory, 3)
    w, product = strip(memory, 4), strip(memory, 5)
    clear(dbias, NOTHING, width)
    clear(dscale, NOTHING, columns)
    r, done = start, NOTHING
    while r < stop:
        rows, lane, size = next_piece(bits, words, seed, decisions, r, done, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
        count = rows * size
        kept = part_of(bits, lane, count)
        load_biased(grad, NOTHING, r, rows, columns, done, size, g)
        if x[0] != 0:
            for half in range(halves):
                first = half * columns + done
                load_biased(x, bias, r, rows, width, first, size, strip(memory, 2 + half))
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
        # The selection comes last: a dropped element's gradient is 0 whatever its input was.
        if gated or dscale != 0:
            multiply(g, count, u)
        else:
            derive(function, u, g, count)
        for half in range(halves):
            d, first = strip(memory, 1 + 3 * half), half * columns + done  # g, then w
            store_gradient(dx, dbias, r, rows, width, first, size, d, kept, last, factor)
        r, done = following(r, rows, done + size, columns)
    release(memory)
