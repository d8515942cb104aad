"""The mask contract as loops for CPUs, compiled by numba: what masks.py calls.

A Philox round is two products of 32-bit words. Written as products of zero-extended 64-bit words
they become one vector instruction for four or eight calls. So a kernel makes the words of a piece
first, one array a word, then spreads them over the columns, then decides. A piece is a strip of a
row, or several whole rows where rows are short: its calls are one long loop either way. It stays in
the first-level cache, and no mask is in memory unless the mask is the result.

Kernels are serial and hold no lock: the caller shares rows among threads.
"""

from __future__ import annotations

import os

import numpy as np
from numba import carray, njit, types, uint32, uint64
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

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
from .cache import LoopCache

M0, M1 = np.uint64(PHILOX_M0), np.uint64(PHILOX_M1)
W0, W1 = np.uint32(PHILOX_W0), np.uint32(PHILOX_W1)
HALF, WORD = np.uint32(16), np.uint64(32)
MULTIPLIER, ALL = np.uint64(STREAM_MULTIPLIER), np.uint32(0xFFFFFFFF)
STRIP = 128  # calls a piece: 1024 columns, 6 KiB of words and bits

LINE = 16  # words of a cache line

CACHE = os.environ.get("TRIDROP_CPU_CACHE") != "0"


_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # what only kernels call


def kernel(function):
    """What Python calls: compiled at its first call, from the cache on disk where there is one."""
    made = njit(nogil=True, error_model="numpy")(function)
    if CACHE and isinstance(made, Dispatcher):  # NUMBA_DISABLE_JIT leaves functions as they are
        made._cache = LoopCache(function)  # as enable_caching() does with numba's own
    return made


def part(fastmath):
    """What kernels call: loops of their own, compiled with the first kernel that needs them.

    For what would make kernels several times as long: a call that hands arrays over takes as long
    as some sixty elements. The only liberties taken with floating-point numbers are those named:
    "contract", a product and a sum in one instruction; "reassoc", a sum in any order.
    """
    return njit(error_model="numpy", fastmath=fastmath, **_INNER)


def inline(fastmath):
    """What becomes part of whatever calls it; liberties as in :func:`part`."""
    return njit(error_model="numpy", fastmath=fastmath, forceinline=True, **_INNER)


@intrinsic
def _pointer(context, address):
    """An address as a pointer."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), build


@inline(set())
def vector(address, size, dtype):
    """The numbers at an address as an array. Whoever calls a kernel keeps their memory alive."""
    return carray(_pointer(address), (size,), dtype)


@inline(set())
def scratch(size):
    """Memory for ``size`` words, to be cut into arrays. Kernels end with :func:`held` of it."""
    return np.empty(size + LINE, np.uint32)


@inline(set())
def cut(memory, start, shape, dtype):
    """An array in it, ``start`` words after the first cache line that begins there.

    The array has no owner: one that has is counted, atomically, wherever it stands in a tuple.
    """
    begin = (memory.ctypes.data + 4 * LINE - 1) // (4 * LINE) * LINE
    return carray(_pointer(4 * (begin + start)), shape, dtype)


@njit
def held(memory):
    """The memory is in use until here."""


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(PHILOX_ROUNDS):
        a = uint64(c0) * M0
        b = uint64(c2) * M1
        c0, c1 = uint32(b >> WORD) ^ c1 ^ k0, uint32(b)
        c2, c3 = uint32(a >> WORD) ^ c3 ^ k1, uint32(a)
        k0 = uint32(k0 + W0)
        k1 = uint32(k1 + W1)
    return c0, c1, c2, c3


@njit(inline="always")
def rotate(word):
    return uint32(word << HALF) | uint32(word >> HALF)


@part(set())
def row_words(words, k0, k1, high, row, group, count):
    """The calls of ``count`` groups of a row."""
    low, upper = uint32(row), uint32(row >> WORD)
    for g in range(count):
        at = group + uint64(g)
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), low, upper, uint32(at >> WORD) | high, k0, k1
        )


@part(set())
def rows_words(words, k0, k1, high, row, step, group, groups, count):
    """The calls of the first ``groups`` groups of rows whose coordinates go up by ``step``."""
    reciprocal = uint32(uint32(1 << 16) // uint32(groups) + 1)  # g < 128: the quotient is exact
    for g in range(count):
        k = uint32(uint32(g) * reciprocal) >> HALF
        at = group + uint64(uint32(g) - k * uint32(groups))
        place = row + uint64(k) * step
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), uint32(place), uint32(place >> WORD), uint32(at >> WORD) | high, k0, k1
        )


@part(set())
def spread(bits, words, count):
    """The 32 bits of the eight columns of each of ``count`` groups."""
    for g in range(count):
        for i in range(4):
            bits[LANES * g + 2 * i] = words[i, g]
            bits[LANES * g + 2 * i + 1] = rotate(words[i, g])


@part(set())
def even_rows(rows, row, most):
    """How many rows from ``row`` on, at most ``most``, have coordinates that go up evenly.

    Returns the first coordinate, the step and the number.
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
    """The words of the key of the seed at an address."""
    pair = vector(seed, 2, np.uint64)
    key = pair[0] + pair[1] * MULTIPLIER
    return uint32(key), uint32(key >> WORD)


