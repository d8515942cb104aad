"""Products with a dropped matrix: LoRA's first product, and layers whose weights are dropped.

    forward     out_i = gain * drop_i(x) @ weight_i^T      x: [rows, cols], weight_i: [rank_i, cols]
    backward    dweight_i = gain * dout_i^T @ drop_i(x)
                dx = gain * sum over i of keep_i * (dout_i @ weight_i)

The matrices weight_i are stacked along the rows of ``weight``. x is read once for all of them. The
mask is applied in registers, between the load and the product; the masked tile then goes through
shared memory as an operand of the tensor cores. ``gain`` includes the masks' scale, unless only the
device knows it.
"""

import triton
import triton.language as tl

from .mask import DOMAIN_ELEMENTS, keep_elements, load_key, load_rate, row_coordinates
from .tiles import columns, columns_at, in_bounds, multiple_of


@triton.jit
def _with(tiles, tile):
    """The tuple with one more tile; Triton 3.6 cannot unpack a tuple with a star."""
    return tiles + (tile,)  # noqa: RUF005


@triton.jit
def _zeros(count: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tuple of ``count`` sums of zero."""
    sums = (tl.zeros([ROWS, COLS], tl.float32),)
    for _ in tl.static_range(1, count):
        sums = _with(sums, tl.zeros([ROWS, COLS], tl.float32))
    return sums


@triton.jit
def _load(pointer, stride, row, col, inside):
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _load_weight(operands, stride, first, rank, col, cols, RANK: tl.constexpr):
    """The weight's rows from first to first + rank: [RANK, BLOCK_COLS], 0 beyond."""
    at = tl.arange(0, RANK)
    inside = (at < rank)[:, None] & ((col >= 0) & (col < cols))[None, :]
    return _load(operands.weight, stride, (first + at).to(tl.int64), col, inside)


@triton.jit
def _keep(operands, which, row_at, group, threshold):
    """The mask ``which`` of a tile: bool, [BLOCK_ROWS, BLOCK_COLS]."""
    table: tl.constexpr = operands.rate is not None
    key = load_key(operands.seeds + 2 * which)
    return keep_elements(row_at, group, key, threshold, table, DOMAIN_ELEMENTS)


@triton.jit(do_not_specialize=["threshold"])
def product_kernel(
    out, operands, shape, origin, ranks, threshold: tl.int64, gain: tl.float32,
    MASKS: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The products of a block of rows, over CHUNK blocks of columns, in out [splits, rows, ranks].

    MASKS is the number of masks: 0, 1 for all products, or one per product.
    """
    cols = multiple_of(shape.cols, VECTOR)
    stride = multiple_of(shape.x_stride, VECTOR)
    dtype: tl.constexpr = operands.weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_at = row_coordinates(row, origin.leading)
    threshold, scale = load_rate(operands.rate, threshold, 1.0)

    sums = _zeros(len(ranks), BLOCK_ROWS, RANK)
    first_block = tl.program_id(1) * CHUNK
    for block in range(first_block, first_block + CHUNK):
        col, group = columns_at(block, cols, origin, BLOCK_COLS)
        inside = in_bounds(row, col, shape.rows, cols, WHOLE)
        x = _load(operands.x, stride, row, col, inside)
        kept = x
        added = ()
        first = 0
        for i in tl.static_range(len(ranks)):
            if i < MASKS:
                keep = _keep(operands, i, row_at, group, threshold)
                kept = tl.where(keep, x, tl.zeros_like(x))
            weight = _load_weight(operands, cols, first, ranks[i], col, cols, RANK)
            found = tl.dot(kept.to(dtype), tl.trans(weight), sums[i], input_precision=PRECISION)
            added = _with(added, found)
            first += ranks[i]
        sums = added

    gain = gain * scale
    total = 0
    for i in tl.static_range(len(ranks)):
        total += ranks[i]
    at = tl.arange(0, RANK)
    start = (tl.program_id(1).to(tl.int64) * shape.rows + row) * total
    first = 0
    for i in tl.static_range(len(ranks)):
        inside = (row < shape.rows)[:, None] & (at < ranks[i])[None, :]
        pointers = out + start[:, None] + (first + at)[None, :]
        tl.store(pointers, (sums[i] * gain).to(out.dtype.element_ty), mask=inside)
        first += ranks[i]


@triton.jit(do_not_specialize=["threshold"])
def product_backward_kernel(
    grad, gradients, operands, shape, origin, ranks,
    threshold: tl.int64, gain: tl.float32,
    MASKS: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The gradients for a block of columns and a strip of STRIP blocks of rows.

    ``gradients.weight`` receives the strip's sums, [strips, sum of ranks, cols] in fp32. A mask is
    drawn once for both gradients.
    """
    cols = multiple_of(shape.cols, VECTOR)
    stride = multiple_of(shape.x_stride, VECTOR)
    dtype: tl.constexpr = operands.weight.dtype.element_ty
    col, group = columns(cols, origin, BLOCK_COLS)
    threshold, scale = load_rate(operands.rate, threshold, 1.0)
    sums = _zeros(len(ranks), BLOCK_COLS, RANK)
    total = 0
    for i in tl.static_range(len(ranks)):
        total += ranks[i]
    at = tl.arange(0, RANK)
    gain = gain * scale

    first_block = tl.program_id(0).to(tl.int64) * STRIP
    for block in range(STRIP):
        row = (first_block + block) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_at = row_coordinates(row, origin.leading)
        inside = in_bounds(row, col, shape.rows, cols, WHOLE)
        x = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype)
        if gradients.weight is not None:
            x = _load(operands.x, stride, row, col, inside)
        kept = x
        keep = tl.full([BLOCK_ROWS, BLOCK_COLS], 1, tl.int1)
        dx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        added = ()
        first = 0
        for i in tl.static_range(len(ranks)):
            if i < MASKS:
                keep = _keep(operands, i, row_at, group, threshold)
                kept = tl.where(keep, x, tl.zeros_like(x))
            dout_inside = (row < shape.rows)[:, None] & (at < ranks[i])[None, :]
            dout = _load(grad, total, row, first + at, dout_inside)
            if gradients.weight is not None:
                found = tl.dot(tl.trans(kept.to(dtype)), dout, sums[i], input_precision=PRECISION)
                added = _with(added, found)
            if gradients.x is not None:
                weight = _load_weight(operands, cols, first, ranks[i], col, cols, RANK)
                if MASKS > 1:
                    found = tl.dot(dout, weight, input_precision=PRECISION)
                    dx += tl.where(keep, found, 0.0)
                else:  # all products share one mask, which is applied to the sum
                    dx = tl.dot(dout, weight, dx, input_precision=PRECISION)
            first += ranks[i]
        if gradients.weight is not None:
            sums = added
        if gradients.x is not None:
            # The last mask is applied in the layout of the store, which is that of the loads.
            rounded = (dx * gain).to(gradients.x.dtype.element_ty)
            if MASKS == 1:
                rounded = tl.where(keep, rounded, tl.zeros_like(rounded))
            pointers = gradients.x + row[:, None] * cols + col[None, :]
            tl.store(pointers, rounded, mask=inside)

    if gradients.weight is not None:
        start = tl.program_id(0).to(tl.int64) * total
        col_inside = ((col >= 0) & (col < cols))[None, :]
        first = 0
        for i in tl.static_range(len(ranks)):
            pointers = gradients.weight + (start + first + at)[:, None] * cols + col[None, :]
            tl.store(pointers, tl.trans(sums[i]) * gain, mask=(at < ranks[i])[:, None] & col_inside)
            first += ranks[i]
