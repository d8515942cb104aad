"""The launchers of attention, which decide tiles, strides and features by sizes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract.mask import TILE
from ...spec.attention import HEAD_DIM_LIMIT, AttentionInputs, AttentionOptions, empty_output
from ...spec.operands import AttentionBackward, inputs_of
from . import gpu, launch
from .attention import attention_forward_kernel
from .attention_backward import (
    Incoming,
    attention_delta_kernel,
    attention_dkey_kernel,
    attention_dmask_kernel,
    attention_dquery_kernel,
)
from .attention_tiles import (
    Blocks,
    Factors,
    Features,
    Layout,
    Origin,
    Problem,
    Shape,
    Strides,
    Tensors,
)
from .gpu import Gpu


class Tile(NamedTuple):
    """Queries and keys of a tile (keys a multiple of 32), warps and pipeline stages.

    ``reload``: the kernel for the gradients of keys loads keys and values again for each block of
    queries. ``ahead``: forward draws a block's mask while the products of the block before are
    running. ``loop``: the kernel for the gradients of keys keeps its loop over query heads even
    where there is only one.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    reload: bool = False
    ahead: bool = False
    loop: bool = False


# Up to this length, sums and differences of positions fit 32 bits, also for a tile's last row.
LENGTH_LIMIT = (1 << 30) - (1 << 10)


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
# attention is causal: 112 bytes per thread, six reloads among the 742 instructions of the loop
# without bounds. On sm_100 it is the forward: 368 bytes, none of them in that loop. With one stage
# instead of two neither spills (24.0 instructions per score instead of 23.2, and 15.1 instead of
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


