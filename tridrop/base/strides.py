"""The order in which a result's dimensions lie in memory, as torch's elementwise functions have it.

A dense operand, in whatever order, gives a result of the same strides: channels last stays channels
last, and the transpose of a transposed result is contiguous. Masks do not depend on the order,
since they are functions of coordinates. Backends return contiguous tensors, and the autograd
functions lay them out, so that every backend, torch.compile, vmap and DTensors agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Order = tuple[int, ...]  # the dimensions, outermost first


def order_of(*operands: Tensor | Order | None) -> Order | None:
    """The order of the result of operands with equally many dimensions; None if it is contiguous.

    As in torch's TensorIterator, the first operand whose strides differ in two dimensions decides
    which of them lies further in; a stride of 0 decides nothing. An operand may also be an order,
    which stands for a dense tensor in that order and counts only where some tensor is not
    contiguous.
    """
    for t in operands:
        if isinstance(t, Tensor) and not t.is_contiguous():
            break
    else:
        return None
    shape: Sequence[int] = ()
    strides: list[Sequence[int]] = []
    for t in operands:
        if isinstance(t, Tensor):
            shape = shape or t.shape
            strides.append(t.stride())
        elif t is not None:
            strides.append([len(t) - t.index(dim) for dim in range(len(t))])
    dims = len(strides[0])
    found: list[int] = []  # innermost first
    for dim in reversed(range(dims)):
        # The dimension moves inwards past those that lie further out than it. Where no operand
        # decides between two dimensions, the next one is compared.
        at = len(found)
        found.append(dim)
        for i in reversed(range(at)):
            inside = _inside(found[at], found[i], shape, strides)
            if inside is False:
                break
            if inside:
                found[i], found[at], at = found[at], found[i], i
    found.reverse()
    return None if found == list(range(dims)) else tuple(found)


def _inside(a: int, b: int, shape: Sequence[int], strides: list[Sequence[int]]) -> bool | None:
    """Whether dimension ``a`` lies inside ``b``; None where no operand decides."""
    for stride in strides:
        if stride[a] == 0 or stride[b] == 0:
            continue
        if stride[a] != stride[b]:
            return bool(stride[a] < stride[b])
        if shape and shape[a] < shape[b]:
            return True
    return None


def laid_out(t: Tensor, order: Order | None) -> Tensor:
    """``t``, dense and in ``order``, copied where it is not yet; None leaves ``t`` as it is."""
    if order is None:
        return t
    back = [order.index(dim) for dim in range(len(order))]
    return t.permute(order).contiguous().permute(back)


def where_kept(keep: Tensor, t: Tensor) -> Tensor:
    """``where(keep, t, 0)`` with the strides of ``t``, to which ``keep`` broadcasts."""
    if torch.compiler.is_compiling() or not t.is_contiguous():
        # torch.where would take the strides of its first operand, which is the mask.
        keep = torch.empty_like(t, dtype=torch.bool).copy_(keep)
    return torch.where(keep, t, 0)
