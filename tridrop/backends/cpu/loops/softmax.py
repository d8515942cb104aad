"""Softmax and dropout of attention scores for CPUs, forward and backward in one pass each.

The formulas and the rounding are those of ``backends/reference/softmax.py``: fp32 within, and one
rounding of what is stored. A row of scores stays in the cache. A matrix is a pair (address, dtype
code) as in ``loops/storage.py``; absent matrices and vectors have the address 0. The same kernels
compute attention, by cpu/by_head.py: then scores are products of tensors, some rows at a time, and
are multiplied again before they leave the cache.

``given`` are the matrices that are read, the seed first. ``sizes`` are the numbers of heads and of
queries. ``decisions`` says how elements are decided: the domain, ``last`` (an element is dropped
iff its bits are at most that, and none is dropped where it is negative) and the origin of the
coordinates (batch, head, query, key).
``band`` holds the bounds of key - query, both local indices; outside of them probabilities are 0. A
key outside of the band, and one whose score is minus infinity, has the probability 0 and the
gradient 0, also in a row with NaN.
"""

from __future__ import annotations

import numpy as np

from ....contract.mask import TILE
from .decorators import NOTHING, apart, inline, written_out
from .mask import STRIP, key_words, place_of_row, randoms, score_bits
from .memory import LINE, release, scratch, vector
from .products import from_column, multiplying, product, rows_of, turned
from .scores import (
    NO_KEY,
    ONE,
    ZERO,
    add_mask,
    clear,
    clear_outside,
    exponentials_of,
    inner,
    inner_of_some,
    load_kept,
    load_scaled,
    rescale,
    scaled,
    store_kept,
    store_projected,
    store_projected_some,
)
from .steps import add, fill
from .storage import load, store


@inline(set())
def seen(row, queries, keys, band, low):
    """The first key from ``low`` on that a row's query sees, and the key after the last one."""
    query = row % queries
    end = max(low, min(keys, query + band[1] + 1))
    return min(end, max(low, query + band[0])), end


@inline(set())
def bits_of_row(bits, words, seed, decisions, row, sizes, first, end):
    """Fill ``bits`` for the keys from ``first`` to ``end``; returns the lane where they begin."""
    domain, last, origin = decisions[0], decisions[1], decisions[2:]
    if last < 0 or end == first:
        return 0
    place = place_of_row(row, sizes, origin)
    return score_bits(
        bits, words, key_words(seed[0]), domain, place, origin[3] + first, end - first
    )


