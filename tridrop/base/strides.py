"""The order in which a result's dimensions lie in memory: that of torch's elementwise functions.

A dense tensor, of whatever order, gives a result of the same strides: channels last stays channels
last, and the transpose of a transposed result is contiguous. Masks know nothing of it: they are
functions of coordinates. Backends return contiguous tensors; the autograd functions lay them out,
so that every backend, torch.compile, vmap and DTensors have one rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Order = tuple[int, ...]  # the dimensions, outermost first


def order_of(*operands: Tensor | Order | None) -> Order | None:
    """The order of the result of operands with equally many dimensions; None if it is contiguous.

    The first operand whose strides tell two dimensions apart decides on them; a stride of 0 tells
    nothing. This is what torch's TensorIterator does. An order stands for a dense tensor that has
    it, and is asked where the tensors are not all contiguous.
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
        # Inwards, changing places with what lies further out; what is not told apart is passed by.
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
    """Whether dimension ``a`` lies inside ``b``; None where no operand says."""
    for stride in strides:
        if stride[a] == 0 or stride[b] == 0:
            continue
        if stride[a] != stride[b]:
            return bool(stride[a] < stride[b])
        if shape and shape[a] < shape[b]:
            return True
    return None


def laid(t: Tensor, order: Order | None) -> Tensor:
    """``t``, dense and in that order; a copy where it is not. None: as it is."""
    if order is None:
        return t
    back = [order.index(dim) for dim in range(len(order))]
    return t.permute(order).contiguous().permute(back)


def where_kept(keep: Tensor, t: Tensor) -> Tensor:
    """``where(keep, t, 0)``, laid out as ``t``; ``keep`` broadcasts to it."""
    if torch.compiler.is_compiling() or not t.is_contiguous():
        # The mask is torch.where's first operand, whose strides would decide.
        keep = torch.empty_like(t, dtype=torch.bool).copy_(keep)
    return torch.where(keep, t, 0)