@inline(set())
def alike(factors, row, most):
    """How many rows from ``row`` on, at most ``most``, have one factor."""
    if factors == 0 or most < 2:
        return most
    values, count = vector(factors, row + most, np.float32), 1
    while count < most and values[row + count] == values[row]:
        count += 1
    return count


@part(set())
def next_piece(bits, words, mask, row, done, stop, columns):
    """Make the bits from column ``done`` of a row on, in ``bits``: (rows, lane, size).

    A piece is ``size`` columns of a row, or ``rows`` whole rows, none of them ``stop`` or beyond:
    as much as a strip holds of rows with one factor. Its bits begin at ``lane``, row after row
    without a gap.

    ``row`` is a local one. ``mask`` is what decides: the address of the row coordinates, 0 where
    they are the local ones; the lane and the group of column 0; the address of the seed; the
    domain; ``last``: an element is dropped iff its bits are at most that, and none is where it is
    negative; and the address of the factors of rows, 0 where there are none: see :func:`rule`.
    """
    places, skip, first, seed, high, last, factors = mask
    if last < 0:
        if done > 0 or 2 * columns > STRIP * LANES:
            return 1, 0, min(columns - done, STRIP * LANES)
        return alike(factors, row, min(stop - row, STRIP * LANES // columns)), 0, columns
    k0, k1 = key_words(seed)
    high = uint32(high)
    position = skip + done
    group, lane = position // LANES, position % LANES
    start = uint64(first) + uint64(group)
    groups = (columns - done + lane + LANES - 1) // LANES
    if 0 < 2 * groups <= STRIP and done == 0 and skip == 0 and columns % LANES == 0:
        most = alike(factors, row, min(stop - row, STRIP // groups))
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
def rule(mask, scale, row):
    """(last, scale) of a row: kept is what has bits above ``last``, and multiplied by ``scale``.

    Where rows have factors, such as those of drop_path, these take the place of ``scale``. One of 0
    drops the row.
    """
    last, factors = mask[5], mask[6]
    last = uint32(last) if last >= 0 else uint32(0)
    factor = np.float32(scale) if factors == 0 else vector(factors, row + 1, np.float32)[row]
    return (ALL if factor == 0 else last), factor


@inline(set())
def randoms(memory, size, last):
    """The arrays (bits, words) at the begin of scratch memory, for ``size`` bits."""
    bits = cut(memory, 4 * STRIP, size, np.uint32)
    if last < 0:
        for j in range(size):
            bits[j] = ALL
    return bits, cut(memory, 0, (4, STRIP), np.uint32)


@inline(set())
def following(row, rows, done, columns):
    """Where the next piece begins: row and column."""
    return (row, done) if done < columns else (row + rows, 0)


@kernel
def keep_rows(start, stop, columns, mask, out):
    """Decisions of the rows from ``start`` to ``stop``: bool, at the address ``out``.

    ``mask`` is as in :func:`next_piece`.
    """
    memory = scratch(12 * STRIP)
    bits, words = randoms(memory, STRIP * LANES, mask[5])
    last = rule(mask, 1.0, start)[0]
    r, done = start, 0
    while r < stop:
        rows, lane, size = next_piece(bits, words, mask, r, done, stop, columns)
        total = rows * size
        b, o = bits[lane : lane + total], vector(out + r * columns + done, total, np.bool_)
        for j in range(total):
            o[j] = b[j] > last
        r, done = following(r, rows, done + size, columns)
    held(memory)


@part(set())
def score_tiles(bits, words, key, domain, place, first, count):
    """The bits of ``count`` keys from the coordinate ``first`` on, or of fewer: (lane, size).

    ``place`` is (batch, head, query). Keys begin anywhere in a tile, of which the lane says where.
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
            for pair in range(4):
                word, at = words[octet, 4 * t + pair], TILE * t + LANES * octet + 2 * pair
                bits[at], bits[at + 1] = word, rotate(word)
    return lane, min(count, TILE * tiles - lane)


@part(set())
def score_bits(bits, words, key, domain, place, first, count):
    """The bits of all the keys: they begin at the lane that is returned."""
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
def keep_scores(start, stop, keys, sizes, seed, domain, last, origin, out):
    """Decisions of attention in the rows from start to stop: bool, at the address ``out``.

    ``origin`` is where index (0, 0, 0, 0) lies.
    """
    memory = scratch(12 * STRIP)
    bits, words = randoms(memory, STRIP * LANES, last)
    key = key_words(seed)
    for r in range(start, stop):
        place, done = place_of_row(r, sizes, origin), 0
        while done < keys:
            lane, size = score_tiles(bits, words, key, domain, place, origin[3] + done, keys - done)
            b, o = bits[lane : lane + size], vector(out + r * keys + done, size, np.bool_)
            for j in range(size):
                o[j] = b[j] > uint32(last)
            done += size
    held(memory)
