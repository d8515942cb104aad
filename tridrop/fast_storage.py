"""How the kernels for CPUs read and write tensors: fp32, or 16 bits handled as integers.

A matrix is a pair (address, kind), so that one compiled kernel serves all dtypes: it works on
strips in fp32, and what a strip is loaded from or stored to is asked once a strip.
"""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32

from .fast_kernels import inline, part, vector

FP32, BF16, FP16 = 0, 1, 2

_ONE, _SIGN = np.uint32(1), np.uint32(0x8000)
_WORD, _MAGNITUDE, _INFINITY = np.uint32(16), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
# fp16's exponent and mantissa, 13 bits up, are an fp32 2^112 times too small. 65536 is what its
# infinity becomes then; from there on in fp32 everything is infinite in fp16, or NaN.
_SHIFT, _REBIAS, _BEYOND = np.uint32(13), np.float32(2.0**112), np.float32(65536)
_OVERFLOW, _SUBNORMAL = np.uint32(143 << 23), np.uint32(113 << 23)
_DROP_BIAS, _BELOW_HALF = np.uint32(112 << 23), np.uint32(0xFFF)
_HALF_POINT = np.float32(0.5)  # added to a subnormal of fp16, leaves its bits lowest, rounded


@inline(set())
def bits_of(value):
    return np.float32(value).view(np.uint32)


@inline(set())
def value_of(bits):
    return np.uint32(bits).view(np.float32)


@inline(set())
def to_bf16(value):
    """To the nearest, ties to even."""
    word = bits_of(value)
    odd = (word >> _WORD) & _ONE
    rounded = uint16(uint32(word + np.uint32(0x7FFF) + odd) >> _WORD)
    return rounded if value == value else np.uint16(0x7FC0)


@inline(set())
def from_fp16(half):
    word = uint32(half)
    value = value_of(uint32(word & np.uint32(0x7FFF)) << _SHIFT) * _REBIAS
    magnitude = bits_of(value) | (_INFINITY if value >= _BEYOND else np.uint32(0))
    return value_of(uint32(magnitude) | uint32(word & _SIGN) << _WORD)


@inline(set())
def to_fp16(value):
    """To the nearest, ties to even."""
    word = bits_of(value)
    magnitude = word & _MAGNITUDE
    odd = (magnitude >> _SHIFT) & _ONE
    normal = uint32(magnitude - _DROP_BIAS + _BELOW_HALF + odd) >> _SHIFT
    small = bits_of(value_of(magnitude) + _HALF_POINT) - bits_of(_HALF_POINT)
    huge = np.uint32(0x7C00) if magnitude <= _INFINITY else np.uint32(0x7E00)
    found = small if magnitude < _SUBNORMAL else normal
    found = huge if magnitude >= _OVERFLOW else found
    return uint16(uint32(found) | ((word >> _WORD) & _SIGN))


@part(set())
def load(matrix, start, size, into):
    """into[:size] = the elements from ``start`` on, in fp32."""
    address, kind = matrix
    if kind == FP32:
        wide = vector(address + 4 * start, size, np.float32)
        for j in range(size):
            into[j] = wide[j]
        return
    bits = vector(address + 2 * start, size, np.uint16)
    if kind == BF16:
        for j in range(size):
            into[j] = value_of(uint32(bits[j]) << _WORD)
    else:
        for j in range(size):
            into[j] = from_fp16(bits[j])


@part(set())
def store(matrix, start, size, values):
    """The elements from ``start`` on = values[:size], rounded once."""
    address, kind = matrix
    if kind == FP32:
        wide = vector(address + 4 * start, size, np.float32)
        for j in range(size):
            wide[j] = values[j]
        return
    bits = vector(address + 2 * start, size, np.uint16)
    if kind == BF16:
        for j in range(size):
            bits[j] = to_bf16(values[j])
    else:
        for j in range(size):
            bits[j] = to_fp16(values[j])
