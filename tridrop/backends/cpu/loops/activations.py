"""Activations and their derivatives in fp32, as loops that LLVM turns into vector instructions.

LLVM vectorises libm's exp, erf and tanh only with one vendor's library, so this file writes them
out, in sums, products and a division. NaN stays NaN, and infinities give what the formulas give:
gelu(-inf) is NaN, as in torch.

    gelu(x) = x * cdf(x),   cdf(-a) = exp(-a^2 / 2) * tail(a)
    gelu_tanh(x) = x * sigmoid(y),   y = 2 * sqrt(2 / pi) * (x + 0.044715 x^3);   silu: y = x;
    quick_gelu: y = 1.702 x

For negative x the tail itself is computed, and not 1 + erf, whose digits would cancel.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import uint32

from .decorators import address_of, by_address, call_at, inline
from .memory import bits_of, value_of, vector

_fused = {"contract"}
_ZERO, _HALF, _ONE, _TWO = (np.float32(v) for v in (0, 0.5, 1, 2))

# exp: Cephes, expf.c (Moshier 1989), whose polynomial has a relative error of 2e-8 for
# |r| <= ln(2) / 2. ln(2) is split into two parts; the first times an integer is exact.
_LOWEST = np.float32(-105)  # below this, exp is 0 in fp32
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP = tuple(
    np.float32(v)
    for v in (
        1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
        4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
    )
)  # fmt: skip
# Adding this number leaves an integer n in the lowest bits, as the exponent of 2^(n + 64). From
# that 2^n is made, which may be a subnormal.
_ROUND, _MANTISSA, _BACK = np.float32((3 << 22) + 127 + 64), np.uint32(23), np.float32(2.0**-64)

# The normal distribution: tail(a) = t * polynomial(t), t = 1 / (1 + 0.35 a), for 0 <= a <= 15, the
# form of Hastings (1955). The polynomial was fitted for this file to the least maximal relative
# error, 2.3e-8: least squares at 400 Chebyshev nodes of t, reweighted by the errors (Lawson 1961),
# against 40 digits. Near 0, where the rounding of t would show, cdf = 1/2 + x * polynomial(x^2),
# fitted in the same way for |x| <= 1: 7e-10.
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
# The short forms, fitted in the same way: 6e-6 and 5e-6.
_LN2 = np.float32(0.6931471805599453)
_SHORT_EXP = tuple(np.float32(v) for v in (0.04126245, 0.16757017, 0.50005533))
_SHORT_RATE = np.float32(0.31)
_SHORT_TAIL = tuple(
    np.float32(v)
    for v in (
        -0.07392921052086832, 0.18045055351231254, 0.015744476832751,
        0.13342990805747695, 0.12044124599676045, 0.12386070486838859,
    )
)  # fmt: skip
_DENSITY = np.float32(0.3989422804014327)  # 1 / sqrt(2 pi)
_UPPER_BITS = np.uint32(0xFFFFF000)

# gelu_tanh: from x = 10 on, y is beyond exp's range.
_BEND_END = np.float32(16)
_SLOPE, _CUBIC = np.float32(2 * 0.7978845608028654), np.float32(0.044715)
_QUICK = np.float32(1.702)


@inline(_fused)
def horner(t, coefficients):
    """A polynomial of t, whose highest coefficient comes first."""
    total = coefficients[0]
    for i in range(1, len(coefficients)):
        total = total * t + coefficients[i]
    return total


@inline(_fused)
def power_of_two(shifted):
    return value_of(uint32(bits_of(shifted) << _MANTISSA))


@inline(_fused)
def exp(z, rest):
    """exp(z + rest) for z <= 0 and a small ``rest``, down to the smallest subnormal."""
    z = _LOWEST if z < _LOWEST else z
    shifted = z * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = z - n * _LN2_HIGH
    r = r - n * _LN2_LOW + rest
    value = horner(r, _EXP) * (r * r) + r + _ONE
    return value * power_of_two(shifted) * _BACK


@inline(_fused)
def exp_of(z):
    return exp(z, _ZERO)


@inline(_fused)
def short_exp(z):
    """exp(z) for z <= 0."""
    z = _LOWEST if z < _LOWEST else z
    shifted = z * _LOG2_E + _ROUND
    r = z - (shifted - _ROUND) * _LN2
    value = horner(r, _SHORT_EXP) * (r * r) + r + _ONE
    return value * power_of_two(shifted) * _BACK


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
def short_normal(x):
    a = abs(x)
    a = _FARTHEST if a > _FARTHEST else a
    e = short_exp(-_HALF * (a * a))
    t = _ONE / (_ONE + _SHORT_RATE * a)
    tail = e * (t * horner(t, _SHORT_TAIL))
    return tail if x < _ZERO else _ONE - tail, e


@inline(_fused)
def bend(x):
    """(y, dy/dx) of gelu_tanh, constant where the sigmoid of y is constant."""
    x = _BEND_END if x > _BEND_END else (-_BEND_END if x < -_BEND_END else x)
    square = _CUBIC * (x * x)
    return _SLOPE * (x + x * square), _SLOPE * (_ONE + (_TWO + _ONE) * square)


@inline(_fused)
def identity(x):
    """(f(x), f'(x)), as of all functions below."""
    return x, _ONE


@inline(_fused)
def relu(x):
    return (_ZERO, _ZERO) if x <= _ZERO else (x, _ONE)


def sigmoid_by(exp):
    @inline(_fused)
    def sigmoid(y):
        """(sigmoid(y), its derivative)."""
        e = exp(-abs(y))
        t = _ONE / (_ONE + e)
        tail = e * t
        return tail if y < _ZERO else t, tail * t

    return sigmoid


def gelu_by(exp, normal):
    @inline(_fused)
    def gelu(x):
        cdf, e = normal(x)
        return x * cdf, cdf + x * (e * _DENSITY)

    return gelu


def gelu_tanh_by(exp, normal):
    sigmoid = sigmoid_by(exp)

    @inline(_fused)
    def gelu_tanh(x):
        y, dy = bend(x)
        s, ds = sigmoid(y)
        return x * s, s + x * (ds * dy)

    return gelu_tanh


def silu_by(exp, normal):
    sigmoid = sigmoid_by(exp)

    @inline(_fused)
    def silu(x):
        s, ds = sigmoid(x)
        return x * s, s + x * ds

    return silu


def quick_gelu_by(exp, normal):
    sigmoid = sigmoid_by(exp)

    @inline(_fused)
    def quick_gelu(x):
        s, ds = sigmoid(_QUICK * x)
        return x * s, s + x * (ds * _QUICK)

    return quick_gelu


def both(make):
    """``make(exp, normal)`` with the functions of full precision, and with the short ones.

    The short form serves results of 16 bits: its error is 2e-5, a tenth of fp16's rounding, and it
    takes two thirds of the time.
    """
    return make(exp_of, normal), make(short_exp, short_normal)


# name -> (form of full precision, short form), each of them x -> (f(x), f'(x))
FUNCTIONS = {
    "none": (identity, identity),
    "relu": (relu, relu),
    "gelu": both(gelu_by),
    "gelu_tanh": both(gelu_tanh_by),
    "silu": both(silu_by),
    "quick_gelu": both(quick_gelu_by),
}
# The largest errors of the curved functions in full precision, in units in the last place: for
# x > -1, and in the tail from there to -12. gelu_tanh's tail has the error of y, up to 180, times
# exp's condition; quick_gelu's has that of its y, up to 20.
BOUNDS = {"gelu": (3, 6), "gelu_tanh": (4, 256), "silu": (3, 4), "quick_gelu": (4, 32)}

# The loops over one form, by the number that a kernel calls them with.
_ACTIVATE, _DERIVE, _DIFFERENTIATE = 0, 1, 2


class Form:
    """One form of an activation, whose loops are compiled when their address is first asked for.

    Compiled with the kernels, the loops over all forms took half of the first dropout's time to
    compile, which needs none of them. So a kernel takes the address of the loops it needs.
    """

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self._function = function
        self._compiled: list[Any] = []

    @functools.cached_property
    def address(self) -> int:
        """The address of the loops; 0 for the identity, which needs none."""
        if self._function is identity:
            return 0
        loops = self._loops()
        self._compiled.append(loops)  # live as long as their address may be called, by any thread
        return address_of(loops)

    def _loops(self) -> Any:
        f = self._function

        def loops(which, first, second, size):
            u = vector(first, size, np.float32)
            if which == _ACTIVATE:
                for j in range(size):
                    u[j] = f(u[j])[0]
                return
            w = vector(second, size, np.float32)
            if which == _DERIVE:
                for j in range(size):
                    w[j] = w[j] * f(u[j])[1]
            else:
                for j in range(size):
                    w[j], u[j] = f(u[j])

        loops.__name__ = loops.__qualname__ = self.name
        return by_address(_fused)(loops)


def _named(name: str, full: Any, short: Any) -> tuple[Form, Form]:
    """The two forms of a function, one object where it has one form alone."""
    form = Form(name, full)
    return form, form if short is full else Form(f"{name}_short", short)


# name -> (form of full precision, short form)
FORMS = {name: _named(name, *functions) for name, functions in FUNCTIONS.items()}


@inline(set())
def activate(address, u, size):
    """u = f(u), for the f whose loops are at an address; 0 stands for the identity."""
    if address != 0:
        call_at(address, _ACTIVATE, u.ctypes.data, 0, size)


@inline(set())
def derive(address, u, g, size):
    """g = g * f'(u)."""
    if address != 0:
        call_at(address, _DERIVE, u.ctypes.data, g.ctypes.data, size)


@inline(set())
def differentiate(address, u, w, size):
    """(w, u) = (f(u), f'(u))."""
    if address != 0:
        call_at(address, _DIFFERENTIATE, u.ctypes.data, w.ctypes.data, size)
    else:
        for j in range(size):
            w[j], u[j] = identity(u[j])
