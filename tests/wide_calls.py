"""Every kernel in calls whose indices or offsets pass 2^31, and what their TTIR says of them.

Run as a program it prints a list of JSON records, one a kernel and call: the tensors have no data,
and the compiler is stopped before anything depends on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from address_ranges import Kernel

from tridrop.backends import triton as backend
from tridrop.backends.triton import FAMILIES
from tridrop.backends.triton.compile import LAUNCHERS, capture
from tridrop.commands.inspection.rows import TABLE
from tridrop.spec import operands
from tridrop.spec.attention import AttentionInputs, AttentionOptions, SoftmaxOptions
from tridrop.spec.elementwise import NormOptions, Options, Shard
from tridrop.spec.product import ProductOptions

LONG = (1 << 31) + 4099  # no multiple of a block
BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def strided(*sizes: tuple[int, int], dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor of (size, stride) for each dimension."""
    shape, strides = zip(*sizes, strict=True)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


SEED = empty(2, dtype=torch.int64)
RATE = empty(dtype=FP32)


def elementwise(rows: int, cols: int, options: Options, p: torch.Tensor | None = None) -> object:
    """Forward and backward with every operand; x's rows lie apart."""
    width = cols * (2 if options.gated else 1)
    x = strided((rows, width + 8), (width, 1))
    grad, vector, gain = empty(rows, cols), empty(width), empty(cols)
    forward, backward = FAMILIES["elementwise"]
    forward(operands.Elementwise(x, vector, gain, grad, SEED, p), options)
    dtypes = (BF16, BF16, BF16)
    given = operands.ElementwiseBackward(grad, x, vector, gain, SEED, p)
    return backward(given, options, dtypes)


def norm(rows: int, cols: int, kind: str, after: bool) -> object:
    options = NormOptions(p=0.1, norm=kind, after=after, stream_dtype=BF16, out_dtype=BF16)
    x, vector = empty(rows, cols), empty(cols)
    bias = vector if kind == "layer_norm" else None
    forward, backward = FAMILIES["norm"]
    forward(operands.Norm(x, vector, None, x, vector, bias, SEED), options)
    statistics = empty(rows, 2, dtype=FP32)
    scale, other = None if after else vector, None if after else BF16
    given = operands.NormBackward(
        x, None if after else x, x, statistics, None if after else x, scale, scale, vector, SEED
    )
    dtypes = (BF16, other, other, other, BF16, None if bias is None else BF16)
    return backward(given, options, dtypes)


def softmax(scores: torch.Tensor, mask: torch.Tensor | None, upper: int | None) -> object:
    options = SoftmaxOptions(p=0.1, upper=upper, return_softmax=True)
    forward, backward = FAMILIES["softmax"]
    forward(operands.Softmax(scores, mask, SEED), options)
    lse = empty(*scores.shape[:-1], dtype=FP32)
    given = operands.SoftmaxBackward(scores, scores, scores, mask, lse, SEED)
    return backward(given, options, (BF16, None if mask is None else mask.dtype))


def product(rows: int, cols: int, ranks: tuple[int, ...]) -> object:
    options = ProductOptions(p=0.1, ranks=ranks)
    x, weight = empty(rows, cols), empty(sum(ranks), cols)
    given = operands.Product(x, weight, empty(len(ranks), 2, dtype=torch.int64))
    forward, backward = FAMILIES["product"]
    forward(given, options)
    incoming = operands.ProductBackward(empty(rows, sum(ranks)), *given)
    return backward(incoming, options, (True, True))


def attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None,
    upper: int | None = None, lower: int | None = None, offsets: torch.Tensor | None = None,
) -> object:  # fmt: skip
    lengths = query.shape[2], key.shape[2]
    options = AttentionOptions(
        p=0.1, scale=0.125, upper=upper, lower=lower, max_query=min(lengths[0], 4096),
        max_key=min(lengths[1], 4096), origin=(3, 5, 7, 70),
    )  # fmt: skip
    inputs = AttentionInputs(query, key, key, mask, cu_query=offsets, cu_key=offsets, seed=SEED)
    forward, backward = FAMILIES["attention"]
    forward(inputs, options)
    lse = empty(*query.shape[:-1], dtype=FP32)
    needs = (True, True, True, mask is not None, False)
    return backward(operands.AttentionBackward(query, lse, query, lse, *inputs), options, needs)


def attentions() -> dict[str, Callable[[], object]]:
    # Samples outermost in memory but for the tokens: 2^26 numbers from a query to the next.
    batch, heads, dim = 1 << 14, 64, 64
    apart = strided((batch, heads * dim), (heads, dim), (256, batch * heads * dim), (dim, 1))
    long = (1 << 30) - 1024
    longest = empty(1, 1, long, 16)
    one, wide = empty(1, 2, 128, 16), empty(1, 2, 1 << 26, 16)
    mask = empty(1, 2, 128, 1 << 26, dtype=BF16)
    turned = strided((1, 0), (2, 1 << 33), (1 << 26, 1), (128, 1 << 26))
    packed = empty(1, 64, 1 << 27, 64).transpose(1, 2).contiguous().transpose(1, 2)
    offsets = empty(9, dtype=torch.int32)
    heads_of = empty(1, 2, 1 << 27, 16)
    return {
        "attention: tokens far apart": lambda: attention(apart, apart, upper=0),
        "attention: the longest": lambda: attention(longest, longest, upper=100, lower=-100),
        "attention: a wide mask": lambda: attention(one, wide, mask),
        "attention: a mask of turned strides": lambda: attention(wide, one, turned),
        "attention: one mask for all scores": lambda: attention(
            heads_of, heads_of, empty(1, 1, 1, 1)
        ),
        "attention: packed": lambda: attention(packed, packed, offsets=offsets),
    }


