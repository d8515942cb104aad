"""The three noises of dropout, their scales, and the normal numbers of Gaussian dropout.

    mask        keep * scale            scale = 1 / (1 - p); dropped elements are 0, the mean stays
    alpha       a * (x where kept, ALPHA elsewhere) + b; the mean and the variance stay
    gaussian    1 + sigma * n           n standard normal, sigma^2 = p / (1 - p)

"alpha" keeps the same elements as "mask". The normal numbers of "gaussian" have a domain of their
own in the contract; docs/mask-contract.md defines their random words bit for bit, and how they
become numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import mask
from .mask import DOMAINS, ONE, Shard

NOISES = ("mask", "alpha", "gaussian")

# The limit of SELU for large negative x, -lambda * alpha, which alpha dropout puts in the place of
# dropped elements (Klambauer et al., "Self-normalizing neural networks", 2017).
ALPHA = -1.7580993408473766
PAIR = 4  # normal numbers per Philox call: two pairs of Box and Muller


def scale(noise: str, drop_threshold: int) -> float:
    """The scale of kept elements, or ``a`` of alpha dropout, or ``sigma`` of Gaussian dropout.

    >>> scale("alpha", mask.threshold(0.5)), scale("gaussian", mask.threshold(0.2))
    (0.886404894665932, 0.4999999999272404)
    """
    if noise == "mask":
        return mask.scale(drop_threshold)
    p = drop_threshold / ONE
    if noise == "gaussian":
        return math.sqrt(p / (1 - p)) if p < 1 else math.inf
    return ((1 - p) * (1 + p * ALPHA**2)) ** -0.5 if p < 1 else 0.0


def rate_table(noise: str, p: Tensor) -> Tensor:
    """(T, scale) of a 0-d tensor ``p``, as :func:`mask.rate_table`, with the scale of the noise."""
    table = mask.rate_table(p)
    if noise == "mask":
        return table
    rate = table[0] / ONE
    if noise == "gaussian":
        wanted = torch.sqrt(rate / (1 - rate))
    else:
        wanted = torch.rsqrt((1 - rate) * (1 + rate * ALPHA**2))
        wanted = torch.where(rate < 1, wanted, 0.0)
    return torch.stack((table[0], torch.where(table[1].isnan(), table[1], wanted)))


def normals(
    seed: Tensor, shape: Sequence[int], shared: Sequence[int] = (), shard: Shard | None = None
) -> Tensor:
    """Standard normal numbers for a tensor of ``shape``: fp32, functions of seed and coordinate."""
    where = mask.coordinates(shape, shared, shard)
    key, rows = mask.key_of(seed), mask.row_coordinates(where, seed.device)
    first = 0 if where.col_shared else where.col_origin
    cols = min(1, where.cols) if where.col_shared else where.cols
    group = torch.arange(first // PAIR, -(-(first + cols) // PAIR), device=seed.device)[None, :]
    size = (where.rows, group.shape[1], PAIR)
    found = torch.empty(size, dtype=torch.float32, device=seed.device)
    step = max(1, (1 << 16) // max(1, group.shape[1]))  # as for masks
    for start in range(0, where.rows, step):
        row = rows[start : start + step, None]
        low, high = row & mask._WORD, (row >> 32) & mask._WORD
        last = (group >> 32) | (DOMAINS["normal"] << 28)
        words = mask.philox((group & mask._WORD, low, high, last), key)
        pairs = (*box_muller(*words[:2]), *box_muller(*words[2:]))
        found[start : start + step] = torch.stack(pairs, -1)
    taken = found.flatten(1)[:, first % PAIR : first % PAIR + cols]
    return taken.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers from two words (Box and Muller 1958), by fp32 arithmetic alone.

    r = sqrt(-2 ln u) with u = (first + 1/2) / 2^32. The upper two bits of the second word choose a
    quarter of the circle, and its other bits are a signed angle of at most an eighth of a turn. The
    polynomials are those of Cephes (Moshier), so that no backend depends on a library's logarithm.
    """
    u = (first.to(torch.float32) + 0.5) * 2.0**-32
    mantissa, exponent = torch.frexp(u)
    low = mantissa < math.sqrt(0.5)
    z = torch.where(low, mantissa + mantissa, mantissa) - 1
    e = (exponent - low.to(exponent.dtype)).to(torch.float32)
    y = _horner(z, LOG) * (z * z * z) + e * LN2_LOW - 0.5 * (z * z)
    r = torch.sqrt(torch.clamp(-2.0 * (z + y + e * LN2_HIGH), min=0.0))
    # The lower 30 bits as a signed number: [-1/8, 1/8) of a turn.
    part = ((second << 2) & mask._WORD) - ((second & 0x20000000) << 3)
    t = part.to(torch.float32) * (math.pi / 2 * 2.0**-32)
    s = t * t
    sine = _horner(s, SINE) * s * t + t
    cosine = _horner(s, COSINE) * (s * s) - 0.5 * s + 1.0
    quarter = second >> 30
    odd = (quarter & 1) != 0
    x, y = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    r = torch.where(quarter >= 2, -r, r)
    return r * x, r * y


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = value * x + c
    return value


# Cephes' logf on [sqrt(1/2), sqrt(2)] - 1, and sinf and cosf on [-pi/4, pi/4].
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
