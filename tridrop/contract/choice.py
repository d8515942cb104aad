"""A fixed number of elements, chosen by the mask contract's own bits.

A mask keeps the elements whose 32 bits are at least T, so raising p drops them in the order of
their bits. The k that last longest are a uniformly random subset: the mask at a rate that keeps
just so many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import mask


def bits(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits that :func:`tridrop.keep_mask` compares with T: int64 in [0, 2^32), of ``shape``.

    >>> (bits(mask.as_seed(1), (8,)) >= mask.threshold(0.5)).tolist()
    [True, False, True, False, True, False, True, True]
    """
    where = mask.coordinates(shape)
    rows = mask.row_coordinates(where, seed.device)
    groups = torch.arange(-(-where.cols // mask.LANES), device=seed.device)
    counter = mask.counter_of(mask.DOMAINS["elements"], rows, groups)
    words = mask.philox(counter, mask.key_of(seed))
    found = torch.stack(tuple(mask.lanes(words)), -1).flatten(1)
    return found[:, : where.cols].reshape(tuple(shape))


def largest(found: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of the last dimension are: int64, [..., k].

    In falling order; of equal ones the earlier goes first.

    >>> largest(bits(mask.as_seed(1), (2, 6)), 3)
    tensor([[2, 0, 4],
            [1, 3, 5]])
    """
    # stable: ties (once in 2^16, of two that share a word) are decided alike on every device
    order = found.argsort(dim=-1, descending=True, stable=True)
    return order[..., :k].contiguous()


def left(n: int, p: float) -> int:
    """How many of n are kept at the rate p < 1, as timm and DINOv2 count them: one at least.

    >>> left(196, 0.5), left(3, 0.9), left(0, 0.5)
    (98, 1, 0)
    """
    return min(n, max(1, int(n * (1.0 - p))))