def calls() -> dict[str, Callable[[], object]]:
    """name -> a call of launchers."""
    drop = Options(p=0.1)
    full = Options("gelu", p=0.1, drop_path=0.1)
    gated = Options("swiglu", p=0.1)
    late = Options(p=0.1, shard=Shard((3, 1 << 40), (0, (1 << 39) + 5)))
    scores = AttentionOptions(p=0.1)
    return {
        "elementwise: long rows": lambda: elementwise(3, LONG, full),
        "elementwise: long rows, gated": lambda: elementwise(3, LONG, gated),
        "elementwise: rows of half that, gated": lambda: elementwise(3, LONG // 2, gated),
        "elementwise: long rows of a shard": lambda: elementwise(3, LONG, late),
        "elementwise: long rows, p on the device": lambda: elementwise(3, LONG, drop, RATE),
        "elementwise: gaussian": lambda: elementwise(3, LONG, Options(p=0.1, noise="gaussian")),
        "elementwise: many rows": lambda: elementwise(LONG, 24, full),
        "keep_mask": lambda: backend.keep_mask(SEED, (3, LONG), None, drop, "elements"),
        "keep_mask: many rows": lambda: backend.keep_mask(SEED, (LONG, 24), None, drop, "elements"),
        "norm: long rows": lambda: norm(3, LONG, "layer_norm", False),
        "norm: long rows, after": lambda: norm(3, LONG, "rms_norm", True),
        "norm: many rows": lambda: norm(LONG, 1000, "layer_norm", False),
        "softmax: many keys": lambda: softmax(empty(1, 1, 3, LONG), None, 5),
        "softmax: many queries": lambda: softmax(empty(1, 1, LONG, 40), None, 0),
        "softmax: a mask": lambda: softmax(
            empty(2, 3, 1 << 16, 1 << 16), empty(1, 1, 1 << 16, 1 << 16), None
        ),
        "product: long rows": lambda: product(65, LONG, (16,)),
        "product: wide weights": lambda: product(65, 1 << 26, (64, 64, 64)),
        "product: many rows": lambda: product(LONG, 64, (8, 8)),
        "attention_keep_mask": lambda: backend.attention_keep_mask(
            SEED, (2, 3, LONG, 33), None, scores
        ),
        "attention_keep_mask: many keys": lambda: backend.attention_keep_mask(
            SEED, (2, 3, 5, LONG), None, scores
        ),
        "decision_bits": lambda: backend.decision_bits(SEED, (3, LONG)),
        # Blocks that the grid's axes divide: 65,535 along one of them.
        "yardstick": lambda: backend.yardstick.naive(
            empty(4, 65535 << 16), empty(4, 65535 << 16), SEED, drop
        ),
        **attentions(),
        **{
            f"inspect: {row.name}": lambda row=row: row.call(backend, BF16, row.methods[-1])
            for row in TABLE.values()
        },
    }


# Kernels of which it is known what is wrong.


@triton.jit
def narrow_block_kernel(out, cols, BLOCK: tl.constexpr):
    # What the elementwise kernels did: the product has 32 bits, the sum with it 64.
    col = cols * 0 + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + col, 1.0, mask=col < cols)


@triton.jit
def narrow_stride_kernel(out, stride, rows, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    tl.store(out + (row * stride).to(tl.int64), 1.0, mask=row < rows)


@triton.jit
def narrow_loop_kernel(out, cols, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    for turn in range(TURNS):
        col = turn * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + col, 1.0, mask=col < cols)


@triton.jit
def narrow_mask_kernel(out, cols, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    col = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + col, 1.0, mask=block * BLOCK + tl.arange(0, BLOCK) < cols)


@triton.jit
def wide_kernel(out, cols, BLOCK: tl.constexpr):
    wrapped = tl.program_id(0) * BLOCK * 1664525  # of no address
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + col, wrapped.to(tl.float32), mask=col < cols)


def known() -> dict[str, Callable[[], object]]:
    out = empty(LONG, dtype=FP32)
    grid = (triton.cdiv(LONG, 1024), 1, 1)
    return {
        "block": lambda: narrow_block_kernel[grid](out, LONG, BLOCK=1024),
        "stride": lambda: narrow_stride_kernel[(1, 1, 1)](out, 1 << 26, 50, BLOCK=64),
        "loop": lambda: narrow_loop_kernel[(1, 1, 1)](out, LONG, TURNS=grid[0], BLOCK=1024),
        "mask": lambda: narrow_mask_kernel[grid](out, LONG, BLOCK=1024),
        "right": lambda: wide_kernel[grid](out, LONG, BLOCK=1024),
    }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    records = []
    # Lengths of packed sequences are read from memory; the launcher was told how long they are.
    found = [(name, calls, LAUNCHERS, (0, 4096)) for name, calls in calls().items()]
    found += [(name, call, (sys.modules[__name__],), None) for name, call in known().items()]
    only = sys.argv[1:]
    for name, call, launchers, loaded in found:
        if only and not any(part in name for part in only):
            continue
        for compiled in capture("sm_90", call, "ttir", launchers):
            read = Kernel(compiled.text, compiled.numbers, compiled.grid, loaded)
            records.append(
                {"call": name, "kernel": compiled.kernel, "addresses": read.addresses,
                 "faults": sorted(read.faults), "fuses": compiled.fuses}
            )  # fmt: skip
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
