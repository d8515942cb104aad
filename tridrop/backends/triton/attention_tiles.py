"""What the attention kernels share: their arguments, and pure functions of tiles of scores.

Queries are the rows of every tile, in forward and in both halves of backward. So one function
computes the scores, one draws the mask, and a Philox call's eight decisions always lie in one
thread.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .constant import Constant
from .mask import decide_scores, keep_scores_flat, layout_of, load_rate, score_words
from .mask import load_key as load_philox_key
from .tiles import multiple_of, to_float

LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)

# Which bounds a tile needs: none, those of the rows that it loads, or those of its scores as well.
INNER = Constant(0)
ROWS = Constant(1)
EDGE = Constant(2)

# Pointers; None where absent. `rate` is the (threshold, scale) pair on the device.
Tensors = namedtuple("Tensors", "query key value mask key_mask sinks cu_query cu_key seed rate")
# Strides between batches and heads of query, key, value and out or dout; between batches, heads,
# queries and keys of the attention mask, 0 where it is broadcast; and between rows of key_mask.
Strides = namedtuple("Strides", "query key value out mask key_mask")
# `group` query heads share a key head. `tokens` is the number of rows of lse: all queries, also
# those of packed sequences. lower <= key - query <= upper, if Features say that there are bounds.
Shape = namedtuple("Shape", "heads group queries keys tokens width value_width lower upper")
# Where the coordinates begin: batch, head, query, the key's divided by 32, and the remainder.
Origin = namedtuple("Origin", "batch head query tile shift")
# The scale of the scores, and the softcap.
Factors = namedtuple("Factors", "scale cap")
# The arguments that all kernels take.
Problem = namedtuple("Problem", "tensors strides shape origin factors")
# Compile-time: whether there are bounds of key - query, whether the first key is inside a tile of
# 32, dropout, a p that only the device knows, a softcap, packed sequences, the precision of
# products in fp32, and a divisor of the strides.
Features = namedtuple(
    "Features", "LOWER UPPER SHIFTED DROPS MAYBE_ZERO SOFTCAP PACKED PRECISION VECTOR"
)
# Compile-time: queries, keys, width and value width of a tile; whether the kernel for the gradients
# of keys loads keys and values again for each block of queries; whether forward draws a block's
# mask while the products of the block before are running; whether the kernel for the gradients
# of keys shares no address between a loop and what follows it; and None, or the bounds, INNER or
# EDGE, of the only loop of a specialised forward (specialised.py).
Blocks = namedtuple("Blocks", "M N E V RELOAD AHEAD APART SPECIAL")
# Compile-time: the width and value width, or 0 where they are smaller than their blocks, and the
# strides between rows of query, key, value and out or dout.
Layout = namedtuple("Layout", "WIDTH VALUE_WIDTH QUERY KEY VALUE OUT")
# One batch entry and head: the first token and the number of queries, the same for keys, and the
# two indices; and the indices of a tile's columns, see place_of.
Place = namedtuple("Place", "query_start queries key_start keys batch head columns")


@triton.jit
def place_of(problem, batch, head, BLOCKS: tl.constexpr, FEATURES: tl.constexpr):
    """Where a batch entry lies: an entry of the tensors, or a packed sequence."""
    # The indices that bounds are compared with are made here, before the loops over tiles. If a
    # loop and the code behind it make the same number, LLVM makes it before the loop, and again on
    # the path that skips the loop. The zeros that the products add to go to that path as well, and
    # then ptxas waits for every product by itself on Hopper (warning C7515).
    columns = tl.arange(0, BLOCKS.N)
    tensors, shape = problem.tensors, problem.shape
    if FEATURES.PACKED:
        first = tl.load(tensors.cu_query + batch).to(tl.int64)
        key_first = tl.load(tensors.cu_key + batch).to(tl.int64)
        queries = (tl.load(tensors.cu_query + batch + 1) - first).to(tl.int32)
        keys = (tl.load(tensors.cu_key + batch + 1) - key_first).to(tl.int32)
        return Place(first, queries, key_first, keys, batch, head, columns)
    else:
        return Place(0, shape.queries, 0, shape.keys, batch, head, columns)


@triton.jit
def query_block(problem, BLOCKS: tl.constexpr, FEATURES: tl.constexpr):
    """The program's block of queries: (place, first query)."""
    blocks = tl.cdiv(problem.shape.queries, BLOCKS.M)
    block = tl.program_id(0) % blocks
    if FEATURES.UPPER:
        block = blocks - 1 - block  # the longest rows first
    head = tl.program_id(0) // blocks % problem.shape.heads
    batch = tl.program_id(0) // blocks // problem.shape.heads
    return place_of(problem, batch, head, BLOCKS, FEATURES), block * BLOCKS.M


