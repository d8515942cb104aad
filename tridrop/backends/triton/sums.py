"""The last stage of a sum over rows: it adds partial sums in an order that depends on sizes alone.

torch.sum splits a dimension by the number of multiprocessors, so its last bits may differ between
GPUs. And where the result is not fp32 it would be two launches, the sum and the conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import Tile
from .tiles import first_of

# 16 elements per thread, as in launch.row_tile. With at most 128 strips at a time, a tile has at
# least 16 columns, which are two sectors of memory, and 4096 columns make 256 programs.
STRIPS = 128


class _Programs(NamedTuple):
    tile: Tile
    grid: tuple[int, int, int]


def tile(strips: int, cols: int) -> Tile:
    """The tile of partial sums: a function of their sizes alone."""
    height = min(STRIPS, launch.next_power_of_2(strips))
    width = min(launch.REDUCTION_TILE // height, launch.next_power_of_2(cols))
    return Tile(height, width, launch.NUM_WARPS)


@triton.jit
def sum_kernel(
    outs, partials, strips, cols,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = sum over the strips of partial, rounded once, for each pair of out and partial.

    There are COUNT pairs, of outs in one dtype. A partial is [strips, cols] in fp32.
    """
    out, partial = outs[0], partials[0]
    for i in tl.static_range(1, COUNT):
        if tl.program_id(1) == i:
            out, partial = outs[i], partials[i]
    col = first_of(tl.program_id(0), cols, BLOCK_COLS) + tl.arange(0, BLOCK_COLS)
    inside = (col >= 0) & (col < cols)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in range(0, strips, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        offsets = row.to(tl.int64)[:, None] * cols + col[None, :]
        needed = (row < strips)[:, None] & inside[None, :]
        total += tl.load(partial + offsets, mask=needed, other=0.0)
    tl.store(out + col, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def totals(
    partials: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """The sums over the first dimension of each partial, in its dtype; None where either is None.

    Partials of equal sizes, for one dtype, are summed by one launch. A sum over no strips is zero,
    and a partial with one strip is the sum.
    """
    found: list[Tensor | None] = [None] * len(partials)
    pairs: dict[tuple[int, int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for i, (partial, dtype) in enumerate(zip(partials, dtypes, strict=True)):
        if partial is None or dtype is None:
            continue
        if partial.shape[0] == 1:
            found[i] = partial[0].to(dtype)
            continue
        found[i] = out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
        strips, cols = partial.shape[0], out.numel()
        if strips * cols == 0:
            out.zero_()
        else:
            pairs.setdefault((strips, cols, dtype), []).append((out, partial))
    for (strips, cols, _), given in pairs.items():
        size = tile(strips, cols)
        programs = _Programs(size, (launch.cdiv(cols, size.cols), len(given), 1))
        outs, ours = zip(*given, strict=True)
        launch.run(sum_kernel, programs, outs[0].device, outs, ours, strips, cols, COUNT=len(given))
    return found
