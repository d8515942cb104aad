"""The options of products with a dropped matrix, and the checks of their operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .elementwise import Options, autocast_dtype, check_device, check_input

MAX_RANK = 256
# How many products a pass of the kernels makes, and of how many rows together: their sums are held
# in registers.
GROUP, GROUP_ROWS = 3, 192


@dataclass(frozen=True)
class ProductOptions(Options):
    """The options of the products of one dropped matrix with several other matrices.

    The other matrices are stacked along the rows of one tensor, and ``ranks`` are their numbers of
    rows. ``gain`` multiplies the results. With ``one_mask`` all products share one mask.
    """

    ranks: tuple[int, ...] = ()
    gain: float = 1.0
    one_mask: bool = False

    @property
    def masks(self) -> int:
        """How many masks there are."""
        return 1 if self.one_mask else len(self.ranks)


def check_matrix(
    m: Tensor, name: str, rows: int | None, cols: int | None, like: Tensor, why: str
) -> None:
    """Raise unless ``m`` is a floating-point matrix [rows, cols] on the device of ``like``.

    None allows any size. ``why`` is the end of the error message.
    """
    check_input(m, name)
    check_device(m, name, like)
    wanted = ["any" if n is None else str(n) for n in (rows, cols)]
    fits = m.dim() == 2 and all(
        n is None or n == size for n, size in zip((rows, cols), m.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(m.shape)}; it must be [{', '.join(wanted)}]: {why}"
        )


def check_rank(ranks: Sequence[int], name: str) -> None:
    """Raise unless the kernels can hold each rank in registers."""
    for rank in ranks:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{name} has {rank} rows; ranks from 1 to {MAX_RANK} are supported")


def groups(ranks: Sequence[int]) -> list[slice]:
    """The products of each pass: runs of neighbours whose sums fit the registers."""
    found: list[slice] = []
    start = 0
    for i in range(1, len(ranks) + 1):
        more = ranks[start : i + 1]
        if i == len(ranks) or len(more) > GROUP or len(more) * max(16, *more) > GROUP_ROWS:
            found.append(slice(start, i))
            start = i
    return found


def check_same_dtype(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise unless two operands of a product have one dtype."""
    if a.dtype != b.dtype:
        raise TypeError(
            f"{names[0]} has dtype {a.dtype} and {names[1]} {b.dtype}; a product needs one: "
            f"convert with .to({a.dtype})"
        )


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a product is computed: autocast's where that is on, else the weight's."""
    dtype = autocast_dtype(x.device)
    return weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype
