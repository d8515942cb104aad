"""What the kernels share: named tuples of arguments, and pure functions of tiles."""

from collections import namedtuple

import triton
import triton.language as tl

from .constant import Constant
from .mask import (
    DOMAIN_DROP_PATH,
    DOMAIN_ELEMENTS,
    ELEMENTS,
    LANES,
    NO_MASK,
    keep_elements,
    keep_rows,
    load_key,
    load_rate,
    row_coordinates,
)

# Grid axis 1 holds at most 65,535 column blocks; axis 2 continues where that is not enough.
MAX_GRID_Y = Constant(65535)

# Operands of both kernels; None where absent. `rate` is the (threshold, scale) pair on the device.
Operands = namedtuple("Operands", "x bias layer_scale residual seed rate")
# Sizes, and the strides between rows of x and of the second matrix that is read (the residual in
# forward, the gradient in backward). Columns always have stride 1.
Shape = namedtuple("Shape", "rows cols x_stride other_stride")
# Where the matrix lies in the contract's coordinates: mask.Coordinates.leading for elements and for
# drop_path, the first column's group, and the first column's index in that group.
Origin = namedtuple("Origin", "leading path_leading group shift")


@triton.jit
def to_float(x):
    """fp32 of a tile."""
    if x.dtype == tl.bfloat16:
        # LLVM merges this shift with the unpacking of a 32-bit word: one instruction per value,
        # where the conversion takes one and a half.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def first_of(block, size, BLOCK: tl.constexpr):
    """The first index of a block along a dimension of ``size``.

    Triton types sizes by their value: the product has 64 bits if the size needs them, and else 32.
    With 32 bits the indices of blocks behind the last one wrap to negative numbers.
    """
    return ((tl.zeros([], tl.int32) + size) * 0 + block) * BLOCK


@triton.jit
def columns(cols, origin, BLOCK_COLS: tl.constexpr):
    """The local columns of this program, [BLOCK_COLS], and the column groups of its masks."""
    return columns_at(tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y, cols, origin, BLOCK_COLS)


@triton.jit
def columns_at(block, cols, origin, BLOCK_COLS: tl.constexpr):
    """The columns of a block, and the column groups of their masks."""
    # A shard may begin inside a group. Tiles begin where groups begin, so some columns lie outside.
    col = first_of(block, cols, BLOCK_COLS) - origin.shift + tl.arange(0, BLOCK_COLS)
    # Groups are coordinates, which have 64 bits whatever the size of this piece.
    first = tl.cast(block, tl.int64) * (BLOCK_COLS // LANES)
    group = origin.group + first + tl.arange(0, BLOCK_COLS // LANES)
    return col, group


@triton.jit
def multiple_of(n, VECTOR: tl.constexpr):
    """``n``, a multiple of VECTOR, so that the compiler sees this and loads 16 bytes at once."""
    return n // VECTOR * VECTOR


@triton.jit
def in_bounds(row, col, rows, cols, WHOLE: tl.constexpr):
    if WHOLE:  # the blocks divide the matrix: the compiler drops the constant
        return tl.full([row.shape[0], col.shape[0]], 1, tl.int1)
    else:
        return (row < rows)[:, None] & ((col >= 0) & (col < cols))[None, :]


@triton.jit
def load_matrix(pointer, stride, row, col, inside):
    offsets = row[:, None] * stride + col[None, :]
    return to_float(tl.load(pointer + offsets, mask=inside, other=0.0))


@triton.jit
def load_vector(pointer, col, cols):
    inside = (col >= 0) & (col < cols)
    return to_float(tl.load(pointer + col, mask=inside, other=0.0))[None, :]


@triton.jit
def load_branch(operands, stride, cols, row, col, inside):
    """x + bias"""
    value = load_matrix(operands.x, stride, row, col, inside)
    if operands.bias is not None:
        value += load_vector(operands.bias, col, cols)
    return value


@triton.jit
def load_criterion(operands, threshold, scale, path_scale, MASK: tl.constexpr, PATH: tl.constexpr):
    """The Philox key, the elements' threshold and the product of the scales."""
    if MASK != NO_MASK:
        threshold, scale = load_rate(operands.rate, threshold, scale)
        if PATH:
            scale = scale * path_scale
    else:
        scale = path_scale
    return load_key(operands.seed), threshold, scale


@triton.jit
def keep_tile(
    row, group, origin, criterion, path_threshold, MAYBE_ZERO: tl.constexpr,
    MASK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Whether an element and its sample are kept: [BLOCK_ROWS, BLOCK_COLS or 1]."""
    keep = tl.full([row.shape[0], 1], 1, tl.int1)
    if MASK != NO_MASK:
        row_at = row_coordinates(row, origin.leading)
        if MASK == ELEMENTS:
            keep = keep_elements(
                row_at, group, criterion[0], criterion[1], MAYBE_ZERO, DOMAIN_ELEMENTS
            )
        else:
            keep = keep_rows(row_at, criterion[0], criterion[1], MAYBE_ZERO, DOMAIN_ELEMENTS)[
                :, None
            ]
    if PATH:
        row_at = row_coordinates(row, origin.path_leading)
        keep = (
            keep & keep_rows(row_at, criterion[0], path_threshold, False, DOMAIN_DROP_PATH)[:, None]
        )
    return keep


@triton.jit
def store_sum(pointer, total, col, cols, WIDTH: tl.constexpr):
    """Store a strip's sum over rows in its row of the partial sums [strips, WIDTH * cols]."""
    inside = (col >= 0) & (col < cols)
    offsets = tl.program_id(0).to(tl.int64) * cols * WIDTH + col
    tl.store(pointer + offsets, tl.sum(total, axis=0), mask=inside)
