"""The launchers of the softmax, and their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...contract.mask import TILE
from ...spec.attention import AttentionOptions, SoftmaxOptions, four
from ...spec.operands import Softmax, SoftmaxBackward
from . import launch
from .launch import MAX_GRID_Y, Tile
from .softmax import (
    Gradients,
    Incoming,
    Operands,
    Origin,
    Results,
    Sizes,
    Strides,
    softmax_backward_kernel,
    softmax_forward_kernel,
)

# 32 elements per thread, over which the arithmetic of addresses, rows and the key is spread.
# Compiled for sm_90 in bf16, a forward of 1024 keys then takes 29.4 SASS instructions per element,
# in one warp; it takes 36.3 with 16 elements per thread, and 39.8 with four rows that four warps
# share. Not timed.
WARP_TILE = 1024
# How many keys a row may have to stay in registers, with 16 warps: backward with all operands in
# fp32 takes 113 registers. Longer rows go in chunks.
ROW_KEYS = 16384
CHUNK_KEYS = 8192


def tile(queries: int, keys: int) -> Tile:
    """The tile of both kernels; beyond ROW_KEYS keys it is a chunk of a row."""
    if keys > ROW_KEYS:
        return Tile(1, CHUNK_KEYS, CHUNK_KEYS // WARP_TILE)
    width = max(TILE, launch.next_power_of_2(keys))
    height = min(max(1, WARP_TILE // width), launch.next_power_of_2(max(1, queries)))
    return Tile(height, width, max(1, width // WARP_TILE))


class Rows:
    """Sizes, coordinates, tile and grid of calls; a program has queries of one head."""

    def __init__(
        self,
        shape: Sequence[int],
        options: AttentionOptions,
        tile_for: Callable[[int, int], Tile],
    ) -> None:
        batch, self.heads, self.queries, self.keys = four(shape)
        self.shape, self.options = tuple(shape), options
        at = options.origin
        self.origin = Origin(at[0], at[1], at[2], at[3] // TILE, at[3] % TILE)
        self.empty = math.prod(shape) == 0
        self.tile = tile_for(self.queries, self.keys + self.origin.shift)
        self.chunks = launch.cdiv(self.keys + self.origin.shift, self.tile.cols)
        blocks = launch.cdiv(self.queries, self.tile.rows)
        # Neighbouring programs have the same queries of different heads, so that an attention mask
        # that heads share is still in the cache.
        self.grid = (batch * self.heads, min(blocks, MAX_GRID_Y), launch.cdiv(blocks, MAX_GRID_Y))

        # Blocks that divide the matrix need no bounds check.
        self.whole = (
            self.origin.shift == 0
            and self.keys == self.chunks * self.tile.cols
            and self.queries == self.grid[1] * self.grid[2] * self.tile.rows
        )

    def layout(
        self, scores: Tensor, mask: Tensor | None, dout: Tensor | None
    ) -> tuple[Sizes, Strides, int]:
        """(sizes, strides, number of elements that lie aligned in every row), for the kernels."""
        scores_strides, mask_strides, dout_strides = (
            (0,) * len(self.shape) if t is None else t.expand(self.shape).stride()
            for t in (scores, mask, dout)
        )
        strides = (scores_strides, mask_strides, dout_strides)
        leading = tuple(zip(self.shape[:-2], *(s[:-2] for s in strides), strict=True))
        aligned = math.gcd(self.keys, *(n for s in strides for n in s[:-1]))
        return (
            Sizes(leading[::-1], self.heads, self.queries, self.keys, self.options.upper),
            Strides(scores_strides[-2], mask_strides[-2], mask_strides[-1], dout_strides[-2]),
            1 if aligned % 16 == 0 else math.gcd(8, aligned),
        )


rows = lru_cache(maxsize=4096)(Rows)  # a model makes the same calls in every step


def softmax_forward(
    operands: Softmax, options: SoftmaxOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel."""
    scores, mask, seed, p = operands
    plan = rows(scores.shape, options, tile)
    out = torch.empty(plan.shape, dtype=scores.dtype, device=scores.device)
    softmax = torch.empty_like(out) if options.return_softmax else None
    lse = torch.empty(plan.shape[:-1], dtype=torch.float32, device=scores.device)
    if plan.empty:
        return out, softmax, lse.fill_(-math.inf)
    scores = launch.adjacent(scores)
    sizes, strides, vector = plan.layout(scores, mask, None)
    launch.run(
        softmax_forward_kernel,
        plan,
        out.device,
        Results(out, softmax, lse),
        Operands(scores, mask, launch.vector(seed), launch.rate(p)),
        sizes,
        strides,
        plan.origin,
        options.threshold(),
        options.keep_scale(),
        options.scale,
        DROPS=p is not None or options.threshold() > 0,
        VECTOR=vector,
        WHOLE=plan.whole,
        CHUNKS=plan.chunks,
    )
    return out, softmax, lse


def softmax_backward(
    operands: SoftmaxBackward, options: SoftmaxOptions, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel."""
    dout, dsoftmax, scores, mask, lse, seed, p = operands
    plan = rows(scores.shape, options, tile)
    dscores_dtype, dmask_dtype = dtypes

    def like(dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        return torch.empty(plan.shape, dtype=dtype, device=scores.device)

    dscores, dmask = like(dscores_dtype), None
    if dmask_dtype is not None:
        assert mask is not None
        # If the mask is broadcast, its gradient is a sum, whose terms are fp32.
        dmask = like(dmask_dtype if mask.shape == scores.shape else torch.float32)
    if not plan.empty:
        scores = launch.adjacent(scores)
        dout = None if dout is None else launch.adjacent(dout)
        sizes, strides, vector = plan.layout(scores, mask, dout)
        launch.run(
            softmax_backward_kernel,
            plan,
            scores.device,
            Gradients(dscores, dmask),
            Incoming(dout, launch.vector(dsoftmax), launch.vector(lse)),
            Operands(scores, mask, launch.vector(seed), launch.rate(p)),
            sizes,
            strides,
            plan.origin,
            options.threshold(),
            options.keep_scale(),
            options.scale,
            DROPS=p is not None or options.threshold() > 0,
            VECTOR=vector,
            WHOLE=plan.whole,
            CHUNKS=plan.chunks,
        )
    if dmask is not None and mask is not None:
        dmask = dmask.sum_to_size(mask.shape).to(dmask_dtype)
    return dscores, dmask
