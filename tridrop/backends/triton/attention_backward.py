"""The backward kernels of attention: for queries, for keys and values, for the attention mask.

Each computes the scores of its tiles again, and draws the dropout mask again. There are no atomics:
only one program writes a result, and its sums have one order.

    P = exp(score - lse);   dP = (dout value^T) * keep * scale;   dS = P * (dP - delta)
    delta = sum over values of dout * out - dlse
"""

from collections import namedtuple

import triton
import triton.language as tl

from .attention_tiles import (
    EDGE,
    INNER,
    LOG2E,
    ROWS,
    at_end,
    dot,
    dot_add,
    is_plain,
    keep_tile,
    key_bases,
    key_phases,
    load_criterion,
    load_dout,
    load_key,
    load_query,
    load_value,
    make_scores,
    place_of,
    query_bases,
    query_block,
    query_phases,
    rows_at,
    statistics_at,
    store_rows,
)
from .tiles import first_of

# What backward gets besides the tensors of forward.
Incoming = namedtuple("Incoming", "dout lse delta")


@triton.jit
def attention_delta_kernel(
    delta, out, dout, dlse, out_strides, dout_strides, shape,
    BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """delta = sum over values of dout * out - dlse, [B, H, tokens]"""
    blocks = tl.cdiv(shape.tokens, BLOCK)
    row = first_of(tl.program_id(0) % blocks, shape.tokens, BLOCK) + tl.arange(0, BLOCK)
    row_inside = (row >= 0) & (row < shape.tokens)
    head = tl.program_id(0) // blocks % shape.heads
    batch = tl.program_id(0) // blocks // shape.heads
    col = tl.arange(0, VALUES)
    inside = row_inside[:, None] & (col < shape.value_width)[None, :]
    at = row.to(tl.int64)[:, None]
    base = batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[1]
    value = tl.load(out + base + at * out_strides[2] + col[None, :], mask=inside, other=0.0)
    base = batch.to(tl.int64) * dout_strides[0] + head.to(tl.int64) * dout_strides[1]
    grad = tl.load(dout + base + at * dout_strides[2] + col[None, :], mask=inside, other=0.0)
    total = tl.sum(value.to(tl.float32) * grad.to(tl.float32), axis=1)
    rows = (batch.to(tl.int64) * shape.heads + head) * shape.tokens + row
    if dlse is not None:
        total -= tl.load(dlse + rows, mask=row_inside, other=0.0).to(tl.float32)
    tl.store(delta + rows, total, mask=row_inside)


@triton.jit
def load_statistics(incoming, problem, place, q0, M: tl.constexpr, FEATURES: tl.constexpr):
    """(lse * log2(e), delta) from query q0 on; without keys lse becomes +inf, so that P = 0."""
    row = q0 + tl.arange(0, M)
    inside = row < place.queries
    at = statistics_at(incoming.lse, problem, place, FEATURES) + row
    lse = tl.load(at, mask=inside, other=float("inf"))
    at = statistics_at(incoming.delta, problem, place, FEATURES) + row
    delta = tl.load(at, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def _tile(
    query, key, value, dout, lse, delta, problem, place, criterion, q0, padded,
    BOUNDS: tl.constexpr, BLOCKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """(P * keep, dS, gradient of the product without the scale) of a tile, [M, N]."""
    if FEATURES.DROPS:
        keep = keep_tile(problem, place, criterion, q0, padded, BLOCKS, FEATURES)
    product = dot(query, tl.trans(key), FEATURES)
    capped = product
    if is_plain(problem, BOUNDS, FEATURES):
        probability = tl.exp2(product * (problem.factors.scale * LOG2E) - lse[:, None])
    else:
        k0 = padded - problem.origin.shift
        score, capped = make_scores(product, problem, place, q0, k0, BLOCKS, BOUNDS, FEATURES)
        probability = tl.exp2(score - lse[:, None])
    dp = dot(dout, tl.trans(value), FEATURES)
    kept = probability
    if FEATURES.DROPS:
        kept = tl.where(keep, probability, criterion[3])
        dp = tl.where(keep, dp, 0.0)
    dscore = probability * (dp * criterion[2] - delta[:, None])
    dproduct = dscore
    if FEATURES.SOFTCAP:
        dproduct = dscore * (1 - capped * capped)
    return kept, dscore, dproduct


@triton.jit
def _over_keys(
    total, query, dout, lse, delta, bases, problem, place, criterion, q0, start, stop,
    BOUNDS: tl.constexpr, BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Add dS key over the keys from start to stop."""
    for padded in range(start, stop, BLOCKS.N):
        k0 = padded - problem.origin.shift
        key = load_key(bases[0], problem, place, k0, BLOCKS, LAYOUT, BOUNDS)
        value = load_value(bases[1], problem, place, k0, BLOCKS, LAYOUT, BOUNDS)
        _, _, dproduct = _tile(
            query, key, value, dout, lse, delta, problem, place, criterion, q0, padded,
            BOUNDS, BLOCKS, FEATURES,
        )  # fmt: skip
        total = dot_add(dproduct.to(key.dtype), key, total, FEATURES)
    return total


@triton.jit(do_not_specialize=["threshold"])
def attention_dquery_kernel(
    dquery, dquery_strides, incoming, problem, threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dquery = score scale * sum over keys of dS key."""
    shape = problem.shape
    place, q0 = query_block(problem, BLOCKS, FEATURES)
    if q0 < place.queries:
        criterion = load_criterion(problem, threshold, scale, FEATURES)
        base, dout_base = query_bases(problem, incoming.dout, place, FEATURES, LAYOUT)
        bases = key_bases(problem, place, FEATURES, LAYOUT)
        query = load_query(base, problem, place, q0, BLOCKS, LAYOUT, ROWS)
        dout = load_dout(dout_base, problem, place, q0, BLOCKS, LAYOUT, ROWS)
        lse, delta = load_statistics(incoming, problem, place, q0, BLOCKS.M, FEATURES)
        total = tl.full([BLOCKS.M, BLOCKS.E], 0.0, tl.float32)
        a, b, c, d = key_phases(problem, place, q0, BLOCKS, FEATURES)
        if FEATURES.LOWER or FEATURES.SHIFTED:
            total = _over_keys(
                total, query, dout, lse, delta, bases, problem, place, criterion, q0, a, b,
                EDGE, BLOCKS, FEATURES, LAYOUT,
            )  # fmt: skip
        total = _over_keys(
            total, query, dout, lse, delta, bases, problem, place, criterion, q0, b, c,
            INNER, BLOCKS, FEATURES, LAYOUT,
        )  # fmt: skip
        total = _over_keys(
            total, query, dout, lse, delta, bases, problem, place, criterion, q0, c, d,
            EDGE, BLOCKS, FEATURES, LAYOUT,
        )  # fmt: skip
        step = dquery_strides[2]
        base = rows_at(dquery, dquery_strides, place, place.query_start, place.head, step, FEATURES)
        store_rows(
            base, step, at_end(q0, threshold), place.queries, shape.width,
            total * problem.factors.scale, BLOCKS.M, BLOCKS.E,
        )  # fmt: skip


@triton.jit
def _over_queries(
    state, key, value, bases, incoming, problem, place, criterion, padded, start, stop,
    BOUNDS: tl.constexpr, BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Add dS^T query and (P * keep)^T dout over the queries from start to stop."""
    dkey, dvalue = state
    for q0 in range(start, stop, BLOCKS.M):
        if BLOCKS.RELOAD:
            # The index depends on q0 as far as the compiler knows. Otherwise it would load keys and
            # values once, and hold them in shared memory beside the products' operands.
            k0 = padded - problem.origin.shift + tl.minimum(q0, 0)
            key_base, value_base = key_bases(problem, place, FEATURES, LAYOUT)
            key = load_key(key_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
            value = load_value(value_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
        query = load_query(bases[0], problem, place, q0, BLOCKS, LAYOUT, BOUNDS)
        lse, delta = load_statistics(incoming, problem, place, q0, BLOCKS.M, FEATURES)
        dout = load_dout(bases[1], problem, place, q0, BLOCKS, LAYOUT, BOUNDS)
        kept, _, dproduct = _tile(
            query, key, value, dout, lse, delta, problem, place, criterion, q0, padded,
            BOUNDS, BLOCKS, FEATURES,
        )  # fmt: skip
        dvalue = dot_add(tl.trans(kept.to(dout.dtype)), dout, dvalue, FEATURES)
        dkey = dot_add(tl.trans(dproduct.to(query.dtype)), query, dkey, FEATURES)
    return dkey, dvalue


@triton.jit
def _is_left(start, stop, threshold, BLOCKS: tl.constexpr):
    """A condition for the code behind a loop, which does nothing where start is not below stop.

    With ``APART`` the compiler cannot know it, and makes no number for that code and for the loop
    at once: see attention_tiles.place_of. Otherwise it is true.
    """
    if BLOCKS.APART:
        return at_end(start, threshold) < stop
    else:
        return True


@triton.jit(do_not_specialize=["threshold"])
def attention_dkey_kernel(
    dkey, dvalue, dkey_strides, dvalue_strides, incoming, problem,
    threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key head, over all the query heads that share it.

    dkey = score scale * sum over queries of dS query;   dvalue = sum of P * keep * scale * dout
    """
    shape = problem.shape
    blocks = tl.cdiv(shape.keys + problem.origin.shift, BLOCKS.N)
    key_heads = shape.heads // shape.group
    padded = tl.program_id(0) % blocks * BLOCKS.N
    key_head = tl.program_id(0) // blocks % key_heads
    batch = tl.program_id(0) // blocks // key_heads
    first = key_head * shape.group
    place = place_of(problem, batch, first, BLOCKS, FEATURES)
    k0 = padded - problem.origin.shift
    if k0 < place.keys:
        criterion = load_criterion(problem, threshold, scale, FEATURES)
        key_base, value_base = key_bases(problem, place, FEATURES, LAYOUT)
        key = load_key(key_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
        value = load_value(value_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
        a, b, c, d = query_phases(problem, place, k0, BLOCKS, FEATURES)
        # Queries beyond the last have P = 0 anyway, and keys beyond the last are not stored. So
        # only the band needs bounds, unless an attention mask must be read within its own.
        TAIL: tl.constexpr = FEATURES.LOWER or problem.tensors.mask is not None
        if TAIL:
            if problem.tensors.mask is not None:
                ragged = (k0 < 0) | (k0 + BLOCKS.N > place.keys)
                b = tl.where(ragged, a, b)
                c = tl.where(ragged, a, c)
        else:
            c = d
        state = (
            tl.full([BLOCKS.N, BLOCKS.E], 0.0, tl.float32),
            tl.full([BLOCKS.N, BLOCKS.V], 0.0, tl.float32),
        )
        for member in range(shape.group):
            at = place_of(problem, batch, first + member, BLOCKS, FEATURES)
            bases = query_bases(problem, incoming.dout, at, FEATURES, LAYOUT)
            middle = b
            if BLOCKS.APART:
                middle = at_end(b, threshold)
            if FEATURES.UPPER:
                state = _over_queries(
                    state, key, value, bases, incoming, problem, at, criterion, padded, a, b,
                    EDGE, BLOCKS, FEATURES, LAYOUT,
                )  # fmt: skip
            state = _over_queries(
                state, key, value, bases, incoming, problem, at, criterion, padded, middle, c,
                ROWS, BLOCKS, FEATURES, LAYOUT,
            )  # fmt: skip
            if TAIL:  # noqa: SIM102 (the inner one is for the compiler)
                if _is_left(c, d, threshold, BLOCKS):
                    state = _over_queries(
                        state, key, value, bases, incoming, problem, at, criterion, padded, c, d,
                        EDGE, BLOCKS, FEATURES, LAYOUT,
                    )  # fmt: skip
        if _is_left(k0, place.keys, threshold, BLOCKS):
            start, step = place.key_start, dkey_strides[2]
            base = rows_at(dkey, dkey_strides, place, start, key_head, step, FEATURES)
            store_rows(
                base, step, at_end(k0, threshold), place.keys, shape.width,
                state[0] * problem.factors.scale, BLOCKS.N, BLOCKS.E,
            )  # fmt: skip
            step = dvalue_strides[2]
            base = rows_at(dvalue, dvalue_strides, place, start, key_head, step, FEATURES)
            store_rows(
                base, step, at_end(k0, threshold), place.keys, shape.value_width,
                state[1] * criterion[2], BLOCKS.N, BLOCKS.V,
            )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def attention_dmask_kernel(
    dmask, dmask_strides, shared, incoming, problem, threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A tile of the attention mask's gradient: dS summed over the dimensions that share it.

    ``shared`` holds how many (batches, heads, blocks of queries, blocks of keys) to sum over, 1
    where the mask has an entry for each, and the product of these. SHARED says for the last two
    dimensions whether they are summed.
    """
    shape = problem.shape
    criterion = load_criterion(problem, threshold, scale, FEATURES)
    # The program's place, innermost first: block of keys, block of queries, head, batch.
    program = tl.program_id(0)
    key_blocks = tl.cdiv(tl.cdiv(shape.keys + problem.origin.shift, BLOCKS.N), shared[3])
    query_blocks = tl.cdiv(tl.cdiv(shape.queries, BLOCKS.M), shared[2])
    own_heads = shape.heads // shared[1]
    own_key = program % key_blocks
    own_query = program // key_blocks % query_blocks
    own_head = program // key_blocks // query_blocks % own_heads
    own_batch = program // key_blocks // query_blocks // own_heads
    total = tl.full([BLOCKS.M, BLOCKS.N], 0.0, tl.float32)
    for i in range(shared[4]):
        padded = (own_key + i % shared[3]) * BLOCKS.N
        q0 = (own_query + i // shared[3] % shared[2]) * BLOCKS.M
        head = own_head + i // shared[3] // shared[2] % shared[1]
        batch = own_batch + i // shared[3] // shared[2] // shared[1]
        k0 = padded - problem.origin.shift
        place = place_of(problem, batch, head, BLOCKS, FEATURES)
        base, dout_base = query_bases(problem, incoming.dout, place, FEATURES, LAYOUT)
        query = load_query(base, problem, place, q0, BLOCKS, LAYOUT, ROWS)
        dout = load_dout(dout_base, problem, place, q0, BLOCKS, LAYOUT, ROWS)
        key_base, value_base = key_bases(problem, place, FEATURES, LAYOUT)
        key = load_key(key_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
        value = load_value(value_base, problem, place, k0, BLOCKS, LAYOUT, ROWS)
        lse, delta = load_statistics(incoming, problem, place, q0, BLOCKS.M, FEATURES)
        _, dscore, _ = _tile(
            query, key, value, dout, lse, delta, problem, place, criterion, q0, padded,
            EDGE, BLOCKS, FEATURES,
        )  # fmt: skip
        total += dscore
    row = own_query * BLOCKS.M + tl.arange(0, BLOCKS.M)
    col = own_key * BLOCKS.N - problem.origin.shift + tl.arange(0, BLOCKS.N)
    base = dmask + own_batch.to(tl.int64) * dmask_strides[0]
    base += own_head.to(tl.int64) * dmask_strides[1]
    rows = row.to(tl.int64)[:, None] * dmask_strides[2]
    cols = col.to(tl.int64)[None, :] * dmask_strides[3]
    row_inside = (row < shape.queries)[:, None]
    col_inside = ((col >= 0) & (col < shape.keys))[None, :]
    element = dmask.dtype.element_ty
    if SHARED[0] and SHARED[1]:
        tl.store(base, tl.sum(tl.sum(total, axis=1), axis=0).to(element))
    elif SHARED[0]:
        tl.store(base + cols, tl.sum(total, axis=0)[None, :].to(element), mask=col_inside)
    elif SHARED[1]:
        tl.store(base + rows, tl.sum(total, axis=1)[:, None].to(element), mask=row_inside)
    else:
        tl.store(base + rows + cols, total.to(element), mask=row_inside & col_inside)
