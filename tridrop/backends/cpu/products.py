"""Products of attention's matrices on a CPU, [B, H, M, K] by [B, H, K, N].

``torch.matmul`` copies operands whose samples and heads do not form one dimension in memory, as
where projections leave heads next to each other, and gives the product in new memory. These
functions read operands where they are and write the product where it stays, a sample at a time,
unless samples are so small that copies take less time than calls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.attention import Product
from ..reference.attention import write as write_value

# Numbers per sample in the tensors that a product would copy. A copy takes some 0.3 ns a number,
# and a call 8 us: at [8, 4, 128, 32] both take the same time.
_LARGE = 1 << 15


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in new contiguous memory."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    _multiply_into(out, left, right, 1.0, False)
    return out


def write(gradient: Product | Tensor, into: Tensor, add: bool) -> None:
    """The reference's ``write``, without the product in memory of its own."""
    if (
        isinstance(gradient, Product)
        and gradient.heads == gradient.left.shape[1]
        and gradient.left.dtype == into.dtype
    ):
        _multiply_into(into, gradient.left, gradient.right, gradient.scale, add)
    else:
        write_value(gradient, into, add)


def merged(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy of it if each product would copy it."""
    return t if _is_merged(t) or t[0].numel() >= _LARGE else t.contiguous()


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    """out = scale * left @ right, or the sum of that and ``out``."""
    operands = (out, left, right)
    copied = [t for t in operands if not _is_merged(t)]
    if sum(t[0].numel() for t in copied) >= _LARGE:
        for sample in zip(*operands, strict=True):
            _add_product(*sample, scale, add)
        return
    left, right = _flattened(left), _flattened(right)
    if _is_merged(out):
        _add_product(out.flatten(0, 1), left, right, scale, add)
        return
    found = _flattened(out) if add else left.new_empty(*left.shape[:2], right.shape[-1])
    _add_product(found, left, right, scale, add)
    out.copy_(found.view(out.shape))


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    if abs(scale) > torch.finfo(out.dtype).max:
        # A product with the number gives infinities then, but baddbmm refuses to convert it.
        scale = math.copysign(math.inf, scale)
    # Where beta is 0, it does not matter what `out` has, not even NaN.
    torch.baddbmm(out, left, right, beta=int(add), alpha=scale, out=out)


def _is_merged(t: Tensor) -> bool:
    """Whether samples and heads form one dimension in memory."""
    return t.shape[0] <= 1 or t.stride(0) == t.shape[1] * t.stride(1)


def _flattened(t: Tensor) -> Tensor:
    """``t`` as [B * H, .., ..]; a copy keeps the order in which rows lie in memory."""
    if t.stride(-1) == 1:
        return t.flatten(0, 1)
    return t.mT.flatten(0, 1).mT