def dkey_tile(width: int, element_size: int, target: Gpu, mask: int = 0) -> Tile:
    """The tile for the gradients of keys and values; ``mask`` as in forward."""
    if element_size == 4:
        tile = Tile(32 if width <= 128 else 16, 32, 4 if width <= 64 else 8, 1)
        # On NVIDIA's GPUs the operands of products in fp32 lie in shared memory: keys, values,
        # queries and gradients; with TF32 the last two lie there twice, once transposed. At 256
        # columns that is 131,072 bytes, or 102,400 with the scores where products are exact, but
        # some GPUs have only 99 KiB. With ``reload`` it is 65,536, or up to 99,328.
        needed = (2 * tile.queries + tile.keys) * 2 * width * element_size
        return tile._replace(reload=target.generation > 0 and needed > target.shared)
    # If the compiler knows that a loop has one turn, it removes the loop, and in the remaining code
    # ptxas waits for each product separately (warning C7515), except where there is an upper bound.
    # At 128 without an attention mask it does not wait, and the loop would only take registers.
    loop = target.generation == 90 and (width <= 64 or mask > 0)
    if width <= 64:
        return Tile(64, 64, 4, 2, loop=loop)
    if width <= 128:
        if target.generation == 100:
            # 128 x 64 with one stage takes 30.1 instructions per score; where attention is causal,
            # 29.2, and it spills 160 bytes. This tile takes 27.4 and 25.3, spills nothing and loads
            # ahead. With an attention mask in fp32 it needs 230,400 of the 232,448 bytes of shared
            # memory.
            return Tile(64, 128, 8, 2)
        if target.generation == 90:
            return Tile(128, 64, 8, 2, loop=loop)
        return Tile(32, 64, 4, 1)
    return Tile(128, 32, 8, 2) if target.generation == 90 else Tile(32, 32, 4, 1)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides in elements; 0 along dimensions of size 1, along which a mask is broadcast."""
    if t is None:
        return ()
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


class Call:
    """The arguments that the launches of one call share."""

    def __init__(self, inputs: AttentionInputs, options: AttentionOptions) -> None:
        query, key, value = (launch.adjacent(t) for t in (inputs.query, inputs.key, inputs.value))
        width, value_width = query.shape[-1], value.shape[-1]
        if max(width, value_width) > HEAD_DIM_LIMIT:
            raise ValueError(
                f"query and value have head dimensions {width} and {value_width}; the Triton "
                f"backend takes up to {HEAD_DIM_LIMIT}: use tridrop.backend('reference')"
            )
        # The kernels take the maximum of the products before they scale it, so the scale must not
        # be negative.
        self.sign = -1.0 if options.scale < 0 else 1.0
        if self.sign < 0:
            query = -query
        self.device, self.dtype = query.device, query.dtype
        self.packed = inputs.cu_query is not None
        self.batch = query.shape[0]
        if inputs.cu_query is not None:
            self.batch = inputs.cu_query.shape[0] - 1
        heads, tokens = query.shape[1:3]
        self.queries = options.max_query if self.packed else tokens
        self.keys = options.max_key if self.packed else key.shape[2]
        if max(self.queries, self.keys) > LENGTH_LIMIT:
            raise ValueError(
                f"{self.queries} queries and {self.keys} keys; the Triton backend takes up to "
                f"{LENGTH_LIMIT} of each: call it for parts of the queries with shard=, or use "
                "tridrop.backend('reference')"
            )
        self.heads, self.shared_heads = heads, key.shape[1]
        drops = inputs.p is not None or options.threshold() > 0
        shift = options.origin[3] % TILE if drops else 0
        key_mask = None if inputs.key_mask is None else inputs.key_mask.contiguous()
        self.tensors = Tensors(
            query, key, value, inputs.mask, key_mask, launch.vector(inputs.sinks),
            launch.vector(inputs.cu_query), launch.vector(inputs.cu_key),
            inputs.seed if drops else None, launch.rate(inputs.p),
        )  # fmt: skip
        # A bound that excludes no score is left out, and one that excludes all scores is moved
        # close to them, so that its sums fit 32 bits.
        lower, upper = options.lower, options.upper
        lower = None if lower is None or lower <= -self.queries else min(lower, self.keys)
        upper = None if upper is None or upper >= self.keys else max(upper, -self.queries)
        self.shape = Shape(
            heads, heads // max(1, self.shared_heads), self.queries, self.keys, tokens, width,
            value_width, lower or 0, upper or 0,
        )  # fmt: skip
        batch, head, first, key_first = options.origin
        self.origin = Origin(batch, head, first, key_first // TILE, shift)
        self.factors = Factors(abs(options.scale), options.softcap)
        self.threshold, self.scale = options.threshold(), options.keep_scale()
        self.flags = {
            "LOWER": lower is not None,
            "UPPER": upper is not None,
            "SHIFTED": shift != 0,
            "DROPS": drops,
            "MAYBE_ZERO": inputs.p is not None,
            "SOFTCAP": options.softcap != 0,
            "PACKED": self.packed,
            # torch's own setting decides how fp32 is multiplied, as in torch.matmul.
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }

    @property
    def empty(self) -> bool:
        """Whether there is no score at all."""
        return self.batch * self.heads * self.queries * self.keys == 0

    def strides(self, out: Tensor) -> Strides:
        t = self.tensors
        key_mask = 0 if t.key_mask is None or t.key_mask.shape[0] == 1 else t.key_mask.stride(0)
        query, key, value, last = (_strides(x)[:2] for x in (t.query, t.key, t.value, out))
        return Strides(query, key, value, last, _strides(t.mask), key_mask)

    def launch(
        self, kernel: Any, tile: Tile, programs: int, out: Tensor, *args: Any, **more: Any
    ) -> None:
        """Launch a kernel with ``args`` and the problem; in backward, ``out`` is dout."""
        width, value_width = self.shape.width, self.shape.value_width
        t = self.tensors
        layout = Layout(
            *(n if n == _padded(n) else 0 for n in (width, value_width)),
            *(x.stride(2) for x in (t.query, t.key, t.value, out)),
        )
        strides = self.strides(out)
        steps = [*layout[2:], *strides.query, *strides.key, *strides.value, *strides.out]
        vector = 1 if math.gcd(16, *steps) == 16 else math.gcd(8, *steps)
        with launch.on(self.device):
            kernel[(programs,)](
                *args,
                Problem(t, strides, self.shape, self.origin, self.factors),
                self.threshold,
                self.scale,
                BLOCKS=Blocks(
                    tile.queries,
                    tile.keys,
                    _padded(width),
                    _padded(value_width),
                    tile.reload,
                    tile.ahead,
                    tile.loop,
                ),
                FEATURES=Features(**self.flags, VECTOR=vector),
                LAYOUT=layout,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **launch.OPTIONS,
                **more,
            )

    def query_blocks(self, tile: Tile) -> int:
        """The number of blocks of queries of all heads, one program each."""
        return launch.cdiv(self.queries, tile.queries) * self.heads * self.batch

    @property
    def mask_size(self) -> int:
        """Bytes of an element of the attention mask, 0 without one."""
        return 0 if self.tensors.mask is None else self.tensors.mask.element_size()

    def tile(self, tile_for: Any, *more: int) -> Tile:
        size = torch.finfo(self.dtype).bits // 8
        widest = max(_padded(self.shape.width), _padded(self.shape.value_width))
        found: Tile = tile_for(widest, size, gpu.of(self.device), *more)
        return found


def _padded(n: int) -> int:
    return max(16, launch.next_power_of_2(n))


def attention_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    out = empty_output(inputs.query, inputs.value.shape[-1])
    lse = inputs.query.new_empty(inputs.query.shape[:-1], dtype=torch.float32)
    call = Call(inputs, options)
    # No program writes packed tokens behind the last sequence.
    if call.packed or call.empty:
        out.zero_()
        lse.fill_(-math.inf)
    if call.empty:
        if inputs.sinks is not None and not call.packed:
            lse.copy_(inputs.sinks[None, :, None])  # a sink has a share, and no value
        return out, lse
    tile = call.tile(forward_tile, call.mask_size)
    call.launch(attention_forward_kernel, tile, call.query_blocks(tile), out, out, lse)
    return out, lse


def attention_backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernels."""
    dout, dlse, out, lse, *_ = operands
    inputs = inputs_of(operands)
    call = Call(inputs, options)
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    make = torch.zeros_like if call.packed or call.empty else torch.empty_like
    found = [
        make(t) if need and t is not None else None for t, need in zip(like, needs, strict=True)
    ]
    dquery, dkey, dvalue, dmask, _ = found
    dout, out = launch.adjacent(dout), launch.adjacent(out)
    delta = torch.empty_like(lse)
    if lse.numel():
        rows = 64
        with launch.on(call.device):
            attention_delta_kernel[(launch.cdiv(lse.shape[2], rows) * lse.shape[0] * call.heads,)](
                delta,
                out,
                dout,
                None if dlse is None else dlse.contiguous(),
                _strides(out)[:3],
                _strides(dout)[:3],
                call.shape,
                BLOCK=rows,
                VALUES=_padded(out.shape[-1]),
                **launch.OPTIONS,
            )
    if needs[4] and inputs.sinks is not None:
        sinks = inputs.sinks.float()[:, None]
        # The sink's probability in each row; a row outside of all sequences has lse = -inf.
        share = torch.where(lse == -math.inf, 0.0, torch.exp(sinks - lse))
        found[4] = -(share * delta).sum((0, 2)).to(inputs.sinks.dtype)
    if call.empty:
        return tuple(found)
    incoming = Incoming(dout, lse, delta)
    if dquery is not None:
        tile = call.tile(dquery_tile, call.mask_size)
        programs, steps = call.query_blocks(tile), _strides(dquery)[:3]
        call.launch(attention_dquery_kernel, tile, programs, dout, dquery, steps, incoming)
        if call.sign < 0:
            dquery.neg_()
    if dkey is not None or dvalue is not None:
        tile = call.tile(dkey_tile, call.mask_size)
        blocks = launch.cdiv(call.keys + call.origin.shift, tile.keys)
        programs = blocks * call.shared_heads * call.batch
        # One kernel computes both; if only one is needed, the other is computed and discarded.
        pair = (
            make(inputs.key) if dkey is None else dkey,
            make(inputs.value) if dvalue is None else dvalue,
        )
        both = [_strides(t)[:3] for t in pair]
        call.launch(attention_dkey_kernel, tile, programs, dout, *pair, *both, incoming)
    if dmask is not None:
        _mask_gradient(call, incoming, dmask)
    return tuple(found)


def _mask_gradient(call: Call, incoming: Incoming, dmask: Tensor) -> None:
    """Launch one program per tile of the attention mask; it sums over the scores that share it."""
    # Queries and dout are loaded in the loop here, beside which a third stage would not fit.
    tile = call.tile(dquery_tile, call.mask_size)
    tile = tile._replace(num_stages=min(2, tile.num_stages))
    query_blocks = launch.cdiv(call.queries, tile.queries)
    key_blocks = launch.cdiv(call.keys + call.origin.shift, tile.keys)
    sizes = (call.batch, call.heads, query_blocks, key_blocks)
    tiles = tuple(1 if n == 1 else size for n, size in zip(dmask.shape, sizes, strict=True))
    shared = tuple(size // n for n, size in zip(tiles, sizes, strict=True))
    call.launch(
        attention_dmask_kernel,
        tile,
        math.prod(tiles),
        incoming.dout,
        dmask,
        _strides(dmask),
        (*shared, math.prod(shared)),
        incoming,
        SHARED=(dmask.shape[2] == 1, dmask.shape[3] == 1),
    )
