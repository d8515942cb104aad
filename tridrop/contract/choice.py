"""The choice of exactly k elements, by the same random bits as a mask.

A mask keeps the elements whose 32 bits are at least T, so a rising p drops elements in the order of
their bits. The k elements that are dropped last are a uniformly random subset: they are what the
mask keeps at a rate that keeps k of them.
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
    """The indices of the k largest numbers of each row (the last dimension): int64, [..., k].

    The largest comes first; of equal numbers the earlier one comes first.

    >>> largest(bits(mask.as_seed(1), (2, 6)), 3)
    tensor([[2, 0, 4],
            [1, 3, 5]])
    """
    # A stable sort breaks ties in the same way on every device. Two elements that share a Philox
    # word have equal bits once in 2^16.
    order = found.argsort(dim=-1, descending=True, stable=True)
    return order[..., :k].contiguous()


def left(n: int, p: float) -> int:
    """How many of n elements the rate p < 1 keeps, at least one, as timm and DINOv2 count them.

    >>> left(196, 0.5), left(3, 0.9), left(0, 0.5)
    (98, 1, 0)
    """
    return min(n, max(1, int(n * (1.0 - p))))