@triton.jit
def rows_at(pointer, strides, place, start, head, step, FEATURES: tl.constexpr):
    """The address of a head's first row; `start` is its first token, `step` the row stride."""
    base = pointer + tl.cast(head, tl.int64) * multiple_of(strides[1], FEATURES.VECTOR)
    if not FEATURES.PACKED:
        base += tl.cast(place.batch, tl.int64) * multiple_of(strides[0], FEATURES.VECTOR)
    return base + start * step


@triton.jit
def key_bases(problem, place, FEATURES: tl.constexpr, LAYOUT: tl.constexpr):
    """The addresses of the first rows of key and value, for the place's query head."""
    t, strides, start = problem.tensors, problem.strides, place.key_start
    head = place.head // problem.shape.group
    key = rows_at(t.key, strides.key, place, start, head, LAYOUT.KEY, FEATURES)
    value = rows_at(t.value, strides.value, place, start, head, LAYOUT.VALUE, FEATURES)
    return key, value


@triton.jit
def query_bases(problem, dout, place, FEATURES: tl.constexpr, LAYOUT: tl.constexpr):
    """The addresses of the first rows of query and dout."""
    t, strides, start = problem.tensors, problem.strides, place.query_start
    query = rows_at(t.query, strides.query, place, start, place.head, LAYOUT.QUERY, FEATURES)
    other = rows_at(dout, strides.out, place, start, place.head, LAYOUT.OUT, FEATURES)
    return query, other


@triton.jit
def statistics_at(pointer, problem, place, FEATURES: tl.constexpr):
    """The address of a head's first number per query: lse and delta are [B, H, tokens]."""
    row = tl.cast(place.head, tl.int64)
    if not FEATURES.PACKED:
        row += tl.cast(place.batch, tl.int64) * problem.shape.heads
    return pointer + row * problem.shape.tokens + place.query_start


