"""Alpha and Gaussian noise: the twin of ``tridrop/contract/noise.py`` in Triton.

Normal numbers are computed by the same arithmetic as there, in fp32 and without a library's
logarithm or sine. Backends differ in a few of the last bits, because compilers join products with
sums in different ways.
"""

import triton
import triton.language as tl

from .constant import Constant
from .mask import DOMAIN_NORMAL, ELEMENTS, words_of

# Indices in noise.NOISES; 0 is the mask.
ALPHA = Constant(1)
GAUSSIAN = Constant(2)

FILL = Constant(-1.7580993408473766)  # noise.ALPHA
TO_UNIT = Constant(2.0**-32)
EIGHTH = Constant(1.5707963267948966 * 2.0**-32)
SQRT_HALF = Constant(0.7071067811865476)


@triton.jit
def alpha_shift(threshold, scale):
    """What alpha dropout adds: -scale * p * alpha."""
    return scale * (threshold.to(tl.float32) * TO_UNIT) * (-FILL)


@triton.jit
def gaussian(row, group, criterion, MASK: tl.constexpr):
    """The factors 1 + sigma * n of Gaussian dropout; ``criterion`` comes from load_criterion()."""
    return normals(row, group, criterion[0], MASK) * criterion[2] + 1.0


@triton.jit
def normals(row, group, key, MASK: tl.constexpr):
    """The normal numbers of rows [R] and column groups [G]: [R, G * 8], or [R, 1] if shared."""
    if MASK == ELEMENTS:
        # A call gives four normal numbers, so a group takes two calls, where a mask takes one.
        calls = tl.reshape(group[:, None] * 2 + tl.arange(0, 2)[None, :], [group.shape[0] * 2])
        w0, w1, w2, w3 = words_of(row[:, None], calls[None, :], key, DOMAIN_NORMAL)
        n0, n1 = _box_muller(w0, w1)
        n2, n3 = _box_muller(w2, w3)
        n = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # in order, as in mask.keep_elements
        n = tl.reshape(n, [row.shape[0], group.shape[0] * 8])
    else:
        w0, w1, _, _ = words_of(row, tl.zeros_like(row), key, DOMAIN_NORMAL)
        n, _ = _box_muller(w0, w1)
        n = n[:, None]
    return n


@triton.jit
def _box_muller(first, second):
    """``noise.box_muller``: two normal numbers from two words."""
    u = (first.to(tl.float32) + 0.5) * TO_UNIT
    bits = u.to(tl.int32, bitcast=True)
    # The exponent, and the mantissa in [1/2, 1), as in frexp: u is never subnormal.
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = mantissa < SQRT_HALF
    z = tl.where(low, mantissa + mantissa, mantissa) - 1.0
    e = tl.where(low, exponent - 1, exponent).to(tl.float32)
    y = z * 7.0376836292e-2 - 1.1514610310e-1
    y = y * z + 1.1676998740e-1
    y = y * z - 1.2420140846e-1
    y = y * z + 1.4249322787e-1
    y = y * z - 1.6668057665e-1
    y = y * z + 2.0000714765e-1
    y = y * z - 2.4999993993e-1
    y = y * z + 3.3333331174e-1
    y = y * (z * z * z) + e * -2.12194440e-4 - z * z * 0.5
    log = z + y + e * 0.693359375
    r = tl.sqrt_rn(tl.maximum(log * -2.0, 0.0))

    part = (second << 2).to(tl.int32, bitcast=True)
    t = part.to(tl.float32) * EIGHTH
    s = t * t
    sine = ((s * -1.9515295891e-4 + 8.3321608736e-3) * s - 1.6666654611e-1) * s * t + t
    cosine = (s * 2.443315711809948e-5 - 1.388731625493765e-3) * s + 4.166664568298827e-2
    cosine = cosine * (s * s) - s * 0.5 + 1.0
    odd = ((second >> 30) & 1) != 0
    x, y = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    r = tl.where((second >> 31) != 0, -r, r)
    return r * x, r * y
