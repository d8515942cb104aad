"""The backward kernels of attention: one for queries, one for keys and values, one for the mask.

Each makes the scores of its tiles again, and the mask with them. Nothing is added by atomics: a
program owns what it writes, and its sums have one order.

    P = exp(score - lse);   dP = (dout value^T) * keep * scale;   dS = P * (dP - delta)
    delta = sum over values of dout * out - dlse
"""

from collections import namedtuple

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    dot,
    dot_add,
    is_plain,
    keep_tile,
    key_phases,
    load_rows,
    load_rule,
    make_scores,
    place_of,
    query_phases,
    rows_at,
    statistics_at,
    store_rows,
)

# What backward is given beside the tensors of forward.
Incoming = namedtuple("Incoming", "dout lse delta")


@triton.jit
def attention_delta_kernel(
    delta, out, dout, dlse, out_strides, dout_strides, shape,
    BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """delta = sum over values of dout * out - dlse, [B, H, tokens]"""
    blocks = tl.cdiv(shape.tokens, BLOCK)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // blocks % shape.heads
    batch = tl.program_id(0) // blocks // shape.heads
    col = tl.arange(0, VALUES)
    inside = (row < shape.tokens)[:, None] & (col < shape.value_width)[None, :]
    at = row.to(tl.int64)[:, None]
    base = batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[1]
    value = tl.load(out + base + at * out_strides[2] + col[None, :], mask=inside, other=0.0)
    base = batch.to(tl.int64) * dout_strides[0] + head.to(tl.int64) * dout_strides[1]
    grad = tl.load(dout + base + at * dout_strides[2] + col[None, :], mask=inside, other=0.0)
    total = tl.sum(value.to(tl.float32) * grad.to(tl.float32), axis=1)
    rows = (batch.to(tl.int64) * shape.heads + head) * shape.tokens + row
    if dlse is not None:
        total -= tl.load(dlse + rows, mask=row < shape.tokens, other=0.0).to(tl.float32)
    tl.store(delta + rows, total, mask=row < shape.tokens)


@triton.jit
def load_statistics(incoming, shape, place, q0, M: tl.constexpr, FEATURES: tl.constexpr):
    """(lse * log2(e), delta) of queries q0 and on; without a score, lse is +inf, so that P = 0."""
    row = q0 + tl.arange(0, M)
    inside = row < place.queries
    lse = tl.load(
        statistics_at(incoming.lse, shape, place, FEATURES) + row, mask=inside, other=float("inf")
    )
    delta = tl.load(
        statistics_at(incoming.delta, shape, place, FEATURES) + row, mask=inside, other=0.0
    )
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def _tile(
    query, key, value, dout, lse, delta, tensors, strides, shape, place, origin, rule, factors,
    q0, padded, BLOCKS: tl.constexpr, EDGE: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """(P * keep, dS, dS of the product without its scale) of a tile, [M, N]."""
    k0 = padded - origin.shift
    if FEATURES.DROPS:
        keep = keep_tile(origin, place, rule, q0, padded, BLOCKS, FEATURES)
    product = dot(query, tl.trans(key))
    capped = product
    if is_plain(tensors, EDGE, FEATURES):
        probability = tl.exp2(product * (factors.scale * LOG2E) - lse[:, None])
    else:
        score, capped = make_scores(
            product, tensors, strides, shape, place, factors, q0, k0, BLOCKS, EDGE, FEATURES
        )
        probability = tl.exp2(score - lse[:, None])
    dp = dot(dout, tl.trans(value))
    kept = probability
    if FEATURES.DROPS:
        kept = tl.where(keep, probability, rule[3])
        dp = tl.where(keep, dp, 0.0)
    dscore = probability * (dp * rule[2] - delta[:, None])
    dproduct = dscore
    if FEATURES.SOFTCAP:
        dproduct = dscore * (1 - capped * capped)
    return kept, dscore, dproduct


@triton.jit
def _over_keys(
    total, query, dout, lse, delta, bases, tensors, strides, shape, place, origin, rule, factors,
    q0, start, stop,
    BLOCKS: tl.constexpr, EDGE: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    for padded in range(start, stop, BLOCKS.N):
        k0 = padded - origin.shift
        key = load_rows(
            bases[0], strides.key[2], k0, place.keys, shape.width, BLOCKS.N, BLOCKS.E,
            EDGE, FEATURES, WIDTHS[0],
        )  # fmt: skip
        value = load_rows(
            bases[1], strides.value[2], k0, place.keys, shape.value_width, BLOCKS.N, BLOCKS.V,
            EDGE, FEATURES, WIDTHS[1],
        )  # fmt: skip
        _, _, dproduct = _tile(
            query, key, value, dout, lse, delta, tensors, strides, shape, place, origin, rule,
            factors, q0, padded, BLOCKS, EDGE, FEATURES,
        )  # fmt: skip
        total = dot_add(dproduct.to(key.dtype), key, total)
    return total


@triton.jit(do_not_specialize=["threshold"])
def attention_dquery_kernel(
    dquery, incoming, tensors, strides, dquery_strides, shape, origin, factors,
    threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dquery = score scale * sum over keys of dS key."""
    blocks = tl.cdiv(shape.queries, BLOCKS.M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % shape.heads
    batch = tl.program_id(0) // blocks // shape.heads
    if FEATURES.UPPER:
        block = blocks - 1 - block  # the longest rows first
    place = place_of(tensors, shape, batch, head, FEATURES)
    q0 = block * BLOCKS.M
    if q0 < place.queries:
        rule = load_rule(tensors, threshold, scale, FEATURES)
        shared = head // shape.group
        base = rows_at(tensors.query, strides.query, place, place.query_start, head, FEATURES)
        query = load_rows(
            base, strides.query[2], q0, place.queries, shape.width, BLOCKS.M, BLOCKS.E,
            True, FEATURES, WIDTHS[0],
        )  # fmt: skip
        base = rows_at(incoming.dout, strides.out, place, place.query_start, head, FEATURES)
        dout = load_rows(
            base, strides.out[2], q0, place.queries, shape.value_width, BLOCKS.M, BLOCKS.V,
            True, FEATURES, WIDTHS[1],
        )  # fmt: skip
        lse, delta = load_statistics(incoming, shape, place, q0, BLOCKS.M, FEATURES)
        bases = (
            rows_at(tensors.key, strides.key, place, place.key_start, shared, FEATURES),
            rows_at(tensors.value, strides.value, place, place.key_start, shared, FEATURES),
        )
        total = tl.zeros([BLOCKS.M, BLOCKS.E], tl.float32)
        a, b, c, d = key_phases(shape, place, origin, q0, BLOCKS, FEATURES)
        if FEATURES.LOWER or FEATURES.SHIFTED:
            total = _over_keys(
                total, query, dout, lse, delta, bases, tensors, strides, shape, place, origin,
                rule, factors, q0, a, b, BLOCKS, True, FEATURES, WIDTHS,
            )  # fmt: skip
        total = _over_keys(
            total, query, dout, lse, delta, bases, tensors, strides, shape, place, origin,
            rule, factors, q0, b, c, BLOCKS, False, FEATURES, WIDTHS,
        )  # fmt: skip
        total = _over_keys(
            total, query, dout, lse, delta, bases, tensors, strides, shape, place, origin,
            rule, factors, q0, c, d, BLOCKS, True, FEATURES, WIDTHS,
        )  # fmt: skip
        base = rows_at(dquery, dquery_strides, place, place.query_start, head, FEATURES)
        store_rows(
            base, dquery_strides[2], q0, place.queries, shape.width, total * factors.scale,
            BLOCKS.M, BLOCKS.E,
        )  # fmt: skip


@triton.jit
def _over_queries(
    dkey, dvalue, key, value, bases, incoming, tensors, strides, shape, place, origin, rule,
    factors, padded, start, stop,
    BLOCKS: tl.constexpr, EDGE: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    for q0 in range(start, stop, BLOCKS.M):
        query = load_rows(
            bases[0], strides.query[2], q0, place.queries, shape.width, BLOCKS.M, BLOCKS.E,
            EDGE, FEATURES, WIDTHS[0],
        )  # fmt: skip
        lse, delta = load_statistics(incoming, shape, place, q0, BLOCKS.M, FEATURES)
        dout = load_rows(
            bases[1], strides.out[2], q0, place.queries, shape.value_width, BLOCKS.M, BLOCKS.V,
            EDGE, FEATURES, WIDTHS[1],
        )  # fmt: skip
        kept, _, dproduct = _tile(
            query, key, value, dout, lse, delta, tensors, strides, shape, place, origin, rule,
            factors, q0, padded, BLOCKS, EDGE, FEATURES,
        )  # fmt: skip
        dvalue = dot_add(tl.trans(kept.to(dout.dtype)), dout, dvalue)
        dkey = dot_add(tl.trans(dproduct.to(query.dtype)), query, dkey)
    return dkey, dvalue


@triton.jit(do_not_specialize=["threshold"])
def attention_dkey_kernel(
    gradients, incoming, tensors, strides, gradient_strides, shape, origin, factors,
    threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key head, over all the query heads that share it.

    dkey = score scale * sum over queries of dS query;   dvalue = sum of P * keep * scale * dout
    """
    blocks = tl.cdiv(shape.keys + origin.shift, BLOCKS.N)
    shared_heads = shape.heads // shape.group
    padded = tl.program_id(0) % blocks * BLOCKS.N
    shared = tl.program_id(0) // blocks % shared_heads
    batch = tl.program_id(0) // blocks // shared_heads
    place = place_of(tensors, shape, batch, shared, FEATURES)
    k0 = padded - origin.shift
    if k0 < place.keys:
        rule = load_rule(tensors, threshold, scale, FEATURES)
        base = rows_at(tensors.key, strides.key, place, place.key_start, shared, FEATURES)
        key = load_rows(
            base, strides.key[2], k0, place.keys, shape.width, BLOCKS.N, BLOCKS.E,
            True, FEATURES, WIDTHS[0],
        )  # fmt: skip
        base = rows_at(tensors.value, strides.value, place, place.key_start, shared, FEATURES)
        value = load_rows(
            base, strides.value[2], k0, place.keys, shape.value_width, BLOCKS.N, BLOCKS.V,
            True, FEATURES, WIDTHS[1],
        )  # fmt: skip
        dkey = tl.zeros([BLOCKS.N, BLOCKS.E], tl.float32)
        dvalue = tl.zeros([BLOCKS.N, BLOCKS.V], tl.float32)
        a, b, c, d = query_phases(shape, place, k0, BLOCKS, FEATURES)
        # Where keys are left out of a tile, every tile of queries needs the bounds of its mask.
        if tensors.mask is not None:
            ragged = (k0 < 0) | (k0 + BLOCKS.N > place.keys)
            b = tl.where(ragged, a, b)
            c = tl.where(ragged, a, c)
        for head in range(shared * shape.group, (shared + 1) * shape.group):
            at = place_of(tensors, shape, batch, head, FEATURES)
            bases = (
                rows_at(tensors.query, strides.query, at, at.query_start, head, FEATURES),
                rows_at(incoming.dout, strides.out, at, at.query_start, head, FEATURES),
            )
            if FEATURES.UPPER:
                dkey, dvalue = _over_queries(
                    dkey, dvalue, key, value, bases, incoming, tensors, strides, shape, at,
                    origin, rule, factors, padded, a, b, BLOCKS, True, FEATURES, WIDTHS,
                )  # fmt: skip
            dkey, dvalue = _over_queries(
                dkey, dvalue, key, value, bases, incoming, tensors, strides, shape, at,
                origin, rule, factors, padded, b, c, BLOCKS, False, FEATURES, WIDTHS,
            )  # fmt: skip
            dkey, dvalue = _over_queries(
                dkey, dvalue, key, value, bases, incoming, tensors, strides, shape, at,
                origin, rule, factors, padded, c, d, BLOCKS, True, FEATURES, WIDTHS,
            )  # fmt: skip
        base = rows_at(gradients[0], gradient_strides[0], place, place.key_start, shared, FEATURES)
        store_rows(
            base, gradient_strides[0][2], k0, place.keys, shape.width, dkey * factors.scale,
            BLOCKS.N, BLOCKS.E,
        )  # fmt: skip
        base = rows_at(gradients[1], gradient_strides[1], place, place.key_start, shared, FEATURES)
        store_rows(
            base, gradient_strides[1][2], k0, place.keys, shape.value_width, dvalue * rule[2],
            BLOCKS.N, BLOCKS.V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def attention_dmask_kernel(
    dmask, incoming, tensors, strides, dmask_strides, shape, origin, factors, shared,
    threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A tile of the mask's gradient: dS summed over the dimensions along which it is shared.

    ``shared`` holds the sizes (batches, heads, blocks of queries, blocks of keys) to sum over, 1
    where the mask has its own; SHARED is whether the last two are summed.
    """
    rule = load_rule(tensors, threshold, scale, FEATURES)
    # What the program owns, from the innermost: a block of keys, of queries, a head, a batch.
    program = tl.program_id(0)
    key_blocks = 1 if SHARED[1] else tl.cdiv(shape.keys + origin.shift, BLOCKS.N)
    query_blocks = 1 if SHARED[0] else tl.cdiv(shape.queries, BLOCKS.M)
    own_heads = shape.heads // shared[1]
    own_key = program % key_blocks
    own_query = program // key_blocks % query_blocks
    own_head = program // key_blocks // query_blocks % own_heads
    own_batch = program // key_blocks // query_blocks // own_heads
    total = tl.zeros([BLOCKS.M, BLOCKS.N], tl.float32)
    for i in range(shared[0] * shared[1] * shared[2] * shared[3]):
        padded = (own_key + i % shared[3]) * BLOCKS.N
        q0 = (own_query + i // shared[3] % shared[2]) * BLOCKS.M
        head = own_head + i // shared[3] // shared[2] % shared[1]
        batch = own_batch + i // shared[3] // shared[2] // shared[1]
        k0 = padded - origin.shift
        place = place_of(tensors, shape, batch, head, FEATURES)
        base = rows_at(tensors.query, strides.query, place, place.query_start, head, FEATURES)
        query = load_rows(
            base, strides.query[2], q0, place.queries, shape.width, BLOCKS.M, BLOCKS.E,
            True, FEATURES, WIDTHS[0],
        )  # fmt: skip
        base = rows_at(incoming.dout, strides.out, place, place.query_start, head, FEATURES)
        dout = load_rows(
            base, strides.out[2], q0, place.queries, shape.value_width, BLOCKS.M, BLOCKS.V,
            True, FEATURES, WIDTHS[1],
        )  # fmt: skip
        lse, delta = load_statistics(incoming, shape, place, q0, BLOCKS.M, FEATURES)
        kv = head // shape.group
        base = rows_at(tensors.key, strides.key, place, place.key_start, kv, FEATURES)
        key = load_rows(
            base, strides.key[2], k0, place.keys, shape.width, BLOCKS.N, BLOCKS.E,
            True, FEATURES, WIDTHS[0],
        )  # fmt: skip
        base = rows_at(tensors.value, strides.value, place, place.key_start, kv, FEATURES)
        value = load_rows(
            base, strides.value[2], k0, place.keys, shape.value_width, BLOCKS.N, BLOCKS.V,
            True, FEATURES, WIDTHS[1],
        )  # fmt: skip
        _, dscore, _ = _tile(
            query, key, value, dout, lse, delta, tensors, strides, shape, place, origin, rule,
            factors, q0, padded, BLOCKS, True, FEATURES,
        )  # fmt: skip
        total += dscore
    row, col = own_query * BLOCKS.M + tl.arange(0, BLOCKS.M), tl.arange(0, BLOCKS.N)
    col = own_key * BLOCKS.N - origin.shift + col
    base = dmask + own_batch.to(tl.int64) * dmask_strides[0]
    base += own_head.to(tl.int64) * dmask_strides[1]
    element = dmask.dtype.element_ty
    inside = (row < shape.queries)[:, None] & ((col >= 0) & (col < shape.keys))[None, :]
    rows = row.to(tl.int64)[:, None] * dmask_strides[2]
    cols = col.to(tl.int64)[None, :] * dmask_strides[3]
    if SHARED[0] and SHARED[1]:
        tl.store(base, tl.sum(tl.sum(total, axis=1), axis=0).to(element))
    elif SHARED[0]:
        line = tl.sum(total, axis=0)[None, :].to(element)
        tl.store(base + cols, line, mask=((col >= 0) & (col < shape.keys))[None, :])
    elif SHARED[1]:
        line = tl.sum(total, axis=1)[:, None].to(element)
        tl.store(base + rows, line, mask=(row < shape.queries)[:, None])
    else:
        tl.store(base + rows + cols, total.to(element), mask=inside)
