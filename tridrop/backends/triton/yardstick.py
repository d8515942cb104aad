"""A yardstick, not an op: dropout + add as it is usually written, with one Philox call per element.

``tridrop inspect`` compiles it beside the kernels of the package, to show what it saves to share a
call among eight elements. Nothing else uses it. Its masks are not those of the contract, and it has
neither shards nor shared masks, and takes whole blocks only. Tile, loads and Philox are those of
the elementwise kernels, so that the number of calls is the only difference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.elementwise import Options
from . import launch
from .mask import load_key, philox
from .tiles import MAX_GRID_Y, first_of, to_float


@triton.jit(do_not_specialize=["threshold"])
def naive_kernel(
    out, x, residual, seed, cols, threshold: tl.int64, scale: tl.float32,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = residual + where(keep, x, 0) * scale, whole blocks."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    block = tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y
    col = (first_of(block, cols, BLOCK_COLS) + tl.arange(0, BLOCK_COLS))[None, :]
    key = load_key(seed)
    zero = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.uint32)
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    word, _, _, _ = philox(zero + col.to(tl.uint32), low, high, zero, key[0], key[1])
    keep = word > (threshold - 1).to(tl.uint32)
    offsets = row * cols + col
    value = tl.where(keep, to_float(tl.load(x + offsets)), 0.0)
    if residual is not None:
        stream = to_float(tl.load(residual + offsets))
        value = tl.fma(value, tl.zeros_like(value) + scale, stream)
    else:
        value = value * scale
    tl.store(out + offsets, value.to(out.dtype.element_ty))


def naive(x: Tensor, residual: Tensor | None, seed: Tensor, options: Options) -> Tensor:
    """Launch the yardstick, for a contiguous matrix that whole blocks divide."""
    plan = launch.plan(tuple(x.shape), options, launch.tile)
    if not plan.whole:
        raise ValueError(f"the yardstick takes whole blocks of {plan.tile}, not {tuple(x.shape)}")
    out = torch.empty_like(x)
    launch.run(
        naive_kernel,
        plan,
        x.device,
        out,
        x,
        residual,
        seed,
        plan.where.cols,
        options.thresholds()[0],
        options.scales()[0],
    )
    return out
