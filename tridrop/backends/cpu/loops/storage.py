"""How the kernels for CPUs read and write tensors: fp32, or 16-bit numbers handled as integers.

A matrix is a pair (address, dtype code), so that one compiled kernel serves all dtypes: it works on
pieces in fp32, and looks at the code once per piece that it loads or stores.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import types, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from .decorators import build_call, inline
from .memory import array_at, bits_of, part_of, value_of

FP32, BF16, FP16 = 0, 1, 2  # the dtype codes
_ELEMENTS = types.float32, types.uint16, types.uint16  # what is loaded and stored, by code

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
        conversions = ((same, same), (from_bf16, to_bf16), (from_fp16, to_fp16))
        loops = [inline(fastmath)(make(*both)) for both in conversions]

        # As a function of Python, which packs the other arguments into a tuple and unpacks them
        # three times, this took longer to compile than the loops.
        @intrinsic
        def call(context, matrix, start, size, *others):
            found = []
            for loop, element in zip(loops, _ELEMENTS, strict=True):
                taken = (types.Array(element, 1, "C"), *others)
                loop.compile(taken)
                found.append(loop.overloads[taken])
            result = found[0].signature.return_type
            given = matrix, types.int64, types.int64, types.StarArgTuple(others)
            return result(*given), functools.partial(_build_choice, found)

        return call

    return decorate


def _build_choice(loops, context, builder, signature, arguments):
    """Call the loop for a matrix's dtype with its elements and the other arguments."""
    matrix, start, size, others = arguments
    address, code = (builder.extract_value(matrix, i) for i in range(2))
    others = cgutils.unpack_tuple(builder, others)
    result = cgutils.alloca_once(builder, context.get_value_type(signature.return_type))

    def call(which):
        loop, element = loops[which], _ELEMENTS[which]
        width = builder.mul(start, start.type(element.bitwidth // 8))
        elements = array_at(context, builder, builder.add(address, width), size, element)
        builder.store(build_call(context, builder, loop, [elements, *others]), result)

    def choose(which):
        equal = builder.icmp_signed("==", code, code.type(which))
        with builder.if_else(equal, likely=None) as (then, otherwise):
            with then:
                call(which)
            with otherwise:
                call(FP16) if which == BF16 else choose(BF16)

    choose(FP32)
    return builder.load(result)


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
