"""How the kernels for CPUs read and write tensors: fp32, or 16-bit numbers handled as integers.

A matrix is a pair (address, dtype code), so that one compiled kernel serves all dtypes: it works on
pieces in fp32, and looks at the code once per piece that it loads or stores.
"""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32

from .decorators import inline
from .memory import bits_of, part_of, value_of, vector

FP32, BF16, FP16 = 0, 1, 2  # the dtype codes

_ZERO = np.float32(0)
_ONE, _SIGN, _FINITE = np.uint32(1), np.uint32(0x8000), np.uint32(0x7FFF)
_WORD, _MAGNITUDE, _INFINITY = np.uint32(16), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
# The exponent and mantissa of fp16, moved up by 13 bits, are an fp32 number that is 2^112 times too
# small. fp16's infinity becomes 65536 in this way, and NaN becomes something larger.
_SHIFT, _REBIAS, _BEYOND = np.uint32(13), np.float32(2.0**112), np.float32(65536)
_OVERFLOW, _SUBNORMAL = np.uint32(143 << 23), np.uint32(113 << 23)
_REBIAS_AND_HALF = np.uint32((1 << 32) - (112 << 23) + 0xFFF)  # modulo 2^32
_HALF_POINT = np.float32(0.5)  # added to a subnormal of fp16, it leaves the rounded bits lowest


@inline(set())
def from_bf16(half):
    return value_of(uint32(half) << _WORD)


@inline(set())
def to_bf16(value):
    """Round to nearest, ties to even."""
    word = bits_of(value)
    odd = uint32(uint32(word >> _WORD) & _ONE)
    rounded = uint16(uint32(uint32(word + _FINITE) + odd) >> _WORD)
    return rounded if value == value else np.uint16(0x7FC0)


# numba widens the result of two 32-bit operands to 64 bits. Every step is cut back to 32 bits, so
# that twice as many numbers fit a vector.
@inline(set())
def from_fp16(half):
    word = uint32(half)
    value = value_of(uint32(uint32(word & _FINITE) << _SHIFT)) * _REBIAS
    magnitude = uint32(bits_of(value) | (_INFINITY if value >= _BEYOND else np.uint32(0)))
    return value_of(uint32(magnitude | uint32(uint32(word & _SIGN) << _WORD)))


@inline(set())
def to_fp16(value):
    """Round to nearest, ties to even."""
    word = bits_of(value)
    magnitude = uint32(word & _MAGNITUDE)
    odd = uint32(uint32(magnitude >> _SHIFT) & _ONE)
    normal = uint32(uint32(uint32(magnitude + _REBIAS_AND_HALF) + odd) >> _SHIFT)
    small = uint32(bits_of(value_of(magnitude) + _HALF_POINT) - bits_of(_HALF_POINT))
    huge = np.uint32(0x7C00) if magnitude <= _INFINITY else np.uint32(0x7E00)
    found = small if magnitude < _SUBNORMAL else normal
    found = huge if magnitude >= _OVERFLOW else found
    return uint16(uint32(found | uint32(uint32(word >> _WORD) & _SIGN)))


@inline(set())
def same(value):
    return value


def for_each_dtype(fastmath):
    """Make a function of (matrix, start, size, ...) from loops over (elements, ...).

    ``elements`` are the ``size`` elements from ``start`` on. The decorated function makes the loop
    for one dtype, from two functions that convert an element to fp32 and from fp32.
    """

    def decorate(make):
        of_fp32 = inline(fastmath)(make(same, same))
        of_bf16 = inline(fastmath)(make(from_bf16, to_bf16))
        of_fp16 = inline(fastmath)(make(from_fp16, to_fp16))

        @inline(fastmath)
        def call(matrix, start, size, *others):
            address, code = matrix
            if code == FP32:
                return of_fp32(vector(address + 4 * start, size, np.float32), *others)
            half = vector(address + 2 * start, size, np.uint16)
            return of_bf16(half, *others) if code == BF16 else of_fp16(half, *others)

        return call

    return decorate


@for_each_dtype(set())
def load(read, write):
    """into = the elements, in fp32."""

    def loop(elements, into):
        for j in range(elements.size):
            into[j] = read(elements[j])

    return loop


@for_each_dtype(set())
def load_rows(read, write):
    """into = ``rows`` rows of ``size`` elements, whose starts are ``stride`` apart, in fp32."""

    def loop(elements, rows, stride, size, into):
        for k in range(rows):
            row, u = part_of(elements, k * stride, size), part_of(into, k * size, size)
            for j in range(size):
                u[j] = read(row[j])

    return loop


@for_each_dtype(set())
def store(read, write):
    """elements = values, rounded once."""

    def loop(elements, values):
        for j in range(elements.size):
            elements[j] = write(values[j])

    return loop


@for_each_dtype({"reassoc", "nsz"})
def store_rounded(read, write):
    """elements = values, rounded once; values = the rounded numbers, whose sum is returned."""

    def loop(elements, values):
        total = _ZERO
        for j in range(elements.size):
            rounded = write(values[j])
            elements[j] = rounded
            values[j] = read(rounded)
            total += read(rounded)
        return total

    return loop


@for_each_dtype(set())
def add_selected(read, write):
    """u = elements + u * scale where kept, and elements elsewhere."""

    def loop(elements, u, bits, last, scale):
        for j in range(elements.size):
            u[j] = read(elements[j]) + (u[j] if bits[j] > last else _ZERO) * scale

    return loop


@for_each_dtype(set())
def store_selected(read, write):
    """elements = u * scale where kept, exactly 0 elsewhere, even where u is not finite."""

    def loop(elements, u, bits, last, scale):
        for j in range(elements.size):
            elements[j] = write((u[j] if bits[j] > last else _ZERO) * scale)

    return loop


@for_each_dtype(set())
def store_selected_rows(read, write):
    """:func:`store_selected` for ``rows`` rows of ``size`` elements, ``stride`` apart."""

    def loop(elements, rows, stride, size, u, bits, last, scale):
        for k in range(rows):
            row = part_of(elements, k * stride, size)
            v, b = part_of(u, k * size, size), part_of(bits, k * size, size)
            for j in range(size):
                row[j] = write((v[j] if b[j] > last else _ZERO) * scale)

    return loop
