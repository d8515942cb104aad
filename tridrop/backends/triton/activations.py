"""Activations and their derivatives as functions of fp32 tiles.

Each has a row in :data:`FUNCTIONS`. Constants stand to the right of tiles, because in the
interpreter a constexpr on the left of an operator makes the result a constexpr.
"""

import triton
import triton.language as tl

from ...spec.elementwise import check_functions
from .constant import Constant

SQRT_HALF = Constant(0.7071067811865476)
INV_SQRT_2PI = Constant(0.3989422804014327)
SQRT_8_OVER_PI = Constant(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBIC = Constant(0.044715)
QUICK_GELU = Constant(1.702)


@triton.jit
def none(x):
    return x


@triton.jit
def none_grad(x):
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does


@triton.jit
def relu_grad(x):
    return tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_grad(x):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_grad(x):
    cdf = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    return cdf + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(u)) / 2 = sigmoid(2 u), which does not cancel; and the interpreter has no tanh.
    return x * tl.sigmoid((x + x * x * x * GELU_CUBIC) * SQRT_8_OVER_PI)


@triton.jit
def gelu_tanh_grad(x):
    s = tl.sigmoid((x + x * x * x * GELU_CUBIC) * SQRT_8_OVER_PI)
    return s + x * s * (1.0 - s) * SQRT_8_OVER_PI * (1.0 + x * x * GELU_CUBIC * 3.0)


@triton.jit
def quick_gelu(x):
    return x * tl.sigmoid(x * QUICK_GELU)


@triton.jit
def quick_gelu_grad(x):
    s = tl.sigmoid(x * QUICK_GELU)
    return s * (1.0 + x * QUICK_GELU * (1.0 - s))


# name -> (function, derivative)
FUNCTIONS = {
    "none": (none, none_grad),
    "relu": (relu, relu_grad),
    "silu": (silu, silu_grad),
    "gelu": (gelu, gelu_grad),
    "gelu_tanh": (gelu_tanh, gelu_tanh_grad),
    "quick_gelu": (quick_gelu, quick_gelu_grad),
}
check_functions(FUNCTIONS, "backends/triton/activations.FUNCTIONS")
