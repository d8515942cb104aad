"""The launchers of products with a dropped matrix."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.operands import Product, ProductBackward
from ...spec.product import ProductOptions
from . import launch
from .launch import Tile
from .product import product_backward_kernel, product_kernel
from .sums import totals

# x is [rows, cols]; `rate` is the (threshold, scale) pair on the device if p is a tensor.
Matrices = namedtuple("Matrices", "x weight seeds rate")
MatrixGradients = namedtuple("MatrixGradients", "x weight")

# Programs of a forward: two for each of 132 processors. Where rows make fewer programs, the columns
# are split too, and the partial sums are added afterwards in a fixed order.
PROGRAMS = 264
MIN_CHUNK = 512  # the fewest columns of a split
# With more sums per column than this, padding included, backward is one launch per gradient: a
# single launch would spill registers (sm_80: 104 bytes for three adapters of rank 32, 650 for one
# of rank 256).
TOGETHER = 64


class _Programs(NamedTuple):
    tile: Tile
    grid: tuple[int, int, int]


def padded(ranks: tuple[int, ...]) -> int:
    """The rows of each product, padded to a power of two and at least 16 for the tensor cores."""
    return max(16, launch.next_power_of_2(max(ranks)))


@lru_cache(maxsize=256)
def forward_tile(width: int, masks: int, itemsize: int) -> Callable[[int, int], Tile]:
    """The tile of x where a row has ``width`` sums, padding included.

    Several masks are drawn at the same time, and 64 elements per thread would then spill registers.
    """

    def tile_for(rows: int, cols: int) -> Tile:
        widest = 128 if width <= 64 and masks == 1 and itemsize == 2 else 64
        return Tile(64, min(widest, _cols(width, itemsize)), 4 if width <= 128 else 8)

    return tile_for


@lru_cache(maxsize=256)
def backward_tile(width: int, masks: int, itemsize: int) -> Callable[[int, int], Tile]:
    """The same for backward, where a column has ``width`` sums."""

    def tile_for(rows: int, cols: int) -> Tile:
        return Tile(64, min(64, _cols(width, itemsize)), 4 if width <= 128 and masks == 1 else 8)

    return tile_for


def _cols(width: int, itemsize: int) -> int:
    """The columns of a tile, a power of two for which the pipeline fits the shared memory."""
    return 1 << (max(16, 128 * 128 // max(128, width * itemsize)).bit_length() - 1)


def chunk(row_blocks: int, col_blocks: int, block_cols: int) -> int:
    """How many column blocks one program of a forward sums: a power of two, or all of them."""
    wanted = launch.cdiv(PROGRAMS, max(1, row_blocks))
    size = launch.next_power_of_2(launch.cdiv(col_blocks, wanted))
    return min(col_blocks, max(size, MIN_CHUNK // block_cols))


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied; torch's own setting decides, as for its products."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _mask_arguments(
    plan: launch.Plan, p: Tensor | None, options: ProductOptions
) -> tuple[int, int, float]:
    """(number of masks, threshold, factor of the sums).

    If p is a tensor, the kernel reads the threshold and the masks' scale from a table.
    """
    threshold, scale, *_ = plan.rates
    if p is not None:
        return options.masks, threshold, options.gain
    if threshold == 0:
        return 0, threshold, options.gain
    return options.masks, threshold, options.gain * scale


def product_forward(operands: Product, options: ProductOptions) -> Tensor:
    """Launch the forward kernel."""
    x, weight, seeds, p = operands
    rank = padded(options.ranks)
    plan = launch.plan(
        tuple(x.shape),
        options,
        forward_tile(rank * len(options.ranks), options.masks, weight.itemsize),
    )
    out_shape = (*x.shape[:-1], weight.shape[0])
    if plan.empty:
        return torch.zeros(out_shape, dtype=weight.dtype, device=x.device)
    size = chunk(plan.row_blocks, plan.col_blocks, plan.tile.cols)
    splits = launch.cdiv(plan.col_blocks, size)
    dtype = weight.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, plan.where.rows, weight.shape[0]), dtype=dtype, device=x.device)
    matrix, stride = launch.matrix(x, plan.where.cols)
    weight = weight.contiguous()
    masks, threshold, gain = _mask_arguments(plan, p, options)
    launch.run(
        product_kernel,
        _Programs(plan.tile, (plan.row_blocks, splits, 1)),
        out.device,
        out,
        Matrices(matrix, weight, launch.vector(seeds), launch.rate(p)),
        plan.sizes(stride, 0),
        plan.origin,
        options.ranks,
        threshold,
        gain,
        MASKS=masks,
        WHOLE=plan.whole and plan.col_blocks % size == 0,
        VECTOR=launch.vector_width(plan.where.cols, stride),
        PRECISION=precision(weight.dtype),
        RANK=rank,
        CHUNK=size,
    )
    (whole,) = totals((out,), (weight.dtype,))
    assert whole is not None
    return whole.view(out_shape)


def product_backward(
    operands: ProductBackward, options: ProductOptions, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward kernel."""
    grad, x, weight, seeds, p = operands
    rank = padded(options.ranks)
    if all(needs) and rank * len(options.ranks) > TOGETHER:
        dx, _ = product_backward(operands, options, (True, False))
        return dx, product_backward(operands, options, (False, True))[1]
    tile_for = backward_tile(rank * len(options.ranks), options.masks, weight.itemsize)
    plan = launch.plan(tuple(x.shape), options, tile_for, launch.strip if needs[1] else None)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if plan.empty:
        return dx, torch.zeros_like(weight) if needs[1] else None
    partial = None
    if needs[1]:
        shape = (plan.strips, *weight.shape)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    grad = grad.reshape(-1, weight.shape[0]).contiguous()
    matrix, stride = launch.matrix(x, plan.where.cols)
    weight = weight.contiguous()
    masks, threshold, gain = _mask_arguments(plan, p, options)
    launch.run(
        product_backward_kernel,
        plan,
        x.device,
        grad,
        MatrixGradients(dx, partial),
        Matrices(matrix, weight, launch.vector(seeds), launch.rate(p)),
        plan.sizes(stride, 0),
        plan.origin,
        options.ranks,
        threshold,
        gain,
        MASKS=masks,
        WHOLE=plan.whole,
        VECTOR=launch.vector_width(plan.where.cols, stride),
        PRECISION=precision(weight.dtype),
        RANK=rank,
        STRIP=plan.strip,
    )
    (dweight,) = totals((partial,), (weight.dtype,))
    return dx, dweight
