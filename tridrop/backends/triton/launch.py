"""Launch settings of the Triton backend, and functions that its launchers share.

Settings are pure functions of sizes, without an autotuner, so that the first call is quick. Nothing
here depends on the device, so a sum over rows or columns has the same order on all NVIDIA GPUs;
AMD's GPUs have wider warps and sum in other trees. Sums in tensor cores, and attention's tiles
(gpu.py), differ between generations of GPUs. Masks depend on none of this.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...contract.mask import LANES, Coordinates, coordinates
from ...contract.noise import NOISES, rate_table
from ...spec.elementwise import Options
from . import mask
from .tiles import Operands, Origin, Shape

# 128 threads with 32 elements each: per thread and operand, four 16-byte loads of bf16 in flight
# and four Philox calls, over which the arithmetic of addresses and the key is spread. Compiled for
# sm_90 in bf16, residual + dropout(x) then takes 14.3 SASS instructions per element; with 16
# elements per thread it takes 16.7.
TILE = 4096
NUM_WARPS = 4
# A backward also has sums in registers; with 32 elements per thread it would use up to 255 of them.
REDUCTION_TILE = 2048
# How many columns a row of a norm may have to stay in registers: 16 warps with 32 elements per
# thread in forward, 8 with 16 in backward, which also holds four sums. Wider rows go in chunks.
ROW_FORWARD = 16384
ROW_BACKWARD = 4096
ROW_CHUNK = 4096
# The most fp32 partial sums for each gradient of a norm's vectors: 16 MiB.
ROW_SUMS = 1 << 22
# Row strips of a reduction, over all column blocks. They are enough programs for 132 processors
# with a few resident blocks each, and few enough that partial sums stay small beside the data. The
# number does not depend on the device, because the order of the sums must not.
REDUCTION_PROGRAMS = 512
# So many row blocks are summed by one program: a second launch, which would add the sums of
# several, takes longer than their few turns.
FEW_ROW_BLOCKS = 4
MAX_GRID_Y = 65535


class Tile(NamedTuple):
    """Rows and columns of a program's tile (powers of two, columns at least 8), and its warps."""

    rows: int
    cols: int
    num_warps: int


# Triton's own functions of these two names can also be called in kernels, which makes a call on the
# host as slow as making a small tensor: 2 microseconds.


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, a positive number."""
    return 1 << (n - 1).bit_length()


def tile(rows: int, cols: int, elements: int = TILE) -> Tile:
    """The tile for a matrix: as wide as the row length allows without idle columns."""
    widest = min(elements, max(LANES, next_power_of_2(max(1, cols))))
    narrowest = min(widest, 256)
    best = widest
    width = widest
    while width > narrowest:
        width //= 2
        if cdiv(cols, width) * width < cdiv(cols, best) * best:
            best = width
    return Tile(min(elements // best, next_power_of_2(max(1, rows))), best, NUM_WARPS)


def reduction_tile(rows: int, cols: int) -> Tile:
    """The tile of a backward that sums over rows."""
    return tile(rows, cols, REDUCTION_TILE)


def gated_reduction_tile(rows: int, cols: int) -> Tile:
    """The same for a gated activation, where a program holds two matrices, two gradients and three
    sums."""
    return tile(rows, cols, REDUCTION_TILE // 2)


def strip(row_blocks: int, col_blocks: int) -> int:
    """How many row blocks one program of a reduction sums: a power of two."""
    return _strip(row_blocks, row_blocks * col_blocks // REDUCTION_PROGRAMS)


def _strip(row_blocks: int, share: int) -> int:
    """A program's share of the row blocks, as a power of two: all of them if they are few."""
    return next_power_of_2(max(1, row_blocks if row_blocks <= FEW_ROW_BLOCKS else share))


class MaskArguments(NamedTuple):
    """The kernels' arguments about the masks."""

    arguments: tuple[int, float, int, float]  # threshold, scale, path_threshold, path_scale
    MASKS: tuple[int, bool, int]  # what the mask covers, whether drop_path drops, the noise's index
    rate: Tensor | None


