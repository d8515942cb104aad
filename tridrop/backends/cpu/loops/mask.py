"""The mask contract as loops for CPUs, compiled by numba; the other loops and masks.py use it.

A Philox round has two products of 32-bit words. Written as products of zero-extended 64-bit words,
the products of four or eight calls become one vector instruction. So a kernel first makes the words
of a piece, one array per word, then spreads them over the columns, then decides. A piece is a strip
of a row, or several whole rows where rows are short, so that its calls form one long loop. It stays
in the first-level cache, and no mask is written to memory unless the mask is the result.

Kernels are serial and hold no lock; their callers divide the rows among threads.
"""

from __future__ import annotations

import numpy as np
from numba import uint32, uint64

from ....contract.mask import (
    LANES,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    STREAM_MULTIPLIER,
    TILE,
)
from .decorators import NOTHING, inline, part, written_out
from .kernels import kernel
from .memory import release, scratch, store_columns, store_groups, vector

M0, M1 = np.uint64(PHILOX_M0), np.uint64(PHILOX_M1)
W0, W1 = np.uint32(PHILOX_W0), np.uint32(PHILOX_W1)
HALF, WORD = np.uint32(16), np.uint64(32)
MULTIPLIER, ALL = np.uint64(STREAM_MULTIPLIER), np.uint32(0xFFFFFFFF)
STRIP = 128  # calls per piece: 1024 columns, 6 KiB of words and bits


@written_out
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(PHILOX_ROUNDS):
        a = uint64(c0) * M0
        b = uint64(c2) * M1
        c0, c1 = uint32(b >> WORD) ^ c1 ^ k0, uint32(b)
        c2, c3 = uint32(a >> WORD) ^ c3 ^ k1, uint32(a)
        k0 = uint32(k0 + W0)
        k1 = uint32(k1 + W1)
    return c0, c1, c2, c3


@part(set())
def row_words(words, k0, k1, high, row, group, count):
    """The words of the calls for ``count`` column groups of a row."""
    low, upper = uint32(row), uint32(row >> WORD)
    for g in range(count):
        at = group + uint64(g)
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), low, upper, uint32(at >> WORD) | high, k0, k1
        )


@part(set())
def rows_words(words, k0, k1, high, row, step, group, groups, count):
    """The words of the calls for the first ``groups`` groups of rows at a distance of ``step``."""
    reciprocal = uint32(uint32(1 << 16) // uint32(groups) + 1)  # exact quotients for g < 128
    for g in range(count):
        k = uint32(uint32(g) * reciprocal) >> HALF
        at = group + uint64(uint32(g) - k * uint32(groups))
        place = row + uint64(k) * step
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), uint32(place), uint32(place >> WORD), uint32(at >> WORD) | high, k0, k1
        )


@part(set())
def spread(bits, words, count):
    """The 32 bits of each of the eight columns of ``count`` groups, and of up to three more."""
    for g in range(0, count, 4):
        store_groups(words, g, STRIP, bits, LANES * g)


@part(set())
def even_rows(rows, row, most):
    """How many rows, from ``row`` on and at most ``most``, have evenly spaced coordinates.

    Returns (first coordinate, step, number of rows).
    """
    if rows == 0:
        return uint64(row), uint64(1), most
    places = vector(rows, row + most, np.int64)
    if most < 2:
        return uint64(places[row]), uint64(0), most
    step, count = places[row + 1] - places[row], 2
    while count < most and places[row + count] - places[row + count - 1] == step:
        count += 1
    return uint64(places[row]), uint64(step), count


@part(set())
def key_words(seed):
    """The two words of the key for the seed at an address."""
    pair = vector(seed, 2, np.uint64)
    key = pair[0] + pair[1] * MULTIPLIER
    return uint32(key), uint32(key >> WORD)


@inline(set())
def equal_factors(factors, row, most):
    """How many rows, from ``row`` on and at most ``most``, have the same factor."""
    if factors == 0 or most < 2:
        return most
    values, count = vector(factors, row + most, np.float32), 1
    while count < most and values[row + count] == values[row]:
        count += 1
    return count


