"""The launchers of attention, which decide strides and features by sizes alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract.mask import TILE
from ...spec.attention import HEAD_DIM_LIMIT, AttentionInputs, AttentionOptions, empty_output
from ...spec.operands import AttentionBackward, inputs_of
from . import gpu, launch, specialised
from .attention import attention_forward_kernel
from .attention_backward import (
    Incoming,
    attention_delta_kernel,
    attention_dkey_kernel,
    attention_dmask_kernel,
    attention_dquery_kernel,
)
from .attention_settings import Tile, dkey_tile, dquery_tile, forward_tile
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

# Up to this length, sums and differences of positions fit 32 bits, also for a tile's last row.
LENGTH_LIMIT = (1 << 30) - (1 << 10)


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides in elements; 0 along dimensions of size 1, along which a mask is broadcast."""
    if t is None:
        return ()
    return tuple([0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


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
        self.threshold, self.scale = options.threshold(), options.keep_scale()
        drops = inputs.p is not None or self.threshold > 0
        shift = options.origin[3] % TILE if drops else 0
        key_mask = launch.vector(inputs.key_mask)
        self.tensors = Tensors(
            query, key, value, inputs.mask, key_mask, launch.vector(inputs.sinks),
            launch.vector(inputs.cu_query), launch.vector(inputs.cu_key),
            launch.vector(inputs.seed) if drops else None, launch.rate(inputs.p),
        )  # fmt: skip
        # A bound that excludes no score is left out, and one that excludes all scores is moved
        # close to them, so that its sums fit 32 bits.
        lower, upper = options.lower, options.upper
        lower = None if lower is None or lower <= -self.queries else min(lower, self.keys)
        upper = None if upper is None or upper >= self.keys else max(upper, -self.queries)
        # whether there is no score at all
        self.empty = self.batch * heads * self.queries * self.keys == 0
        self.shape = Shape(
            heads, heads // max(1, self.shared_heads), self.queries, self.keys, tokens, width,
            value_width, lower or 0, upper or 0,
        )  # fmt: skip
        batch, head, first, key_first = options.origin
        self.origin = Origin(batch, head, first, key_first // TILE, shift)
        self.factors = Factors(abs(options.scale), options.softcap)
        self.padded = _padded(width), _padded(value_width)
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

    def strides(self, out: Tensor) -> Strides:
        t = self.tensors
        key_mask = 0 if t.key_mask is None or t.key_mask.shape[0] == 1 else t.key_mask.stride(0)
        query, key, value, last = (_strides(x)[:2] for x in (t.query, t.key, t.value, out))
        return Strides(query, key, value, last, _strides(t.mask), key_mask)

    def launch(
        self, kernel: Any, tile: Tile, programs: int, out: Tensor, *args: Any, **more: Any
    ) -> None:
        """Launch a kernel with ``args`` and the problem; in backward, ``out`` is dout."""
        (width, value_width), t = self.padded, self.tensors
        layout = Layout(
            width if width == self.shape.width else 0,
            value_width if value_width == self.shape.value_width else 0,
            *[x.stride(2) for x in (t.query, t.key, t.value, out)],
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
                BLOCKS=Blocks(*tile[:2], width, value_width, *tile[4:]),
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
        found: Tile = tile_for(max(self.padded), size, gpu.of(self.device), *more)
        return found

    def specialised_tile(self) -> Tile | None:
        """The tile of a specialised forward, where it was asked for and serves the call."""
        if not specialised.asked():
            return None
        specialised.check(self.device)
        return specialised.tile(self.tensors, self.shape, self.flags, self.factors.scale)


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
    tile = call.specialised_tile() or call.tile(forward_tile, call.mask_size)
    arguments = (attention_forward_kernel, tile, call.query_blocks(tile), out, out, lse)
    if tile.special is None:
        call.launch(*arguments)
    else:
        specialised.run(call.device, partial(call.launch, *arguments))
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
    # The kernels write rows of adjacent elements; a transposed operand's gradient is copied there.
    dquery, dkey, dvalue = (None if t is None else launch.adjacent(t) for t in found[:3])
    dmask = found[3]
    dout, out, lse = launch.adjacent(dout), launch.adjacent(out), lse.contiguous()
    delta = torch.empty_like(lse)
    if lse.numel():
        rows = 64
        with launch.on(call.device):
            attention_delta_kernel[(launch.cdiv(lse.shape[2], rows) * lse.shape[0] * call.heads,)](
                delta,
                out,
                dout,
                launch.vector(dlse),
                _strides(out)[:3],
                _strides(dout)[:3],
                call.shape,
                BLOCK=rows,
                VALUES=call.padded[1],
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
        tile = call.tile(dkey_tile)
        blocks = launch.cdiv(call.keys + call.origin.shift, tile.keys)
        programs = blocks * call.shared_heads * call.batch
        # One kernel computes both; if only one is needed, the other is computed and discarded.
        pair = (
            launch.adjacent(make(inputs.key)) if dkey is None else dkey,
            launch.adjacent(make(inputs.value)) if dvalue is None else dvalue,
        )
        both = [_strides(t)[:3] for t in pair]
        call.launch(attention_dkey_kernel, tile, programs, dout, *pair, *both, incoming)
    if dmask is not None:
        _mask_gradient(call, incoming, dmask)
    for result, written in zip(found[:3], (dquery, dkey, dvalue), strict=True):
        if result is not None and written is not None and written is not result:
            result.copy_(written)
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
