"""Activations and their derivatives in fp32, as loops that LLVM turns into vector instructions.

It has no vector form of libm's exp, erf and tanh without a library of one vendor, so they are
written out here, from sums, products and a division. NaN stays NaN, and infinities give what the
formulas give: gelu(-inf) is NaN as in torch.

    gelu(x) = x * cdf(x),   cdf(-a) = exp(-a^2 / 2) * tail(a)
    gelu_tanh(x) = x * sigmoid(y),   y = 2 * sqrt(2 / pi) * (x + 0.044715 x^3);   silu: y = x

The negative side comes from the tail itself, not from 1 + erf, and keeps its digits.
"""

from __future__ import annotations

import numpy as np
from numba import int32

from .fast_kernels import inline, part
from .fast_storage import bits_of, value_of

NONE, RELU, GELU, GELU_TANH, SILU = range(5)

_fused = {"contract"}
_ZERO, _HALF, _ONE, _TWO = (np.float32(v) for v in (0, 0.5, 1, 2))

# exp: Cephes, expf.c (Moshier 1989), whose polynomial has a relative error of 2e-8 where
# |r| <= ln(2) / 2. ln(2) in two parts, of which the first times an integer is exact.
_LOWEST = np.float32(-105)  # exp is 0 below, in fp32
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP = tuple(
    np.float32(v)
    for v in (
        1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
        4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
    )
)  # fmt: skip
_ROUND = np.float32(3 << 22)  # added, leaves an integer in the lowest bits
_ROUND_BITS = np.int32(_ROUND.view(np.int32))

# The normal distribution: tail(a) = t * polynomial(t), t = 1 / (1 + 0.35 a), for 0 <= a <= 15, the
# form of Hastings (1955). Fitted here to the smallest largest relative error, 2.3e-8: least squares
# at 400 Chebyshev nodes of t, reweighted by the errors (Lawson 1961), against 40 digits.
# Near 0, where the rounding of t would show, cdf = 1/2 + x * polynomial(x^2), fitted likewise for
# |x| <= 1: 7e-10.
_FARTHEST, _NEAR, _RATE = np.float32(15), np.float32(1), np.float32(0.35)
_TAIL = tuple(
    np.float32(v)
    for v in (
        0.0025765823666006327, -0.042672038078308105, 0.17454974353313446, -0.29466408491134644,
        0.18987824022769928, -0.03858832269906998, 0.110479936003685, 0.11885500699281693,
        0.1399683952331543, 0.13961651921272278,
    )
)  # fmt: skip
_CENTRE = tuple(
    np.float32(v)
    for v in (
        -7.65420827519847e-06, 0.00011348637053743005, -0.0011863299878314137,
        0.009973322972655296, -0.06649035960435867, 0.3989422917366028,
    )
)  # fmt: skip
_DENSITY = np.float32(0.3989422804014327)  # 1 / sqrt(2 pi)
_UPPER_BITS = np.uint32(0xFFFFF000)

# gelu_tanh: y is beyond exp's range from 10 on.
_BEND_END = np.float32(16)
_SLOPE, _CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)


@inline(_fused)
def horner(t, coefficients):
    """A polynomial, from its highest coefficient down."""
    total = coefficients[0]
    for i in range(1, len(coefficients)):
        total = total * t + coefficients[i]
    return total


@inline(set())
def power_of_two(k):
    return np.int32(int32(k + np.int32(127)) << np.int32(23)).view(np.float32)


@inline(_fused)
def exp(z, rest):
    """exp(z + rest) for z <= 0 and a small ``rest``, down to the least subnormal."""
    z = _LOWEST if z < _LOWEST else z
    shifted = z * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = z - n * _LN2_HIGH
    r = r - n * _LN2_LOW + rest
    value = horner(r, _EXP) * (r * r) + r + _ONE
    k = int32(np.float32(shifted).view(np.int32) - _ROUND_BITS)
    half = int32(k >> np.int32(1))  # 2^k itself may be a subnormal
    return value * power_of_two(half) * power_of_two(int32(k - half))


@inline(_fused)
def normal(x):
    """(cdf(x), exp(-x^2 / 2))."""
    a = abs(x)
    a = _FARTHEST if a > _FARTHEST else a
    head = value_of(bits_of(a) & _UPPER_BITS)  # its square is exact
    e = exp(-_HALF * (head * head), -_HALF * ((a - head) * (a + head)))
    t = _ONE / (_ONE + _RATE * a)
    tail = e * (t * horner(t, _TAIL))
    far = tail if x < _ZERO else _ONE - tail
    near = _HALF + x * horner(x * x, _CENTRE)
    return near if a < _NEAR else far, e


@inline(_fused)
def sigmoid(y):
    """(sigmoid(y), its derivative)."""
    e = exp(-abs(y), _ZERO)
    t = _ONE / (_ONE + e)
    tail = e * t
    return tail if y < _ZERO else t, tail * t


@inline(_fused)
def bend(x):
    """(y, dy/dx) of gelu_tanh, constant where its sigmoid is."""
    x = _BEND_END if x > _BEND_END else (-_BEND_END if x < -_BEND_END else x)
    square = _CUBIC * (x * x)
    return _SLOPE * (x + x * square), _SLOPE * (_ONE + (_TWO + _ONE) * square)


@inline(_fused)
def gelu_gradient(x):
    cdf, e = normal(x)
    return cdf + x * (e * _DENSITY)


@inline(_fused)
def gelu_tanh_gradient(x):
    y, dy = bend(x)
    s, ds = sigmoid(y)
    return s + x * (ds * dy)


@inline(_fused)
def silu_gradient(x):
    s, ds = sigmoid(x)
    return s + x * ds


@part(_fused)
def activate(function, u, size):
    """u = f(u)."""
    if function == RELU:
        for j in range(size):
            u[j] = _ZERO if u[j] <= _ZERO else u[j]
    elif function == GELU:
        for j in range(size):
            u[j] = u[j] * normal(u[j])[0]
    elif function == GELU_TANH:
        for j in range(size):
            u[j] = u[j] * sigmoid(bend(u[j])[0])[0]
    elif function == SILU:
        for j in range(size):
            u[j] = u[j] * sigmoid(u[j])[0]


@part(_fused)
def derive(function, u, g, size):
    """g = g * f'(u)."""
    if function == RELU:
        for j in range(size):
            g[j] = _ZERO if u[j] <= _ZERO else g[j]
    elif function == GELU:
        for j in range(size):
            g[j] = g[j] * gelu_gradient(u[j])
    elif function == GELU_TANH:
        for j in range(size):
            g[j] = g[j] * gelu_tanh_gradient(u[j])
    elif function == SILU:
        for j in range(size):
            g[j] = g[j] * silu_gradient(u[j])
