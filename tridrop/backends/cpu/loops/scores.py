"""The steps of the softmax: loops over a row of scores, an fp32 array that stays in the cache."""

from __future__ import annotations

import numpy as np
from numba import int32

from .activations import exp
from .decorators import NOTHING, apart, inline, part
from .memory import vector
from .steps import ANY_ORDER, fill
from .storage import for_each_dtype, store

ZERO, ONE = np.float32(0), np.float32(1)
NO_KEY, _MAGNITUDE, _SIGN = np.float32(-np.inf), np.int32(0x7FFFFFFF), np.int32(31)
_LEAST = np.int32(-0x7F800001)  # minus infinity, as ordered() gives it


@inline(set())
def ordered(word):
    """The bits of a number as an integer, in the order of the numbers; and its own inverse."""
    return int32(word ^ int32(int32(word >> _SIGN) & _MAGNITUDE))


@for_each_dtype(set())
def load_scaled(read, write):
    """into = scale * elements, in fp32; returns the largest number.

    It is found among integers, since a loop over floats that may be NaN would not become vector
    instructions.
    """

    def loop(elements, scale, into):
        found = _LEAST
        for j in range(elements.size):
            into[j] = read(elements[j]) * scale
            word = ordered(np.float32(into[j]).view(np.int32))
            found = word if word > found else found
        return np.int32(ordered(found)).view(np.float32)

    return loop


@part(set())
def has_nan(u):
    found = False
    for j in range(u.size):
        found = found or u[j] != u[j]
    return found


@inline(ANY_ORDER)
def plus(first, second):
    return first + second


@part({"contract"})
def exponentials(u, shift):
    """u = exp(u - shift), where no u is larger than shift; returns their sum, in any order."""
    found = ZERO
    for j in range(u.size):
        u[j] = exp(u[j] - shift, ZERO)
        found = plus(found, u[j])
    return found


@inline(set())
def rescale(u, factor):
    for j in range(u.size):
        u[j] *= factor


@part(ANY_ORDER)
def inner(u, v):
    """The sum of u * v."""
    found = ZERO
    for j in range(u.size):
        found += u[j] * v[j]
    return found


@for_each_dtype(set())
def store_kept(read, write):
    """u = u * inverse; elements = u * factor where kept, exactly 0 elsewhere."""

    def loop(elements, u, inverse, bits, last, factor):
        for j in range(elements.size):
            u[j] *= inverse
            elements[j] = write((u[j] if bits[j] > last else ZERO) * factor)

    return loop


@for_each_dtype(set())
def load_kept(read, write):
    """into = elements * factor where kept, exactly 0 elsewhere."""

    def loop(elements, into, bits, last, factor):
        for j in range(elements.size):
            into[j] = (read(elements[j]) if bits[j] > last else ZERO) * factor

    return loop


@for_each_dtype({"contract"})
def store_projected(read, write):
    """elements = u * (v - along) * scale."""

    def loop(elements, u, v, along, scale):
        for j in range(elements.size):
            elements[j] = write(u[j] * (v[j] - along) * scale)

    return loop


@apart({"contract"})
def store_projected_some(dx, at, size, u, v, along, scale):
    """:func:`store_projected`, but 0 where u is 0, whatever v and ``along`` are."""
    for j in range(size):
        v[j] = u[j] * (v[j] - along) * scale if u[j] != ZERO else ZERO
    store(dx, at, size, v)


@for_each_dtype(set())
def store_zeros(read, write):
    def loop(elements):
        for j in range(elements.size):
            elements[j] = write(ZERO)

    return loop


@part(set())
def clear_outside(matrix, start, keys, first, end):
    """Set a row, which begins at ``start``, to 0 before the key ``first`` and from ``end`` on."""
    store_zeros(matrix, start, first)
    store_zeros(matrix, start + end, keys - end)


@inline(set())
def exponentials_of(u, shift):
    """u = exp(u - shift), where ``shift`` is the largest; returns (log-sum-exp, 1 / sum).

    If all of u is -inf, it becomes 0.
    """
    if shift == NO_KEY and not has_nan(u):
        fill(u, u.size, ZERO)
        return NO_KEY, ONE
    whole = exponentials(u, shift)
    return shift + np.log(whole), ONE / whole


@part(set())
def clear(u, v, number):
    """v = 0 where u equals ``number``."""
    for j in range(u.size):
        if u[j] == number:
            v[j] = ZERO


@part(set())
def inner_of_some(u, v):
    """The sum of u * v over the places where u is not 0."""
    found = ZERO
    for j in range(u.size):
        if u[j] != ZERO:
            found += u[j] * v[j]
    return found


@apart(set())
def scaled(matrix, scale, into):
    """The matrix (address, rows, columns, strides) times ``scale``, in memory of its own."""
    address, rows, columns, row, column = matrix
    factor = np.float32(scale)
    for k in range(rows):
        u = vector(into + 4 * k * columns, columns, np.float32)
        begin = address + 4 * k * row
        if column == 1:
            v = vector(begin, columns, np.float32)
            for j in range(columns):
                u[j] = v[j] * factor
        else:
            for j in range(columns):
                u[j] = vector(begin + 4 * j * column, 1, np.float32)[0] * factor
    return into, rows, columns, columns, NOTHING + 1


@apart(set())
def add_mask(scores, rows, width, mask, replaces):
    """scores = scores + mask; if it ``replaces``, -inf where the mask is that.

    The two differ for a score that is NaN. ``mask`` is (address, ..., stride of a row, 1).
    """
    for k in range(rows):
        u = vector(scores + 4 * k * width, width, np.float32)
        v = vector(mask[0] + 4 * k * mask[3], width, np.float32)
        for j in range(width):
            u[j] = v[j] if replaces and v[j] == NO_KEY else u[j] + v[j]
