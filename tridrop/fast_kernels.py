"""The mask contract as loops for CPUs, compiled by numba: what :mod:`tridrop.fast` calls.

A Philox round is two products of 32-bit words. Written as products of zero-extended 64-bit words
they become one vector instruction for four or eight calls. So a kernel makes the words of a strip
of a row first, one array a word, then spreads them over the columns, then decides; the strip stays
in the first-level cache, and no mask is in memory unless the mask is the result.

Kernels are serial and hold no lock: the caller shares rows among threads. bf16 is handled as its
bits, which numba has no type for.
"""

from __future__ import annotations

import os

import numpy as np
from numba import float32, njit, uint16, uint32, uint64
from numba.extending import overload

from .mask import LANES, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1, TILE

M0, M1 = np.uint64(PHILOX_M0), np.uint64(PHILOX_M1)
W0, W1 = np.uint32(PHILOX_W0), np.uint32(PHILOX_W1)
HALF, WORD = np.uint32(16), np.uint64(32)
STRIP = 128  # calls a strip: 1024 columns, 6 KiB of words and bits

CACHE = os.environ.get("TRIDROP_CPU_CACHE") != "0"


def kernel(function):
    """The function compiled at its first call, from the cache on disk where there is one."""
    if CACHE:
        try:
            return njit(nogil=True, cache=True)(function)
        except RuntimeError:  # no place that can be written to
            pass
    return njit(nogil=True)(function)


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


@kernel
def strip_bits(bits, words, k0, k1, high, row, group, count):
    """The 32 bits of the eight columns of each of ``count`` groups: [STRIP, 8]."""
    low, upper = uint32(row), uint32(row >> WORD)
    for g in range(count):
        at = group + uint64(g)
        words[0, g], words[1, g], words[2, g], words[3, g] = philox(
            uint32(at), low, upper, uint32(at >> WORD) | high, k0, k1
        )
    for g in range(count):
        for i in range(4):
            bits[g, 2 * i] = words[i, g]
            bits[g, 2 * i + 1] = rotate(words[i, g])


@kernel
def keep_rows(out, rows, skip, k0, k1, high, group, last):
    """Decisions of columns from lane ``skip`` of ``group`` on: bool, [rows, columns].

    ``rows`` holds the row coordinates; an element is dropped iff its bits are at most ``last``.
    """
    bits = np.empty((STRIP, LANES), np.uint32)
    words = np.empty((4, STRIP), np.uint32)
    flat = bits.reshape(-1)
    columns = out.shape[1]
    for r in range(out.shape[0]):
        done, lane, at = 0, skip, group
        while done < columns:
            count = min(STRIP, (columns - done + lane + LANES - 1) // LANES)
            strip_bits(bits, words, k0, k1, high, uint64(rows[r]), at, count)
            size = min(columns - done, LANES * count - lane)
            b, o = flat[lane : lane + size], out[r, done : done + size]
            for j in range(size):
                o[j] = b[j] > last
            done, lane, at = done + size, 0, at + uint64(count)


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


def widen(value):
    """A stored value as fp32."""


def narrow(value, like):
    """fp32 as what ``like`` is stored as: bf16 to the nearest, ties to even."""


@overload(widen, inline="always")
def _widen(value):
    if value == float32:
        return lambda value: value
    return lambda value: np.uint32(uint32(value) << HALF).view(np.float32)


@overload(narrow, inline="always")
def _narrow(value, like):
    if like == float32:
        return lambda value, like: value
    return lambda value, like: nearest(value)


@njit
def nearest(value):
    word = np.float32(value).view(np.uint32)
    odd = (word >> HALF) & np.uint32(1)
    rounded = uint16(uint32(word + np.uint32(0x7FFF) + odd) >> HALF)
    return rounded if value == value else np.uint16(0x7FC0)


@kernel
def select(out, value, residual, scale, rows, skip, k0, k1, high, group, last):
    """residual + where(keep, value, 0) * scale, of matrices: fp32, or bf16 as uint16.

    ``residual`` may be None; ``out`` may be ``value``. The other arguments are keep_rows'.
    """
    bits = np.empty((STRIP, LANES), np.uint32)
    words = np.empty((4, STRIP), np.uint32)
    flat = bits.reshape(-1)
    columns = out.shape[1]
    zero = np.float32(0)
    for r in range(out.shape[0]):
        done, lane, at = 0, skip, group
        while done < columns:
            count = min(STRIP, (columns - done + lane + LANES - 1) // LANES)
            strip_bits(bits, words, k0, k1, high, uint64(rows[r]), at, count)
            size = min(columns - done, LANES * count - lane)
            b, o = flat[lane : lane + size], out[r, done : done + size]
            v = value[r, done : done + size]
            if residual is None:
                for j in range(size):
                    kept = widen(v[j]) if b[j] > last else zero
                    o[j] = narrow(kept * scale, o[j])
            else:
                s = residual[r, done : done + size]
                for j in range(size):
                    kept = widen(v[j]) if b[j] > last else zero
                    o[j] = narrow(widen(s[j]) + kept * scale, o[j])
            done, lane, at = done + size, 0, at + uint64(count)
