"""The dropout mask of attention, and the bits of elements; their mask is in elementwise.py."""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract.mask import TILE
from ...spec.attention import AttentionOptions
from . import launch
from .launch import Tile
from .mask import DOMAIN_ELEMENTS, bits_of, keep_scores, load_key, load_rate
from .tiles import MAX_GRID_Y, in_bounds

# The sizes of the mask, without the batch.
Scores = namedtuple("Scores", "heads queries keys")
# The contract's coordinates of the first element: batch, head and query; the tile of 32 keys in
# which the first key lies, and the first key's index in the tile.
Start = namedtuple("Start", "batch head query tile shift")


def tile(queries: int, keys: int) -> Tile:
    """The tile for masks of that many queries and keys; keys a multiple of 32."""
    # 32 elements per thread. With 64 the kernel spilled for odd row lengths, stored byte by byte.
    return Tile(
        min(32, triton.next_power_of_2(queries)),
        min(128, max(TILE, triton.next_power_of_2(keys))),
        4,
    )


@triton.jit(do_not_specialize=["threshold"])
def attention_keep_mask_kernel(
    out, seed, rate, shape, start, threshold: tl.int64,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The mask, [batch, heads, queries, keys]: 1 where a probability is kept."""
    blocks = tl.cdiv(shape.queries, BLOCK_ROWS)
    # Numbers have 64 bits from here on, since queries times keys alone may exceed 2^32.
    slice_of = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_ROWS
    block = (tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y).to(tl.int64)
    query = first + tl.arange(0, BLOCK_ROWS)
    # A shard may begin inside a tile of 32 keys. Blocks begin where tiles begin, so some keys of
    # the first block lie outside.
    key = block * BLOCK_COLS - start.shift + tl.arange(0, BLOCK_COLS)

    threshold, _ = load_rate(rate, threshold, 1.0)
    where = (slice_of // shape.heads + start.batch, slice_of % shape.heads + start.head)
    tile = block * (BLOCK_COLS // 32) + start.tile
    keep = keep_scores(
        first + start.query, tile, where, load_key(seed), threshold, True, BLOCK_ROWS, BLOCK_COLS
    )
    row = slice_of * shape.queries + query
    offsets = row[:, None] * shape.keys + key[None, :]
    tl.store(out + offsets, keep, mask=in_bounds(query, key, shape.queries, shape.keys, False))


def attention_keep_mask(
    seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Launch the kernel; see ``backends.protocol.Backend.attention_keep_mask``."""
    out = torch.empty(shape, dtype=torch.bool, device=seed.device)
    if out.numel() == 0:
        return out
    batch, heads, queries, keys = shape
    at, head, query, key = options.origin
    shift = key % TILE
    rows, cols, num_warps = tile(queries, keys + shift)
    col_blocks = launch.cdiv(keys + shift, cols)
    grid_y = min(col_blocks, launch.MAX_GRID_Y)
    grid = (batch * heads * launch.cdiv(queries, rows), grid_y, launch.cdiv(col_blocks, grid_y))
    with launch.on(seed.device):
        attention_keep_mask_kernel[grid](
            out,
            launch.vector(seed),
            launch.rate(p),
            Scores(heads, queries, keys),
            Start(at, head, query, key // TILE, shift),
            options.threshold(),
            BLOCK_ROWS=rows,
            BLOCK_COLS=cols,
            num_warps=num_warps,
            **launch.OPTIONS,
        )
    return out


@triton.jit
def decision_bits_kernel(
    out, seed, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """The bits of the decisions, [rows, cols]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = (tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y).to(tl.int64)
    group = block * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)
    col = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    bits = bits_of(row, group, load_key(seed), DOMAIN_ELEMENTS)
    offsets = row[:, None] * cols + col[None, :]
    tl.store(out + offsets, bits.to(tl.int64), mask=in_bounds(row, col, rows, cols, False))


def decision_bits(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Launch the kernel; see ``backends.protocol.Backend.decision_bits``."""
    out = torch.empty(shape, dtype=torch.int64, device=seed.device)
    if out.numel() == 0:
        return out
    cols = shape[-1] if shape else 1
    rows = out.numel() // cols
    # 8 elements per thread, which are one Philox call.
    block_cols = min(256, max(8, launch.next_power_of_2(cols)))
    block_rows = 1024 // block_cols
    col_blocks = launch.cdiv(cols, block_cols)
    grid_y = min(col_blocks, launch.MAX_GRID_Y)
    grid = (launch.cdiv(rows, block_rows), grid_y, launch.cdiv(col_blocks, grid_y))
    with launch.on(seed.device):
        decision_bits_kernel[grid](
            out,
            launch.vector(seed),
            rows,
            cols,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=4,
            **launch.OPTIONS,
        )
    return out
