"""Softmax and dropout of scores: one forward and one backward kernel.

    s = scale * scores + mask;  P = exp(s - lse);  out = where(keep, P, 0) * keep_scale

over the keys, where -inf stands for an excluded key. A program holds queries of one head with all
their keys, in one chunk of keys if they fit the registers. Longer rows are read in several chunks,
twice.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .constant import Constant
from .mask import keep_score_rows, load_key, load_rate
from .tiles import MAX_GRID_Y, first_of, in_bounds, multiple_of, to_float

LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)

# What both kernels read; None where absent. `rate` is the (threshold, scale) pair on the device.
Operands = namedtuple("Operands", "scores mask seed rate")
# `leading` holds the size and the strides in scores, mask and dout of each dimension before the
# queries, the last one first. `upper` bounds key - query; None means no bound.
Sizes = namedtuple("Sizes", "leading heads queries keys upper")
# Strides between queries, and between the keys of the attention mask. Other keys have stride 1.
Strides = namedtuple("Strides", "scores mask mask_key dout")
# The first score's coordinates in the dropout mask. A shard may begin `shift` keys inside a tile.
Origin = namedtuple("Origin", "batch head query tile shift")
# What forward writes, contiguous; softmax is None where it is not a result.
Results = namedtuple("Results", "out softmax lse")
# What backward reads besides Operands. dsoftmax is contiguous.
Incoming = namedtuple("Incoming", "dout dsoftmax lse")
# What backward writes, contiguous: the gradients of the scores and of scale * scores + mask.
Gradients = namedtuple("Gradients", "scores attended")


@triton.jit
def _rows(sizes, strides, VECTOR: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The queries of this program, and the offsets of their rows in scores, mask, dout and out."""
    block = tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y
    query = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    scores = query * multiple_of(strides.scores, VECTOR)
    mask = query * multiple_of(strides.mask, VECTOR)
    dout = query * multiple_of(strides.dout, VECTOR)
    outer = tl.program_id(0)
    out = (outer.to(tl.int64) * sizes.queries + query) * multiple_of(sizes.keys, VECTOR)
    for i in tl.static_range(len(sizes.leading)):
        at = (outer % sizes.leading[i][0]).to(tl.int64)
        outer = outer // sizes.leading[i][0]
        scores += at * multiple_of(sizes.leading[i][1], VECTOR)
        mask += at * multiple_of(sizes.leading[i][2], VECTOR)
        dout += at * multiple_of(sizes.leading[i][3], VECTOR)
    return query, scores, mask, dout, out


