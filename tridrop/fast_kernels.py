"""The mask contract as loops for CPUs, compiled by numba: what :mod:`tridrop.fast` calls.

A Philox round is two products of 32-bit words. Written as products of zero-extended 64-bit words
they become one vector instruction for four or eight calls. So a kernel makes the words of a strip
of a row first, one array a word, then spreads them over the columns, then decides; the strip stays
in the first-level cache, and no mask is in memory unless the mask is the result.

Kernels are serial and hold no lock: the caller shares rows among threads.
"""

from __future__ import annotations

import os

import numpy as np
from numba import carray, njit, types, uint32, uint64
from numba.extending import intrinsic

from .mask import LANES, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1, TILE

M0, M1 = np.uint64(PHILOX_M0), np.uint64(PHILOX_M1)
W0, W1 = np.uint32(PHILOX_W0), np.uint32(PHILOX_W1)
HALF, WORD = np.uint32(16), np.uint64(32)
STRIP = 128  # calls a strip: 1024 columns, 6 KiB of words and bits

CACHE = os.environ.get("TRIDROP_CPU_CACHE") != "0"


def kernel(function):
    """What Python calls: compiled at its first call, from the cache on disk where there is one."""
    if CACHE:
        try:
            return njit(nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no place that can be written to
            pass
    return njit(nogil=True, error_model="numpy")(function)


def part(fastmath):
    """What kernels call: a loop of its own, compiled with the first kernel that needs it.

    The only liberties taken with floating-point numbers are those named: "contract", a product and
    a sum in one instruction; "reassoc", a sum in any order.
    """
    return njit(error_model="numpy", fastmath=fastmath, no_cpython_wrapper=True)


def inline(fastmath):
    """What is compiled into the loops that call it."""
    return njit(error_model="numpy", fastmath=fastmath, forceinline=True, no_cpython_wrapper=True)


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
def strip_bits(bits, words, k0, k1, high, row, group, count):
    """The 32 bits of the eight columns of each of ``count`` groups."""
    low, upper = uint32(row), uint32(row >> WORD)
    for g in range(count):
        at = group + uint64(g)
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), low, upper, uint32(at >> WORD) | high, k0, k1
        )
    for g in range(count):
        for i in range(4):
            bits[LANES * g + 2 * i] = words[i, g]
            bits[LANES * g + 2 * i + 1] = rotate(words[i, g])


@part(set())
def next_strip(bits, words, mask, row, done, columns):
    """Make the bits of the columns of a row from ``done`` on, in ``bits``: (from where, how many).

    ``row`` is a local one. ``mask`` is what decides: the address of the row coordinates, 0 where
    they are the local ones; the lane and the group of column 0; the words of the key; the domain;
    and ``last``: an element is dropped iff its bits are at most that.
    """
    rows, skip, first, k0, k1, high, _ = mask
    place = skip + done
    group, lane = place // LANES, place % LANES
    count = min(STRIP, (columns - done + lane + LANES - 1) // LANES)
    at = row if rows == 0 else vector(rows, row + 1, np.int64)[row]
    start = uint64(first) + uint64(group)
    strip_bits(bits, words, uint32(k0), uint32(k1), uint32(high), uint64(at), start, count)
    return lane, min(columns - done, LANES * count - lane)


@kernel
def keep_rows(start, stop, columns, mask, out):
    """Decisions of the rows from ``start`` to ``stop``: bool, at the address ``out``.

    ``mask`` is as in :func:`next_strip`.
    """
    bits, words = np.empty(STRIP * LANES, np.uint32), np.empty((4, STRIP), np.uint32)
    last = uint32(mask[6])
    for r in range(start, stop):
        done = 0
        while done < columns:
            lane, size = next_strip(bits, words, mask, r, done, columns)
            o = vector(out + r * columns + done, size, np.bool_)
            for j in range(size):
                o[j] = bits[lane + j] > last
            done += size


@kernel
def keep_scores(out, first, heads, queries, origin, k0, k1, domain, last):
    """Decisions of attention: bool, [rows, keys]; row 0 is number ``first`` of all queries.

    ``origin`` is where index (0, 0, 0, 0) lies; keys begin anywhere in a tile.
    """
    bits = np.empty((STRIP // 4, 4, 4, 2), np.uint32)  # tile, octet, pair, half
    words = np.empty((4, STRIP), np.uint32)
    flat = bits.reshape(-1)
    keys = out.shape[1]
    for r in range(out.shape[0]):
        row = first + uint64(r)
        query = uint32(row % queries + origin[2])
        head = uint32(row // queries % heads + origin[1]) | domain
        batch = uint32(row // queries // heads + origin[0])
        done, skip = 0, np.int64(origin[3] % uint64(TILE))
        group = uint32(origin[3] // uint64(TILE) * uint64(4))
        while done < keys:
            tiles = min(STRIP // 4, (keys - done + skip + TILE - 1) // TILE)
            for g in range(4 * tiles):
                words[0, g], words[1, g], words[2, g], words[3, g] = philox(
                    query, uint32(group + uint32(g)), batch, head, k0, k1
                )
            for t in range(tiles):
                for octet in range(4):
                    for pair in range(4):
                        word = words[octet, 4 * t + pair]
                        bits[t, octet, pair, 0] = word
                        bits[t, octet, pair, 1] = rotate(word)
            size = min(keys - done, TILE * tiles - skip)
            b, o = flat[skip : skip + size], out[r, done : done + size]
            for j in range(size):
                o[j] = b[j] > last
            done, skip, group = done + size, 0, uint32(group + uint32(4 * tiles))
