"""Dropout in which each row says which row of a mask it takes: packed sequences, embeddings."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..contract.seeds import seed_for
from ..ops import DropRows, apply
from ..spec.elementwise import check_rate


def drop_rows(
    x: Tensor, rows: Tensor, p: float | Tensor, count: int, width: int, seed: int | Tensor | None
) -> Tensor:
    """``where(keep[rows], x * scale, 0)`` with the mask ``keep`` of shape [count, width].

    ``x`` is [..., last] and ``rows`` [...]; ``width`` is x's last size, or 1 for one decision per
    row. The arguments are checked already, and p is above 0.
    """
    check_rate(p, x.device)
    drawn = seed_for(x.device, seed)
    p_tensor, rate = (p, 0.0) if isinstance(p, Tensor) else (None, float(p))
    out: Tensor = apply(
        DropRows, x, rows, drawn, p_tensor, rate, count, width, backends.name_for(x.device)
    )
    return out