@triton.jit
def load_rows(
    base, first, length, width, HEIGHT: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    BOUNDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows from `first` on, [HEIGHT, COLS], zeros outside. WIDTH is the width if that is COLS,
    else 0."""
    # With a constant row stride a thread needs one address, and not one per row that it loads.
    row, col = tl.arange(0, HEIGHT), tl.arange(0, COLS)
    if HEIGHT * STEP + COLS < 1 << 31:
        inner = row[:, None] * STEP + col[None, :]
    else:
        inner = row.to(tl.int64)[:, None] * STEP + col[None, :]
    pointers = base + tl.cast(first, tl.int64) * STEP + inner
    if BOUNDS != INNER:
        at = first + row
        inside = ((at >= 0) & (at < length))[:, None]
        if WIDTH == 0:
            inside = inside & (col < width)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH == 0:
        return tl.load(pointers, mask=(col < width)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_key(
    base, problem, place, k0, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr, BOUNDS: tl.constexpr
):  # fmt: skip
    """The keys from k0 on, [N, E]."""
    return load_rows(
        base, k0, place.keys, problem.shape.width, BLOCKS.N, BLOCKS.E,
        LAYOUT.KEY, BOUNDS, LAYOUT.WIDTH,
    )  # fmt: skip


@triton.jit
def load_value(
    base, problem, place, k0, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr, BOUNDS: tl.constexpr
):  # fmt: skip
    """The values from k0 on, [N, V]."""
    return load_rows(
        base, k0, place.keys, problem.shape.value_width, BLOCKS.N, BLOCKS.V,
        LAYOUT.VALUE, BOUNDS, LAYOUT.VALUE_WIDTH,
    )  # fmt: skip


@triton.jit
def load_query(
    base, problem, place, q0, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr, BOUNDS: tl.constexpr
):  # fmt: skip
    """The queries from q0 on, [M, E]."""
    return load_rows(
        base, q0, place.queries, problem.shape.width, BLOCKS.M, BLOCKS.E,
        LAYOUT.QUERY, BOUNDS, LAYOUT.WIDTH,
    )  # fmt: skip


@triton.jit
def load_dout(
    base, problem, place, q0, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr, BOUNDS: tl.constexpr
):  # fmt: skip
    """The gradients of the results from q0 on, [M, V]."""
    return load_rows(
        base, q0, place.queries, problem.shape.value_width, BLOCKS.M, BLOCKS.V,
        LAYOUT.OUT, BOUNDS, LAYOUT.VALUE_WIDTH,
    )  # fmt: skip


@triton.jit
def at_end(index, threshold):
    """The index, unchanged, since no threshold is below 0; but the compiler does not know that.

    So addresses for the end of the kernel are computed there, and take no registers in the loops.
    """
    return index + (threshold < 0).to(tl.int32)


@triton.jit
def store_rows(
    base, step, first, length, width, value, HEIGHT: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, col = tl.arange(0, HEIGHT), tl.arange(0, COLS)
    inner = row.to(tl.int64)[:, None] * step + col[None, :]
    pointers = base + tl.cast(first, tl.int64) * step + inner
    at = first + row
    inside = ((at >= 0) & (at < length))[:, None] & (col < width)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def phases(lo_any, lo_all, hi_all, hi_any, BLOCK: tl.constexpr):
    """Ends (a, b, c, d) of phases of blocks: [b, c) needs no bounds, but [a, b) and [c, d) do.

    At least one row of the tile reaches from lo_any to hi_any, and every row from lo_all to hi_all.
    """
    end = tl.maximum(hi_any, 0)
    a = tl.maximum(lo_any, 0) // BLOCK * BLOCK
    whole_end = tl.maximum(hi_all, 0) // BLOCK * BLOCK
    last = (end + BLOCK - 1) // BLOCK * BLOCK
    b = tl.minimum(tl.maximum((tl.maximum(lo_all, 0) + BLOCK - 1) // BLOCK * BLOCK, a), last)
    c = tl.maximum(whole_end, b)
    return a, b, c, end


@triton.jit
def key_phases(problem, place, q0, BLOCKS: tl.constexpr, FEATURES: tl.constexpr):
    """The phases of the keys for the queries from q0 on, counted from the first tile of 32."""
    shape, shift = problem.shape, problem.origin.shift
    lo_any = place.keys * 0 + shift
    lo_all = lo_any
    hi_any = place.keys + shift
    hi_all = hi_any
    if FEATURES.LOWER:
        lo_any = tl.maximum(q0 + shape.lower, 0) + shift
        lo_all = tl.maximum(q0 + (BLOCKS.M - 1) + shape.lower, 0) + shift
    if FEATURES.UPPER:
        hi_any = tl.minimum(q0 + BLOCKS.M + shape.upper, place.keys) + shift
        hi_all = tl.minimum(q0 + 1 + shape.upper, place.keys) + shift
        # these queries have no key at all
        hi_any = tl.where(q0 + BLOCKS.M + shape.upper > 0, hi_any, 0)
    return phases(lo_any, lo_all, hi_all, hi_any, BLOCKS.N)


@triton.jit
def query_phases(problem, place, k0, BLOCKS: tl.constexpr, FEATURES: tl.constexpr):
    """The phases of the queries for the keys from k0 on, in local indices."""
    shape = problem.shape
    lo_any = place.queries * 0
    lo_all = lo_any
    hi_any = place.queries + 0
    hi_all = hi_any
    if FEATURES.UPPER:
        lo_any = tl.maximum(k0 - shape.upper, 0)
        lo_all = tl.maximum(k0 + (BLOCKS.N - 1) - shape.upper, 0)
    if FEATURES.LOWER:
        hi_any = tl.minimum(k0 + BLOCKS.N - shape.lower, place.queries)
        hi_all = tl.minimum(k0 + 1 - shape.lower, place.queries)
    return phases(lo_any, lo_all, hi_all, hi_any, BLOCKS.M)


@triton.jit
def is_plain(problem, BOUNDS: tl.constexpr, FEATURES: tl.constexpr):
    """Whether all scores are the product times a constant."""
    no_mask: tl.constexpr = problem.tensors.mask is None and problem.tensors.key_mask is None
    return no_mask and BOUNDS != EDGE and not FEATURES.SOFTCAP


@triton.jit
def last_key(problem, place, query, FEATURES: tl.constexpr):
    """The last key that each query attends to; its keys are a range."""
    last = place.keys - 1 + query * 0
    if FEATURES.UPPER:
        last = tl.minimum(last, query + problem.shape.upper)
    if problem.tensors.mask is not None:
        last = tl.where(query < place.queries, last, -1)
    return last


@triton.jit
def make_scores(
    product, problem, place, q0, k0, BLOCKS: tl.constexpr, BOUNDS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """(scores * log2(e), -inf where excluded; tanh(score / softcap)) of the tile at (q0, k0)."""
    tensors, strides = problem.tensors, problem.strides
    factors = problem.factors
    query, key = q0 + tl.arange(0, BLOCKS.M), k0 + place.columns
    capped = product
    if FEATURES.SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities
        doubled = product * (factors.scale * (2 * LOG2E) / factors.cap)
        capped = 1 - 2 / (tl.exp2(doubled) + 1)
        score = capped * (factors.cap * LOG2E)
    else:
        score = product * (factors.scale * LOG2E)
    # one comparison per bound
    inside = key[None, :] <= last_key(problem, place, query, FEATURES)[:, None]
    if FEATURES.LOWER or FEATURES.SHIFTED:
        first = query * 0
        if FEATURES.LOWER:
            first = tl.maximum(first, query + problem.shape.lower)
        inside = inside & (key[None, :] >= first[:, None])
    if tensors.mask is not None:
        base = tensors.mask + tl.cast(place.batch, tl.int64) * strides.mask[0]
        base += tl.cast(place.head, tl.int64) * strides.mask[1]
        base += tl.cast(q0, tl.int64) * strides.mask[2] + tl.cast(k0, tl.int64) * strides.mask[3]
        row, col = tl.arange(0, BLOCKS.M).to(tl.int64), tl.arange(0, BLOCKS.N).to(tl.int64)
        pointers = base + (row[:, None] * strides.mask[2] + col[None, :] * strides.mask[3])
        if BOUNDS == EDGE:  # noqa: SIM108 (the compiler takes no conditional expression here)
            mask = tl.load(pointers, mask=inside, other=0)
        else:
            mask = tl.load(pointers)
        if mask.dtype.is_floating():
            score += to_float(mask) * LOG2E
        else:
            score = tl.where(mask != 0, score, float("-inf"))
    if tensors.key_mask is not None:
        pointers = tensors.key_mask + tl.cast(place.batch, tl.int64) * strides.key_mask + key
        takes_part = tl.load(pointers, mask=(key >= 0) & (key < place.keys), other=0)
        score = tl.where((takes_part != 0)[None, :], score, float("-inf"))
    if BOUNDS == EDGE:
        score = tl.where(inside, score, float("-inf"))
    return score, capped


@triton.jit
def load_criterion(problem, threshold, scale, FEATURES: tl.constexpr):
    """(Philox key, threshold, scale, a zero whose value the compiler does not know)"""
    if FEATURES.DROPS:
        threshold, scale = load_rate(problem.tensors.rate, threshold, scale)
        # A select between a probability and this zero stays one select in fp32. With a constant
        # zero, LLVM would move it behind the conversion to bf16 and unpack pairs of numbers for it.
        zero = (threshold < 0).to(tl.float32)
        return load_philox_key(problem.tensors.seed), threshold, scale, zero
    else:
        return (0, 0), threshold, 1.0, 0.0


@triton.jit
def draw_tile(
    problem, place, criterion, q0, padded, anchor, BLOCKS: tl.constexpr
):  # fmt: skip
    """The words of the tile at query q0 and the padded key index, a multiple of 32."""
    origin = problem.origin
    return score_words(
        origin.query + q0, origin.tile + padded // 32,
        (origin.batch + place.batch, origin.head + place.head),
        criterion[0], anchor, BLOCKS.M, BLOCKS.N,
    )  # fmt: skip


@triton.jit
def decide_tile(words, criterion, BLOCKS: tl.constexpr, FEATURES: tl.constexpr):
    """The decisions of a tile, [M, N]."""
    return decide_scores(words, criterion[1], FEATURES.MAYBE_ZERO, BLOCKS.M, BLOCKS.N)


@triton.jit
def keep_tile(
    problem, place, criterion, q0, padded, BLOCKS: tl.constexpr, FEATURES: tl.constexpr
):  # fmt: skip
    """The decisions of the tile at query q0 and the padded key index."""
    if BLOCKS.SPECIAL is None:
        words = draw_tile(problem, place, criterion, q0, padded, 0, BLOCKS)
        return decide_tile(words, criterion, BLOCKS, FEATURES)
    else:
        origin = problem.origin
        return keep_scores_flat(
            origin.query + q0, origin.tile + padded // 32,
            (origin.batch + place.batch, origin.head + place.head),
            criterion[0], criterion[1], FEATURES.MAYBE_ZERO, BLOCKS.M, BLOCKS.N,
        )  # fmt: skip


@triton.jit
def draw_next(
    score, problem, place, criterion, q0, padded, BLOCKS: tl.constexpr
):  # fmt: skip
    """The words of a tile in the layout of another tile's scores, for the loop's next turn."""
    anchor = layout_of(score, BLOCKS.M, BLOCKS.N)
    return draw_tile(problem, place, criterion, q0, padded, anchor, BLOCKS)


@triton.jit
def dot(a, b, FEATURES: tl.constexpr):
    return tl.dot(a, b, input_precision=FEATURES.PRECISION)


@triton.jit
def dot_add(a, b, total, FEATURES: tl.constexpr):
    return tl.dot(a, b, total, input_precision=FEATURES.PRECISION)
