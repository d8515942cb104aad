"""The steps of the kernels: small loops over a piece of the rows.

A piece is a strip of a row, or several whole rows one after the other, in an fp32 array that stays
in the first-level cache. So a separate loop per step costs little, and each loop is simple enough
to become vector instructions. The steps are inlined into the kernels, because handing arrays over
to a function takes as long as some sixty elements.
"""

from __future__ import annotations

import numpy as np

from .decorators import inline, written_out
from .memory import part_of, vector

_ZERO = np.float32(0)
ANY_ORDER = {"reassoc", "contract", "nsz"}  # sums in any order, in as many parts as a vector has


@inline(set())
def select(u, size, bits, last, scale):
    """u = u * scale where kept, exactly 0 elsewhere, even where u is not finite."""
    for j in range(size):
        u[j] = (u[j] if bits[j] > last else _ZERO) * scale


@inline(set())
def copy(u, size, into):
    """into = u."""
    for j in range(size):
        into[j] = u[j]


@inline(set())
def fill(u, size, value):
    """u = value."""
    for j in range(size):
        u[j] = value


@inline(set())
def add(u, size, v):
    """u = v + u."""
    for j in range(size):
        u[j] = v[j] + u[j]


@inline(set())
def multiply(u, size, v):
    """u = u * v."""
    for j in range(size):
        u[j] = u[j] * v[j]


@inline(ANY_ORDER)
def total(u):
    """The sum of u, in any order."""
    found = _ZERO
    for j in range(u.size):
        found += u[j]
    return found


@written_out
def row_of(u, k, size):
    """Row number k of a piece."""
    return part_of(u, k * size, size)


@written_out
def behind(address, words):
    """The address ``words`` fp32 numbers behind another one; the address 0 means absent, and stays.

    It is where one part of the rows has its sums.
    """
    return address + 4 * words if address != 0 else address


@inline(set())
def add_vector(u, rows, size, address, start):
    """Add the fp32 vector at ``address``, from ``start`` on, to rows of u, if it is not 0."""
    if address != 0:
        v = vector(address + 4 * start, size, np.float32)
        for k in range(rows):
            row = row_of(u, k, size)
            for j in range(size):
                row[j] += v[j]


@inline(set())
def multiply_vector(u, rows, size, address, start):
    """Multiply rows of u by the fp32 vector at ``address``, from ``start`` on, if it is not 0."""
    if address != 0:
        v = vector(address + 4 * start, size, np.float32)
        for k in range(rows):
            row = row_of(u, k, size)
            for j in range(size):
                row[j] *= v[j]


@inline(set())
def clear(address, start, size):
    """Set a part of the fp32 vector at ``address`` to 0, unless the address is 0."""
    if address != 0:
        fill(vector(address + 4 * start, size, np.float32), size, _ZERO)


@inline(set())
def accumulate(address, start, rows, size, u):
    """Add the rows of u, in order, to a part of the fp32 vector at ``address``, if it is not 0."""
    if address != 0:
        sums = vector(address + 4 * start, size, np.float32)
        for k in range(rows):
            row = row_of(u, k, size)
            for j in range(size):
                sums[j] += row[j]


@inline(set())
def accumulate_selected(address, start, rows, size, u, bits, last, scale):
    """:func:`accumulate` for u * scale where kept, exactly 0 elsewhere."""
    if address != 0:
        sums = vector(address + 4 * start, size, np.float32)
        for k in range(rows):
            row, b = row_of(u, k, size), row_of(bits, k, size)
            for j in range(size):
                sums[j] += (row[j] if b[j] > last else _ZERO) * scale