class Plan:
    """Sizes, coordinates, tile and grid of the calls with these arguments.

    ``strips`` is a function of the number of row blocks and the number of column blocks (with
    ``whole_rows``, of columns), which gives how many row blocks one program works on. Each block of
    columns has its own program; with ``whole_rows`` it is a chunk, and one program works on all
    chunks of a row. With ``samples``, which all have equally many rows, all rows of a program
    belong to one sample: program i has sample i % samples.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        options: Options,
        tile_for: Callable[[int, int], Tile],
        strips: Callable[[int, int], int] | None,
        whole_rows: bool,
        samples: int | None,
    ) -> None:
        self.where: Coordinates = coordinates(shape, options.shared, options.shard)
        rows, cols = self.where.rows, self.where.cols
        self.empty = rows * cols == 0
        if samples is not None:
            rows //= max(1, samples)
        self.rows, self.samples = rows, 1 if samples is None else samples
        self.tile = tile_for(rows, cols)
        self.whole_rows = whole_rows
        self.shift = 0 if self.where.col_shared else self.where.col_origin % LANES
        self.row_blocks = cdiv(rows, self.tile.rows)
        self.col_blocks = cdiv(cols + self.shift, self.tile.cols)
        self.strip = 1
        if strips is not None and not self.empty:
            blocks = self.row_blocks * self.samples
            self.strip = strips(blocks, cols if whole_rows else self.col_blocks)
            if samples is not None:
                self.strip = min(self.strip, next_power_of_2(self.row_blocks))
        path: tuple[tuple[int, int, int], ...] = ()
        if options.drop_path:
            path = coordinates(shape, tuple(range(1, len(shape))), options.shard).leading
        self.origin = Origin(self.where.leading, path, self.where.col_origin // LANES, self.shift)
        self.element_mask = int(mask.ROWS if self.where.col_shared else mask.ELEMENTS)
        (elements, drop_path), (scale, path_scale) = options.thresholds(), options.scales()
        self.rates = (elements, scale, drop_path, path_scale)
        self.noise = options.noise
        covers = self.element_mask if elements > 0 else int(mask.NO_MASK)
        masks = (covers, drop_path > 0, NOISES.index(options.noise))
        self.masks = MaskArguments(self.rates, masks, None)

    @cached_property
    def strips(self) -> int:
        return self.samples * cdiv(self.row_blocks, self.strip)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        if self.whole_rows:
            return self.strips, 1, 1
        return (
            self.strips,
            min(self.col_blocks, MAX_GRID_Y),
            cdiv(self.col_blocks, MAX_GRID_Y),
        )

    def sizes(self, x_stride: int, other_stride: int) -> Shape:
        return Shape(self.rows, self.where.cols, x_stride, other_stride)

    @cached_property
    def whole(self) -> bool:
        """Whether the blocks divide the matrix, so that no bounds checks are needed."""
        rows, cols = self.rows, self.where.cols
        return (
            self.shift == 0 and cols % self.tile.cols == 0
            and rows % (self.tile.rows * self.strip) == 0
            and self.col_blocks == self.grid[1] * self.grid[2]
        )  # fmt: skip


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    options: Options,
    tile_for: Callable[[int, int], Tile],
    strips: Callable[[int, int], int] | None = None,
    whole_rows: bool = False,
    samples: int | None = None,
) -> Plan:
    """The :class:`Plan` of a call, cached, since a model makes the same calls in every step.

    The settings are arguments because tests and tuning replace them.
    """
    return Plan(shape, options, tile_for, strips, whole_rows, samples)


def row_tile(rows: int, cols: int) -> Tile:
    """The tile of whole rows: 16 elements per thread."""
    width = next_power_of_2(max(LANES, cols))
    height = min(max(1, REDUCTION_TILE // width), next_power_of_2(max(1, rows)))
    return Tile(height, width, min(16, max(1, width * height // 512)))


def norm_forward_tile(rows: int, cols: int) -> Tile:
    """The tile of the norm's forward; beyond ROW_FORWARD columns it is a chunk of a row."""
    return row_tile(rows, cols) if cols <= ROW_FORWARD else Tile(1, ROW_CHUNK, 8)


