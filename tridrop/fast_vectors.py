"""The steps that the kernels of :mod:`tridrop.fast` are made of: loops over a strip of a row.

Strips are arrays in fp32 that stay in the first-level cache, so that a step apart costs little,
and each loop is simple enough to become vector instructions.
"""

from __future__ import annotations

import numpy as np

from .fast_kernels import part, vector

_ZERO = np.float32(0)


@part(set())
def select(u, first, size, bits, lane, last, scale):
    """u = u * scale where kept, exactly 0 elsewhere, whatever it was."""
    # Slices, since an index that might be negative for all the compiler knows is looked at.
    v, b = u[first : first + size], bits[lane : lane + size]
    for j in range(size):
        v[j] = (v[j] if b[j] > last else _ZERO) * scale


@part(set())
def add(u, size, v):
    """u = v + u."""
    for j in range(size):
        u[j] = v[j] + u[j]


@part(set())
def multiply(u, size, v):
    """u = u * v."""
    for j in range(size):
        u[j] = u[j] * v[j]


@part(set())
def add_vector(u, size, address, start):
    """u = u + the fp32 vector at ``address`` from ``start`` on; 0 is none."""
    if address != 0:
        add(u, size, vector(address + 4 * start, size, np.float32))


@part(set())
def multiply_vector(u, size, address, start):
    """u = u * the fp32 vector at ``address`` from ``start`` on; 0 is none."""
    if address != 0:
        multiply(u, size, vector(address + 4 * start, size, np.float32))


@part(set())
def clear(address, start, size):
    """Set to 0 a part of the fp32 vector at ``address``, unless that is 0."""
    if address != 0:
        sums = vector(address + 4 * start, size, np.float32)
        for j in range(size):
            sums[j] = _ZERO


@part(set())
def accumulate(address, start, size, u):
    """Add ``u`` to a part of the fp32 vector at ``address``, unless that is 0."""
    if address != 0:
        add(vector(address + 4 * start, size, np.float32), size, u)


@part({"contract"})
def accumulate_product(address, size, u, v):
    """Add u * v to the fp32 vector at ``address``, unless that is 0."""
    if address != 0:
        sums = vector(address, size, np.float32)
        for j in range(size):
            sums[j] += u[j] * v[j]