@inline(set())
def width_of(keys):
    """The length of a row's arrays: its bits may begin and end anywhere in a tile."""
    return (keys // LINE + 2 + 2 * TILE // LINE) * LINE


@written_out
def row_of_scratch(memory, k, keys):
    return vector(memory + 16 * STRIP + 4 * k * width_of(keys), keys, np.float32)


@apart(set())
def clear_excluded(x, at, size, scale, spare, u):
    """In a row with NaN, set the probabilities u to 0 where the score is minus infinity.

    The scores are read once more for that.
    """
    scores = spare[:size]
    load_scaled(x, at, size, scale, scores)
    clear(scores, u, NO_KEY)


@inline(set())
def chunk_of(row, stop, cut, sizes, keys, band):
    """(rows, first key, key after the last) of some rows of one head, and the keys that they see.

    Without ``narrow`` these are all keys.
    """
    query, (most, _, _, narrow) = row % sizes[1], cut
    rows = min(most, stop - row, sizes[1] - query)
    if narrow == 0:
        return rows, NOTHING, keys
    low = min(keys - 1, max(0, query + band[0]))
    return rows, low, max(low + 1, min(keys, query + rows + band[1]))


@written_out
def head_of(row, sizes, group):
    """(sample, head, key head, query) of a row of scores."""
    head = row // sizes[1] % sizes[0]
    return row // sizes[1] // sizes[0], head, head // group, row % sizes[1]


@multiplying
def forward(start, stop, given, keys, sizes, decisions, factor, band, scale, results, cut,
            tensors, call):  # fmt: skip
    """The results of the rows from start to stop: out, probabilities, and lse in fp32.

    ``given`` are the seed and x. ``factor`` multiplies kept probabilities, ``scale`` scores.

    With ``tensors`` it is attention, and x and out are absent: scores are products of query and
    key, and ``attended`` gets those of kept probabilities and value. ``cut`` says how many rows of
    scores there are at a time, how many heads share a key head, whether the mask replaces, see
    :func:`add_mask`, and whether keys that none of these rows sees are left out of the products.
    """
    seed, x = given
    out, probabilities, lse = results
    query, key, value, mask, attended = tensors
    whole = query[0] != 0
    of_row = np.float32(1.0 if whole else scale)
    memory = scratch(4 * STRIP + 3 * width_of(keys))
    bits, words = randoms(memory, width_of(keys), decisions[1])
    u, spare = row_of_scratch(memory, 1, keys), row_of_scratch(memory, 2, keys)
    last, factor = np.uint32(max(0, decisions[1])), np.float32(factor)
    scores = scratch(cut[0] * keys if whole else NOTHING)
    queries = scratch(cut[0] * query[5])
    r = start
    while r < stop:
        rows, low, high, base = stop - r, NOTHING, keys, NOTHING
        if whole:
            rows, low, high = chunk_of(r, stop, cut, sizes, keys, band)
            base, x, out = r, (scores, NOTHING), (scores, NOTHING)
        width = high - low
        sample, head, shared, number = head_of(r, sizes, cut[1])
        block = scores, rows, width, width, NOTHING + 1
        if whole:
            left = scaled(rows_of(query, sample, head, number, rows), scale, queries)
            right = turned(rows_of(key, sample, shared, low, width))
            product(call, block, left, right, 0.0, 1.0)
        if mask[0] != 0:
            added = rows_of(mask, sample, head, number, rows)
            add_mask(scores, rows, width, from_column(added, low), cut[2])
        for row in range(r, r + rows):
            first, end = seen(row, sizes[1], keys, band, low)
            begin = (row - base) * width
            at, size = begin + first - low, end - first
            v = u[:size]
            found, inverse = exponentials_of(v, load_scaled(x, at, size, of_row, v))
            if found != found or probabilities[0] != 0:
                rescale(v, inverse)
                inverse = ONE
            if found != found:
                clear_excluded(x, at, size, of_row, spare, v)
            if lse != 0:
                vector(lse, stop, np.float32)[row] = found
            if probabilities[0] != 0:
                store(probabilities, at, size, v)
            lane = bits_of_row(bits, words, seed, decisions, row, sizes, first, end)
            store_kept(out, at, size, v, inverse, bits[lane : lane + size], last, factor)
            if size < width:
                clear_outside(out, begin, width, first - low, end - low)
                if probabilities[0] != 0:
                    clear_outside(probabilities, begin, width, first - low, end - low)
        if whole:
            left = rows_of(attended, sample, head, number, rows)
            product(call, left, block, rows_of(value, sample, shared, low, width), 0.0, 1.0)
        r += rows
    release(queries)
    release(scores)
    release(memory)


@multiplying
def backward(start, stop, given, keys, sizes, decisions, factor, band, scale, kept, dx, cut,
             tensors, call):  # fmt: skip
    """Gradients of the scores in the rows from start to stop.

    ``given`` are the seed, x, dout, dsoftmax, and the gradient of lse in fp32.
    ``kept`` receives the probabilities times the multiplier; it may be x, and dx may be dout.

    With ``tensors`` it is attention, as in :func:`forward`: x, dout, kept and dx are absent, and
    the last three tensors get the gradients of query, key and value that are wanted. Where keys are
    left out of products, the last two are added to what is there.
    """
    seed, x, dout, dsoftmax, (dlse, _) = given
    query, key, value, mask, grad, dquery, dkey, dvalue = tensors
    whole = query[0] != 0
    of_row = np.float32(1.0 if whole else scale)
    memory = scratch(4 * STRIP + 4 * width_of(keys))
    bits, words = randoms(memory, width_of(keys), decisions[1])
    u, g = row_of_scratch(memory, 1, keys), row_of_scratch(memory, 2, keys)
    spare = row_of_scratch(memory, 3, keys)
    last, factor = np.uint32(max(0, decisions[1])), np.float32(factor)
    scores = scratch(2 * cut[0] * keys if whole else NOTHING)
    scaled_queries = scratch(cut[0] * query[5])
    r = start
    while r < stop:
        rows, low, high, base = stop - r, NOTHING, keys, NOTHING
        if whole:
            rows, low, high = chunk_of(r, stop, cut, sizes, keys, band)
            base, x, dout = r, (scores, NOTHING), (scores + 4 * cut[0] * keys, NOTHING)
            kept, dx = x, dout
        width = high - low
        sample, head, shared, number = head_of(r, sizes, cut[1])
        block = x[0], rows, width, width, NOTHING + 1
        other = dout[0], rows, width, width, NOTHING + 1
        queries = rows_of(query, sample, head, number, rows)
        outs = rows_of(grad, sample, head, number, rows)
        if whole:
            right = rows_of(key, sample, shared, low, width)
            left = scaled(queries, scale, scaled_queries)
            product(call, block, left, turned(right), 0.0, 1.0)
            right = rows_of(value, sample, shared, low, width)
            product(call, other, outs, turned(right), 0.0, 1.0)
        if mask[0] != 0:
            added = rows_of(mask, sample, head, number, rows)
            add_mask(scores, rows, width, from_column(added, low), cut[2])
        for row in range(r, r + rows):
            first, end = seen(row, sizes[1], keys, band, low)
            begin = (row - base) * width
            at, size = begin + first - low, end - first
            v, w = u[:size], g[:size]
            found, inverse = exponentials_of(v, load_scaled(x, at, size, of_row, v))
            if found != found or kept[0] == 0:
                rescale(v, inverse)
                inverse = ONE
            if found != found:
                clear_excluded(x, at, size, of_row, spare, v)
            lane = bits_of_row(bits, words, seed, decisions, row, sizes, first, end)
            b = bits[lane : lane + size]
            if kept[0] != 0:
                store_kept(kept, at, size, v, inverse, b, last, factor)
            if dout[0] != 0:
                load_kept(dout, at, size, w, b, last, factor)
            else:
                fill(w, size, ZERO)
            if dsoftmax[0] != 0:
                c = spare[:size]
                load(dsoftmax, at, size, c)
                add(w, size, c)
            along = inner(v, w)
            # A key with the probability 0 adds nothing to the sum and has the gradient 0, even
            # where the incoming gradient is not finite.
            finite = np.isfinite(along)
            if not finite:
                along = inner_of_some(v, w)
            if dlse != 0:
                along -= vector(dlse, stop, np.float32)[row]
                finite = finite and np.isfinite(along)
            if finite:
                store_projected(dx, at, size, v, w, along, of_row)
            else:
                store_projected_some(dx, at, size, v, w, along, of_row)
            if size < width:
                clear_outside(dx, begin, width, first - low, end - low)
                if kept[0] != 0:
                    clear_outside(kept, begin, width, first - low, end - low)
        beta = 0.0 if r == start and cut[3] == 0 else 1.0
        if whole and dquery[0] != 0:
            into = rows_of(dquery, sample, head, number, rows)
            right = rows_of(key, sample, shared, low, width)
            product(call, into, other, right, 0.0, scale)
        if whole and dkey[0] != 0:
            into = rows_of(dkey, sample, shared, low, width)
            product(call, into, turned(other), queries, beta, scale)
        if whole and dvalue[0] != 0:
            into = rows_of(dvalue, sample, shared, low, width)
            product(call, into, turned(block), outs, beta, 1.0)
        r += rows
    release(scaled_queries)
    release(scores)
    release(memory)
