"""The tiles of the attention kernels: pure functions of sizes and of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .gpu import Gpu


class Tile(NamedTuple):
    """Queries and keys of a tile (keys a multiple of 32), warps and pipeline stages.

    ``reload``: the kernel for the gradients of keys loads keys and values again for each block of
    queries. ``ahead``: forward draws a block's mask while the products of the block before are
    running. ``apart``: the kernel for the gradients of keys shares no address between a loop and
    what follows it. ``special``: forward is specialised, with these bounds in its loop.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    reload: bool = False
    ahead: bool = False
    apart: bool = False
    special: int | None = None


# The tiles were found from the machine code (docs/design.md has the figures). For bf16 at head
# dimensions 64 and 128 they are the largest that spill no register, or nearly none in backward; for
# wider heads they are what fits the shared memory: 227 KiB, or the 99 KiB of the smallest GPU.
#
# On Hopper a product runs asynchronously while its warps do something else. A loop with two stages
# waits at once for the load that it has just started; three stages keep a block of keys and values
# in flight for a whole turn. The forward there draws a block's mask after the products of the block
# before: if it is written before them, ptxas moves it behind the wait. On other GPUs a product
# occupies its warp, and drawing ahead would only take registers. An attention mask takes registers
# and shared memory, so with one a tile of forward has half as many keys.
#
# Two kernels spill at 128 with dropout. On sm_90 it is that for the gradients of keys where
# attention is causal: 120 bytes per thread, six reloads among the 751 instructions of the loop
# without bounds. On sm_100 it is the forward: 368 bytes, none of them in that loop. With one stage
# instead of two neither spills (24.0 instructions per score instead of 23.5, and 15.1 instead of
# 15.2), but then no load is asynchronous. Only a GPU can tell what that costs (benchmarks/tune.py).


def _first_that_fits(tiles: Sequence[Tile], room: int, needs: Callable[[Tile], int]) -> Tile:
    """The first tile that needs at most ``room`` bytes of shared memory, or else the last one."""
    return next((tile for tile in tiles if needs(tile) <= room), tiles[-1])


def _forward_needs(tile: Tile, width: int, element_size: int, mask: int) -> int:
    """Bytes of shared memory that a program of forward needs on Hopper."""
    loaded = 2 * tile.keys * width * element_size
    masks = (tile.num_stages - 1) * tile.queries * tile.keys * mask
    return tile.queries * width * element_size + tile.num_stages * loaded + masks


def _dquery_needs(tile: Tile, width: int, element_size: int, mask: int) -> int:
    """The same for the gradient of queries, whose programs hold dout as well."""
    return _forward_needs(tile, width, element_size, mask) + tile.queries * width * element_size


def forward_tile(width: int, element_size: int, target: Gpu, mask: int = 0) -> Tile:
    """The forward's tile; ``width`` is the larger of the two padded head dimensions.

    ``mask`` is the size of an element of the attention mask, 0 without one.
    """
    if element_size == 4:
        return Tile(32, 32, 4, 2) if width <= 128 else Tile(16, 32, 8, 1)
    if width > 128:
        return Tile(128, 64, 8, 2) if target.generation >= 90 else Tile(32, 32, 4, 2)
    if target.generation != 90:
        return Tile(128, 128 if target.generation > 90 else 64, 8, 2)
    smaller = (Tile(128, 64, 8, 3, ahead=True), Tile(128, 64, 8, 2, ahead=True))
    larger = (Tile(128, 128, 8, 3, ahead=True), Tile(128, 128, 8, 2, ahead=True))
    return _first_that_fits(
        smaller if mask else (*larger, *smaller),
        target.shared,
        lambda tile: _forward_needs(tile, width, element_size, mask),
    )


def dquery_tile(width: int, element_size: int, target: Gpu, mask: int = 0) -> Tile:
    """The tile for the gradients of queries and of the attention mask; ``mask`` as in forward."""
    if element_size == 4:
        return Tile(32 if width <= 64 else 16, 32, 4, 1)
    if target.generation == 90 and width <= 128:
        return _first_that_fits(
            (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
            target.shared,
            lambda tile: _dquery_needs(tile, width, element_size, mask),
        )
    if width <= 64 or (width <= 128 and target.generation >= 90):
        return Tile(128, 64, 8, 2)
    return Tile(128, 32, 8, 1) if width <= 128 or target.generation >= 90 else Tile(64, 32, 8, 1)


def dkey_tile(width: int, element_size: int, target: Gpu) -> Tile:
    """The tile for the gradients of keys and values."""
    if element_size == 4:
        tile = Tile(32 if width <= 128 else 16, 32, 4 if width <= 64 else 8, 1)
        # On NVIDIA's GPUs the operands of products in fp32 lie in shared memory: keys, values,
        # queries and gradients; with TF32 the last two lie there twice, once transposed. At 256
        # columns that is 131,072 bytes, or 102,400 with the scores where products are exact, but
        # some GPUs have only 99 KiB. With ``reload`` it is 65,536, or up to 99,328.
        needed = (2 * tile.queries + tile.keys) * 2 * width * element_size
        return tile._replace(reload=target.generation > 0 and needed > target.shared)
    if target.generation == 90:
        # At 256 columns ``apart`` would change no wait, and 707 instructions of a causal loop would
        # run while no product is in flight, instead of 595.
        if width <= 64:
            return Tile(64, 64, 4, 3, apart=True)
        return Tile(128, 64, 8, 2, apart=True) if width <= 128 else Tile(128, 32, 8, 2)
    if width <= 64:
        return Tile(64, 64, 4, 2)
    if width <= 128:
        if target.generation == 100:
            # 128 x 64 with one stage takes 30.1 instructions per score; where attention is causal,
            # 29.2, and it spills 160 bytes. This tile takes 27.4 and 25.3, spills nothing and loads
            # ahead. With an attention mask in fp32 it needs 230,400 of the 232,448 bytes of shared
            # memory.
            return Tile(64, 128, 8, 2)
        return Tile(32, 64, 4, 1)
    return Tile(32, 32, 4, 1)
