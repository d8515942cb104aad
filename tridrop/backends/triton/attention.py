"""The forward kernel of attention: online softmax, and the mask in the scores' registers."""

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
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
    rows_at,
    statistics_at,
    store_rows,
)


@triton.jit
def _attend(
    query, bases, state, tensors, strides, shape, place, origin, rule, factors, q0, start, stop,
    BLOCKS: tl.constexpr, EDGE: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """Go through the keys from start to stop: (weighted values, running maximum, running sum)."""
    PLAIN: tl.constexpr = is_plain(tensors, EDGE, FEATURES)
    total, largest, weight = state
    for padded in range(start, stop, BLOCKS.N):
        k0 = padded - origin.shift
        key = load_rows(
            bases[0], strides.key[2], k0, place.keys, shape.width, BLOCKS.N, BLOCKS.E,
            EDGE, FEATURES, WIDTHS[0],
        )  # fmt: skip
        if FEATURES.DROPS:
            # From indices alone: there is time for it while the product is under way.
            keep = keep_tile(origin, place, rule, q0, padded, BLOCKS, FEATURES)
        score = dot(query, tl.trans(key))
        if PLAIN:
            # The factor, which is not negative, is applied after the maximum: one fma an element.
            factor = factors.scale * LOG2E
            new = tl.maximum(largest, tl.max(score, 1) * factor)
            probability = tl.exp2(score * factor - new[:, None])
            shrink = tl.exp2(largest - new)
        else:
            score, _ = make_scores(
                score, tensors, strides, shape, place, factors, q0, k0, BLOCKS, EDGE, FEATURES
            )
            new = tl.maximum(largest, tl.max(score, 1))
            pivot = tl.where(new == float("-inf"), 0.0, new)  # nothing to attend to so far
            probability = tl.exp2(score - pivot[:, None])
            shrink = tl.exp2(largest - pivot)
        weight = weight * shrink + tl.sum(probability, 1)
        total = total * shrink[:, None]
        if FEATURES.DROPS:
            probability = tl.where(keep, probability, rule[3])
        value = load_rows(
            bases[1], strides.value[2], k0, place.keys, shape.value_width, BLOCKS.N, BLOCKS.V,
            EDGE, FEATURES, WIDTHS[1],
        )  # fmt: skip
        total = dot_add(probability.to(value.dtype), value, total)
        largest = new
    return total, largest, weight


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    out, lse, tensors, strides, shape, origin, factors, threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: out [M, V] and lse [M].

    P = exp(score - lse);   out = sum over keys of P * keep * scale * value
    """
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
        base = rows_at(tensors.query, strides.query, place, place.query_start, head, FEATURES)
        query = load_rows(
            base, strides.query[2], q0, place.queries, shape.width, BLOCKS.M, BLOCKS.E,
            True, FEATURES, WIDTHS[0],
        )  # fmt: skip
        shared = head // shape.group
        bases = (
            rows_at(tensors.key, strides.key, place, place.key_start, shared, FEATURES),
            rows_at(tensors.value, strides.value, place, place.key_start, shared, FEATURES),
        )
        largest = tl.full([BLOCKS.M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCKS.M], tl.float32)
        if tensors.sinks is not None:
            sink = tl.load(tensors.sinks + head).to(tl.float32) * LOG2E
            largest = tl.zeros([BLOCKS.M], tl.float32) + sink
            weight += 1.0
        state = (tl.zeros([BLOCKS.M, BLOCKS.V], tl.float32), largest, weight)
        a, b, c, d = key_phases(shape, place, origin, q0, BLOCKS, FEATURES)
        if FEATURES.LOWER or FEATURES.SHIFTED:
            state = _attend(
                query, bases, state, tensors, strides, shape, place, origin, rule, factors, q0,
                a, b, BLOCKS, True, FEATURES, WIDTHS,
            )  # fmt: skip
        state = _attend(
            query, bases, state, tensors, strides, shape, place, origin, rule, factors, q0,
            b, c, BLOCKS, False, FEATURES, WIDTHS,
        )  # fmt: skip
        state = _attend(
            query, bases, state, tensors, strides, shape, place, origin, rule, factors, q0,
            c, d, BLOCKS, True, FEATURES, WIDTHS,
        )  # fmt: skip
        total, largest, weight = state
        empty = weight == 0
        share = tl.where(empty, 0.0, rule[2] / tl.where(empty, 1.0, weight))
        base = rows_at(out, strides.out, place, place.query_start, head, FEATURES)
        store_rows(
            base, strides.out[2], q0, place.queries, shape.value_width, total * share[:, None],
            BLOCKS.M, BLOCKS.V,
        )  # fmt: skip
        log_sum = tl.where(empty, float("-inf"), (largest + tl.log2(weight)) * LN2)
        row = q0 + tl.arange(0, BLOCKS.M)
        rows = statistics_at(lse, shape, place, FEATURES)
        tl.store(rows + row, log_sum, mask=row < place.queries)