@part(set())
def next_piece(bits, words, seed, decisions, row, done, stop, columns):
    """Fill ``bits`` for the next piece, from column ``done`` of a row on: (rows, lane, size).

    A piece is ``size`` columns of one row, or ``rows`` whole rows before ``stop``: as many as fit a
    strip and have the same factor. Its bits begin at ``lane``, row after row without a gap.

    ``row`` is a local index, ``seed`` the matrix of the seed. ``decisions`` says how elements are
    decided: the address of the row coordinates, or 0 where these are the local indices; the lane
    and the group of column 0; the domain; ``last``, since an element is dropped iff its bits are at
    most ``last``, and none is dropped where it is negative; and the address of the factors of rows,
    or 0 where there are none, see :func:`last_and_factor`.
    """
    places, skip, first, high, last, factors = decisions
    if last < 0:
        if done > 0 or 2 * columns > STRIP * LANES:
            return 1, 0, min(columns - done, STRIP * LANES)
        return equal_factors(factors, row, min(stop - row, STRIP * LANES // columns)), 0, columns
    k0, k1 = key_words(seed[0])
    high = uint32(high)
    position = skip + done
    group, lane = position // LANES, position % LANES
    start = uint64(first) + uint64(group)
    groups = (columns - done + lane + LANES - 1) // LANES
    if 0 < 2 * groups <= STRIP and done == 0 and skip == 0 and columns % LANES == 0:
        most = equal_factors(factors, row, min(stop - row, STRIP // groups))
        at, step, rows = even_rows(places, row, most)
        rows_words(words, k0, k1, high, at, step, start, groups, rows * groups)
        spread(bits, words, rows * groups)
        return rows, lane, columns
    at = row if places == 0 else vector(places, row + 1, np.int64)[row]
    count = min(STRIP, groups)
    row_words(words, k0, k1, high, uint64(at), start, count)
    spread(bits, words, count)
    return 1, lane, min(columns - done, LANES * count - lane)


@inline(set())
def last_and_factor(decisions, scale, row):
    """(last, factor) of a row: elements with bits above ``last`` are multiplied by ``factor``.

    The factor is ``scale`` unless rows have factors of their own, as with drop_path. A factor of 0
    drops the row.
    """
    last, factors = decisions[4], decisions[5]
    last = uint32(last) if last >= 0 else uint32(0)
    factor = np.float32(scale) if factors == 0 else vector(factors, row + 1, np.float32)[row]
    return (ALL if factor == 0 else last), factor


@inline(set())
def randoms(memory, size, last):
    """The arrays (bits, words) at the beginning of scratch memory, with room for ``size`` bits."""
    bits = vector(memory + 16 * STRIP, size, np.uint32)
    if last < 0:
        for j in range(size):
            bits[j] = ALL
    return bits, vector(memory, (4, STRIP), np.uint32)


@written_out
def following(row, rows, done, columns):
    """The row and the column where the next piece begins."""
    return (row, done) if done < columns else (row + rows, 0)


@kernel
def keep_rows(start, stop, given, columns, decisions, out):
    """The decisions on the rows from ``start`` to ``stop``: bool, at the address ``out``.

    ``given`` is the seed; ``decisions`` are as in :func:`next_piece`.
    """
    memory = scratch(12 * STRIP)
    bits, words = randoms(memory, STRIP * LANES, decisions[4])
    last = last_and_factor(decisions, 1.0, start)[0]
    r, done = start, NOTHING
    while r < stop:
        rows, lane, size = next_piece(bits, words, given[0], decisions, r, done, stop, columns)
        total = rows * size
        b, o = bits[lane : lane + total], vector(out + r * columns + done, total, np.bool_)
        for j in range(total):
            o[j] = b[j] > last
        r, done = following(r, rows, done + size, columns)
    release(memory)


@part(set())
def score_tiles(bits, words, key, domain, place, first, count):
    """The bits of at most ``count`` keys from the coordinate ``first`` on: (lane, size).

    ``place`` is (batch, head, query). The first key may lie anywhere in a tile, at the lane.
    """
    k0, k1 = key
    batch, head, query = uint32(place[0]), uint32(place[1]) | uint32(domain), uint32(place[2])
    lane = np.int64(uint64(first) % uint64(TILE))
    group = uint32(uint64(first) // uint64(TILE) * uint64(4))
    tiles = min(STRIP // 4, (count + lane + TILE - 1) // TILE)
    for g in range(4 * tiles):
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            query, uint32(group + uint32(g)), batch, head, k0, k1
        )
    for t in range(tiles):
        for octet in range(4):
            store_columns(words, STRIP * octet + 4 * t, bits, TILE * t + LANES * octet)
    return lane, min(count, TILE * tiles - lane)


@part(set())
def score_bits(bits, words, key, domain, place, first, count):
    """The bits of all ``count`` keys; returns the lane where they begin."""
    lane, done = score_tiles(bits, words, key, domain, place, first, count)
    while done < count:
        done += score_tiles(
            bits[lane + done :], words, key, domain, place, first + done, count - done
        )[1]
    return lane


@inline(set())
def place_of_row(row, sizes, origin):
    """(batch, head, query) of a row of scores, whose ``sizes`` are the heads and the queries."""
    heads, queries = sizes
    return (
        origin[0] + row // queries // heads,
        origin[1] + row // queries % heads,
        origin[2] + row % queries,
    )


@kernel
def keep_scores(start, stop, given, keys, sizes, domain, last, origin, out):
    """The decisions of attention for the rows from start to stop: bool, at the address ``out``.

    ``given`` is the seed; ``origin`` is the coordinate of the index (0, 0, 0, 0).
    """
    memory = scratch(12 * STRIP)
    bits, words = randoms(memory, STRIP * LANES, last)
    key = key_words(given[0][0])
    for r in range(start, stop):
        place, done = place_of_row(r, sizes, origin), 0
        while done < keys:
            lane, size = score_tiles(bits, words, key, domain, place, origin[3] + done, keys - done)
            b, o = bits[lane : lane + size], vector(out + r * keys + done, size, np.bool_)
            for j in range(size):
                o[j] = b[j] > uint32(last)
            done += size
    release(memory)
