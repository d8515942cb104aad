"""Masks by compiled loops: twins of the functions of contract/mask.py, equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.memory import readable
from ...contract import mask
from ...contract.mask import LANES, Shard
from .memory import SEED, Reads
from .serving import kernels
from .threads import parts_of, share

_READS = Reads.of(SEED)


def decisions_of(
    where: mask.Coordinates, domain: str, t: int, factors: Tensor | None = None
) -> tuple[tuple[int, ...], Any]:
    """The tuple ``decisions`` of the kernels, and the tensors to whose memory it points.

    ``next_piece`` in loops/mask.py describes the tuple.
    """
    rows = mask.row_coordinates(where, "cpu") if where.leading and t else None
    group, lane = divmod(0 if where.col_shared else where.col_origin, LANES)
    places = 0 if rows is None else rows.data_ptr()
    by_row = 0 if factors is None else factors.data_ptr()
    found = (places, lane, group, mask.DOMAINS[domain] << 28, t - 1, by_row)
    return found, (rows, factors)


def decide(where: mask.Coordinates, columns: int, seed: Tensor, domain: str, t: int) -> Tensor:
    """The decisions on the first ``columns`` columns of all rows: bool."""
    keep = torch.empty((where.rows, columns), dtype=torch.bool, device="cpu")
    decisions, keep_alive = decisions_of(where, domain, t)
    given = (columns, decisions, keep.data_ptr())
    parts, held = parts_of(where.rows, columns), (keep, keep_alive)
    share(kernels().keep_rows, parts, (seed,), _READS, given, held)
    return keep


def keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    shared: Sequence[int] = (),
    shard: Shard | None = None,
    domain: str = "elements",
) -> Tensor:
    """:func:`tridrop.contract.mask.keep_mask`, by loops where the host can read the seed."""
    loops: Any = kernels() if readable(seed) else None
    t = 0 if loops is None else int(drop_threshold)
    if t == 0:
        return mask.keep_mask(
            seed, shape, drop_threshold, shared=shared, shard=shard, domain=domain
        )
    where = mask.coordinates(shape, shared, shard)
    if domain == "drop_path" and not where.col_shared:
        raise ValueError("the masks of drop_path are shared along the last dimension")
    columns = min(1, where.cols) if where.col_shared else where.cols
    keep = decide(where, columns, seed, domain, t)
    return keep.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    origin: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """:func:`tridrop.contract.mask.attention_keep_mask`, by loops in the same cases."""
    loops: Any = kernels() if readable(seed) else None
    t = 0 if loops is None else int(drop_threshold)
    if t == 0:
        return mask.attention_keep_mask(seed, shape, drop_threshold, origin=origin)
    batch, heads, queries, keys = shape
    rows = batch * heads * queries
    keep = torch.empty((rows, keys), dtype=torch.bool, device="cpu")
    domain, sizes = mask.DOMAINS["attention"] << 28, (heads, queries)
    given = (keys, sizes, domain, t - 1, tuple(origin), keep.data_ptr())
    share(loops.keep_scores, parts_of(rows, keys), (seed,), _READS, given, keep)
    return keep.view(tuple(shape))