@triton.jit
def _keys(
    chunk, query, sizes, origin, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The keys of a chunk, which of the scores lie in the matrix, and which must be read."""
    keys = multiple_of(sizes.keys, VECTOR)
    key = first_of(chunk, keys, BLOCK_COLS) - origin.shift + tl.arange(0, BLOCK_COLS)
    inside = in_bounds(query, key, sizes.queries, keys, WHOLE)
    needed = inside
    if sizes.upper is not None:
        # By groups of eight keys, so that a load stays 16 bytes wide.
        first = key // 8 * 8
        needed = inside & (first[None, :] <= _last(query, keys, sizes)[:, None])
    return key, inside, needed


@triton.jit
def _last(query, keys, sizes):
    """The last key that each query sees, in the type of keys."""
    # A query has 64 bits, but its last key gets the type of keys, which is cheaper to compare.
    zero = (tl.zeros([], tl.int32) + keys) * 0
    last = tl.minimum(tl.maximum(query + sizes.upper, -1), zero + keys)
    return last.to(zero.dtype)


@triton.jit
def _load(pointer, row, key, stride, needed):
    offsets = row[:, None] + key.to(tl.int64)[None, :] * stride
    return tl.load(pointer + offsets, mask=needed, other=0.0)


@triton.jit
def _attended(operands, sizes, strides, rows, key, needed, scale):
    """scale * scores + mask, -inf where a key is excluded."""
    takes_part = needed
    value = to_float(_load(operands.scores, rows[1], key, 1, needed)) * scale
    if operands.mask is not None:
        mask = _load(operands.mask, rows[2], key, strides.mask_key, needed)
        if operands.mask.dtype.element_ty == tl.int1:
            takes_part = takes_part & mask.to(tl.int1)
        else:
            value += to_float(mask)
    if sizes.upper is not None:
        last = _last(rows[0], sizes.keys, sizes)
        takes_part = takes_part & (key[None, :] <= last[:, None])
    return tl.where(takes_part, value, -float("inf"))


@triton.jit
def _criterion(operands, threshold, keep_scale):
    """The Philox key, the threshold and the scale of kept probabilities."""
    threshold, keep_scale = load_rate(operands.rate, threshold, keep_scale)
    return load_key(operands.seed), threshold, keep_scale


@triton.jit
def _drop(
    value,
    chunk,
    operands,
    sizes,
    origin,
    criterion,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """where(keep, value, 0) * keep_scale"""
    block = tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y
    outer = tl.program_id(0)
    where = (origin.batch + outer // sizes.heads, origin.head + outer % sizes.heads)
    table: tl.constexpr = operands.rate is not None
    keep = keep_score_rows(
        origin.query + block * BLOCK_ROWS, origin.tile + chunk * (BLOCK_COLS // 32), where,
        criterion[0], criterion[1], table, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    return tl.where(keep, value, 0.0) * criterion[2]


@triton.jit(do_not_specialize=["threshold"])
def softmax_forward_kernel(
    results, operands, sizes, strides, origin,
    threshold: tl.int64, keep_scale: tl.float32, scale: tl.float32,
    DROPS: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The formulas at the top of this file, for BLOCK_ROWS queries."""
    rows = _rows(sizes, strides, VECTOR, BLOCK_ROWS)
    criterion = (0, 0, 1.0)
    if DROPS:
        criterion = _criterion(operands, threshold, keep_scale)

    # The largest s so far, 0 while there is none, and the sum of exp(s - largest).
    largest = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    shift = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    value = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for chunk in range(CHUNKS):
        key, _, needed = _keys(chunk, rows[0], sizes, origin, VECTOR, WHOLE, BLOCK_COLS)
        value = _attended(operands, sizes, strides, rows, key, needed, scale)
        before = largest
        largest = tl.maximum(before, tl.max(value, axis=1))
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        value = tl.exp2((value - shift[:, None]) * LOG2E)
        total = total * tl.exp2((before - shift) * LOG2E) + tl.sum(value, axis=1)
    empty = total == 0.0  # all keys were excluded
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, -float("inf"), shift + tl.log2(total) * LN2)
    row = tl.program_id(0).to(tl.int64) * sizes.queries + rows[0]
    tl.store(results.lse + row, lse, mask=rows[0] < sizes.queries)
    inverse = 1.0 / total

    for chunk in range(CHUNKS):
        key, inside, needed = _keys(chunk, rows[0], sizes, origin, VECTOR, WHOLE, BLOCK_COLS)
        if CHUNKS > 1:
            value = _attended(operands, sizes, strides, rows, key, needed, scale)
            value = tl.exp2((value - shift[:, None]) * LOG2E)
        value = value * inverse[:, None]
        offsets = rows[4][:, None] + key[None, :]
        if results.softmax is not None:
            element = results.softmax.dtype.element_ty
            tl.store(results.softmax + offsets, value.to(element), mask=inside)
        if DROPS:
            value = _drop(value, chunk, operands, sizes, origin, criterion, BLOCK_ROWS, BLOCK_COLS)
        tl.store(results.out + offsets, value.to(results.out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    incoming, operands, sizes, strides, origin, criterion, rows, lse, chunk, scale,
    DROPS: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """P and dP of a chunk."""
    key, _, needed = _keys(chunk, rows[0], sizes, origin, VECTOR, WHOLE, BLOCK_COLS)
    value = _attended(operands, sizes, strides, rows, key, needed, scale)
    probability = tl.exp2((value - lse[:, None]) * LOG2E)
    gradient = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    if incoming.dout is not None:
        gradient = to_float(_load(incoming.dout, rows[3], key, 1, needed))
        if DROPS:
            gradient = _drop(
                gradient, chunk, operands, sizes, origin, criterion, BLOCK_ROWS, BLOCK_COLS
            )
    if incoming.dsoftmax is not None:
        gradient += to_float(_load(incoming.dsoftmax, rows[4], key, 1, needed))
    return probability, gradient


@triton.jit(do_not_specialize=["threshold"])
def softmax_backward_kernel(
    gradients, incoming, operands, sizes, strides, origin,
    threshold: tl.int64, keep_scale: tl.float32, scale: tl.float32,
    DROPS: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Gradients for BLOCK_ROWS queries.

    dP = where(keep, dout, 0) * keep_scale + dsoftmax;  ds = P * (dP - sum(dP * P));  scale * ds

    The rounding of lse makes all probabilities of a row wrong by one factor, by 2^-25 * |lse|, too
    much where scores are large. Their sum is that factor.
    """
    rows = _rows(sizes, strides, VECTOR, BLOCK_ROWS)
    criterion = (0, 0, 1.0)
    if DROPS:
        criterion = _criterion(operands, threshold, keep_scale)
    row = tl.program_id(0).to(tl.int64) * sizes.queries + rows[0]
    lse = tl.load(incoming.lse + row, mask=rows[0] < sizes.queries, other=0.0)
    # P = exp(s - lse) is 0 where no key took part, and not exp(-inf + inf).
    lse = tl.where(lse == -float("inf"), float("inf"), lse)

    total = tl.zeros([BLOCK_ROWS], tl.float32)
    along = tl.zeros([BLOCK_ROWS], tl.float32)
    probability = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    gradient = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for chunk in range(CHUNKS):
        probability, gradient = _gradient(
            incoming, operands, sizes, strides, origin, criterion, rows, lse, chunk, scale,
            DROPS, VECTOR, WHOLE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        total += tl.sum(probability, axis=1)
        along += tl.sum(probability * gradient, axis=1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    along = along * inverse

    for chunk in range(CHUNKS):
        if CHUNKS > 1:
            probability, gradient = _gradient(
                incoming, operands, sizes, strides, origin, criterion, rows, lse, chunk, scale,
                DROPS, VECTOR, WHOLE, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        key, inside, _ = _keys(chunk, rows[0], sizes, origin, VECTOR, WHOLE, BLOCK_COLS)
        offsets = rows[4][:, None] + key[None, :]
        ds = probability * inverse[:, None] * (gradient - along[:, None])
        if gradients.attended is not None:
            element = gradients.attended.dtype.element_ty
            tl.store(gradients.attended + offsets, ds.to(element), mask=inside)
        if gradients.scores is not None:
            element = gradients.scores.dtype.element_ty
            tl.store(gradients.scores + offsets, (ds * scale).to(element), mask=inside)
