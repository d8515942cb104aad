"""Products of attention's matrices on a CPU, [B, H, M, K] by [B, H, K, N].

``torch.matmul`` copies operands whose samples and heads do not form one dimension in memory, as
where projections leave heads next to each other, and gives the product in new memory. These
functions read operands where they are and write the product where it stays: by a kernel that has
torch multiply several pairs of matrices at a time, see loops/products.py; or, where it does not
serve, a sample at a time, unless samples are so small that copies take less time than calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.attention import Product
from ..reference.attention import write as write_value
from . import serving
from .memory import handles
from .threads import torchs_team

# Numbers per sample in the tensors that a product would copy. A copy takes some 0.3 ns a number,
# and a call 8 us: at [8, 4, 128, 32] both take the same time.
_LARGE = 1 << 15
# Where the matrices of heads are multiplied one by one, each costs 2 us more than in a batch, and
# the call 10 us less. Larger matrices take so long that this does not count.
_FEW, _LARGE_PRODUCT = 6, 1 << 20


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
        and gradient.scale != 0  # BLAS leaves a product out whose factor is 0, NaN in it or not
    ):
        _multiply_into(into, gradient.left, gradient.right, gradient.scale, add)
    else:
        write_value(gradient, into, add)


def merged(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy of it if each product would copy it."""
    return t if _is_merged(t) or t[0].numel() >= _LARGE else t.contiguous()


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    """out = scale * left @ right, or the sum of that and ``out``."""
    if abs(scale) > torch.finfo(out.dtype).max:
        # A product with the number gives infinities then, but torch refuses to convert it.
        scale = math.copysign(math.inf, scale)
    if _by_threads(out, left, right, scale, add):
        return
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


def call(
    name: str,
    team: tuple[int, int, int],
    cut: tuple[int, int],
    operands: tuple[tuple[int, ...], tuple[int, ...]],
    arguments: tuple[object, ...],
    tensors: Sequence[Tensor | None],
) -> bool:
    """Call a kernel that multiplies ``tensors``; False if it refuses one of them.

    ``cut`` is the number of parts, and the rows of each. ``operands`` are what else it reads:
    handles, and what is wanted of them.
    """
    parts, step = cut
    work = 0, parts, parts * step, step, 1
    kernel = getattr(serving.kernels(), name)
    error = kernel(team, work, *operands, (*arguments, handles(tensors)))
    if error > 0:
        raise RuntimeError("torch could not multiply matrices of attention; it says why above")
    return bool(error == 0)


def _by_threads(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> bool:
    """Multiply whole matrices in each thread; False where that cannot be done or takes longer."""
    team, count = torchs_team(), out.shape[0] * out.shape[1]
    # With fewer matrices than threads, torch shares each of them.
    if team is None or count < team[1]:
        return False
    if not out.dim() == left.dim() == right.dim() == 4 or count == 0:
        return False
    if left.shape[:2] != right.shape[:2] or left.shape[3] != right.shape[2]:
        return False
    if out.shape != (*left.shape[:3], right.shape[3]):
        return False
    if count > _FEW and math.prod(out.shape[2:]) * left.shape[3] < _LARGE_PRODUCT:
        return False
    factors = float(add), float(scale)
    return call("multiply", team, (count, 1), ((), ()), factors, (out, left, right))


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
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