def norm_backward_tile(rows: int, cols: int) -> Tile:
    """The tile of the norm's backward; beyond ROW_BACKWARD columns it is a chunk of eight rows.

    The sums of a wide row do not fit the registers (with one tile of 8192 columns, 16 warps spilled
    440 bytes). So they are kept in memory, and are read and written once for eight rows.
    """
    if cols <= ROW_BACKWARD:
        return row_tile(rows, cols)
    return Tile(min(8, next_power_of_2(max(1, rows))), ROW_CHUNK // 8, 8)


def row_strip(row_blocks: int, cols: int) -> int:
    """How many row blocks one program of the norm's backward sums: a power of two.

    There are at most REDUCTION_PROGRAMS programs, and at most ROW_SUMS partial sums per gradient.
    """
    programs = max(1, min(REDUCTION_PROGRAMS, ROW_SUMS // cols))
    return _strip(row_blocks, cdiv(row_blocks, programs))


def partial_sums(
    plan: Plan, device: torch.device, *widths: int | None
) -> tuple[Tensor | None, ...]:
    """Empty tensors for partial sums, one row per strip, which the kernel fills completely."""
    return tuple(
        None if n is None else torch.empty((plan.strips, n), dtype=torch.float32, device=device)
        for n in widths
    )


def matrix(x: Tensor | None, cols: int) -> tuple[Tensor | None, int]:
    """``x`` for a kernel that reads rows of ``cols`` adjacent elements, and the stride of the rows.

    It is copied only if its strides allow no view as a matrix. An absent tensor has stride 0.
    """
    if x is None:
        return None, 0
    if x.is_contiguous():  # a kernel takes its address alone, and a view takes a microsecond
        return x, cols
    try:
        matrix = x.view(-1, cols)
    except RuntimeError:
        matrix = x.reshape(-1, cols)
    if matrix.stride(1) != 1 and cols != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0)


def vector_width(cols: int, *strides: int) -> int:
    """How many elements, up to 8, one load can take: consecutive ones, aligned in every row.

    It is also 1 where every size is a multiple of 16, which Triton sees by itself.
    """
    sizes = math.gcd(cols, *strides)
    return 1 if sizes % 16 == 0 else math.gcd(LANES, sizes)


def adjacent(t: Tensor) -> Tensor:
    """``t`` with adjacent elements in each row; a copy only if they are not adjacent."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def vector(v: Tensor | None) -> Tensor | None:
    """``v``, or a contiguous copy of it, for a kernel that reads it from its address on."""
    return None if v is None else v.contiguous()


def operands(
    matrix: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    masks: MaskArguments,
) -> Operands:
    """The kernels' operands; the two matrices are results of :func:`matrix`."""
    return Operands(matrix, vector(bias), vector(layer_scale), residual, vector(seed), masks.rate)


class Programs(Protocol):
    """The part of a plan that a launch needs."""

    @property
    def tile(self) -> Tile: ...

    @property
    def grid(self) -> tuple[int, int, int]: ...


def on(device: torch.device) -> torch.cuda.device:
    """A block that makes ``device`` the current device, on which Triton launches."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


# A product and a sum become one instruction, with one rounding. This is Triton's default up to 3.9,
# which warns, if the option is not set, that 3.10 will have another default, slower and with other
# last bits.
OPTIONS = {"enable_fp_fusion": True}


def run(kernel: Any, plan: Programs, device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel for a plan."""
    with on(device):
        kernel[plan.grid](
            *args,
            **constants,
            BLOCK_ROWS=plan.tile.rows,
            BLOCK_COLS=plan.tile.cols,
            num_warps=plan.tile.num_warps,
            **OPTIONS,
        )


def rate(p: Tensor | None, noise: str = "mask") -> Tensor | None:
    """The pair (threshold, scale) on the device, for a p whose value only the device knows."""
    return None if p is None else rate_table(noise, p)


def mask_arguments(plan: Plan, p: Tensor | None) -> MaskArguments:
    """The masks' arguments of a call; ``p`` is a rate that only the device knows."""
    if p is None:
        return plan.masks
    _, path, noise = plan.masks.MASKS
    return MaskArguments(plan.rates, (plan.element_mask, path, noise), rate(p, plan.noise))


def why_not(device: torch.device, dtypes: list[torch.dtype]) -> str | None:
    """Why the Triton backend cannot serve such data, or None where it can."""
    if torch.float64 in dtypes:
        return (
            "float64 runs on the reference backend only (Triton kernels compute in fp32): "
            "use tridrop.backend('reference')"
        )
    if device.type == "cuda":
        return None
    if device.type == "cpu" and interpreting():
        return None
    return (
        f"Triton cannot run on {device}: use a CUDA tensor, tridrop.backend('reference'), or, to "
        "run the kernels slowly on a CPU, set TRITON_INTERPRET=1 in the environment before the "
        "first import of triton"
    )


def interpreting() -> bool:
    """Whether the kernels of this process run in Triton's interpreter."""
    return type(mask.philox).__name__ == "InterpretedFunction"


def target() -> str:
    """How the kernels run, for reports."""
    if interpreting():
        return f"interpreter (TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')})"
    return "compiled"
