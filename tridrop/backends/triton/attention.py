"""The forward kernel of attention: online softmax, with the mask drawn where the scores are."""

import triton
import triton.language as tl

from .attention_tiles import (
    EDGE,
    INNER,
    LN2,
    LOG2E,
    ROWS,
    at_end,
    decide_tile,
    dot,
    dot_add,
    draw_next,
    draw_tile,
    is_plain,
    keep_tile,
    key_bases,
    key_phases,
    last_key,
    load_criterion,
    load_key,
    load_query,
    load_value,
    make_scores,
    query_bases,
    query_block,
    statistics_at,
    store_rows,
)


@triton.jit
def _attend(
    state, query, bases, problem, place, criterion, q0, start, stop,
    BOUNDS: tl.constexpr, BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Add the keys from start to stop: (weighted values, running maximum, running sum, words)."""
    total, largest, weight, words = state
    for padded in tl.range(start, stop, BLOCKS.N, warp_specialize=BLOCKS.SPECIAL is not None):
        k0 = padded - problem.origin.shift
        if BLOCKS.SPECIAL is None:
            key = load_key(bases[0], problem, place, k0, BLOCKS, LAYOUT, BOUNDS)
        else:
            key = bases[0].load([k0, 0])
        if FEATURES.DROPS and not BLOCKS.AHEAD:
            # Drawn before the product, since ptxas then shares more (923 instructions, 997 after).
            keep = keep_tile(problem, place, criterion, q0, padded, BLOCKS, FEATURES)
        score = dot(query, tl.trans(key), FEATURES)
        if is_plain(problem, BOUNDS, FEATURES):
            # The factor is not negative, so it can follow the maximum: one fma per element.
            factor = problem.factors.scale * LOG2E
            new = tl.maximum(largest, tl.max(score, 1) * factor)
            probability = tl.exp2(score * factor - new[:, None])
            shrink = tl.exp2(largest - new)
        elif BLOCKS.SPECIAL is not None:
            # The same, since a specialised forward has upper bounds alone, and a positive factor.
            room = last_key(problem, place, q0 + tl.arange(0, BLOCKS.M), FEATURES) - k0
            # An index divided by 8 is a constant of a register. ptxas compares with it after the
            # product; otherwise it would compare before, and keep 64 bits (270 instructions).
            n = tl.arange(0, BLOCKS.N)
            inside = room[:, None] - (n % 8)[None, :] >= (n // 8 * 8)[None, :]
            score = tl.where(inside, score, float("-inf"))
            factor = problem.factors.scale * LOG2E
            new = tl.maximum(largest, tl.max(score, 1) * factor)
            pivot = tl.where(new == float("-inf"), 0.0, new)  # nothing to attend to so far
            probability = tl.exp2(score * factor - pivot[:, None])
            shrink = tl.exp2(largest - pivot)
        else:
            score, _ = make_scores(score, problem, place, q0, k0, BLOCKS, BOUNDS, FEATURES)
            new = tl.maximum(largest, tl.max(score, 1))
            pivot = tl.where(new == float("-inf"), 0.0, new)  # nothing to attend to so far
            probability = tl.exp2(score - pivot[:, None])
            shrink = tl.exp2(largest - pivot)
        weight = weight * shrink + tl.sum(probability, 1)
        total = total * shrink[:, None]
        if FEATURES.DROPS:
            if BLOCKS.AHEAD:
                keep = decide_tile(words, criterion, BLOCKS, FEATURES)
            probability = tl.where(keep, probability, criterion[3])
        if BLOCKS.SPECIAL is None:
            value = load_value(bases[1], problem, place, k0, BLOCKS, LAYOUT, BOUNDS)
        else:
            value = bases[1].load([k0, 0])
        total = dot_add(probability.to(value.dtype), value, total, FEATURES)
        if FEATURES.DROPS and BLOCKS.AHEAD:
            # ptxas moves code that is written before a product behind the wait for it. Here, behind
            # the second product, which nothing waits for before the next turn, the code stays.
            words = draw_next(score, problem, place, criterion, q0, padded + BLOCKS.N, BLOCKS)
        largest = new
    return total, largest, weight, words


@triton.jit
def _describe(base, length, width, STEP: tl.constexpr, HEIGHT: tl.constexpr, COLS: tl.constexpr):
    """The rows from ``base`` on as a tensor descriptor: it loads zeros in place of missing rows."""
    return tl.make_tensor_descriptor(base, [length, width], [STEP, 1], [HEIGHT, COLS])


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    out, lse, problem, threshold: tl.int64, scale: tl.float32,
    BLOCKS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: out [M, V] and lse [M].

    P = exp(score - lse);   out = sum over keys of P * keep * scale * value
    """
    shape = problem.shape
    place, q0 = query_block(problem, BLOCKS, FEATURES)
    if q0 < place.queries:
        criterion = load_criterion(problem, threshold, scale, FEATURES)
        base, _ = query_bases(problem, out, place, FEATURES, LAYOUT)
        bases = key_bases(problem, place, FEATURES, LAYOUT)
        if BLOCKS.SPECIAL is None:
            query = load_query(base, problem, place, q0, BLOCKS, LAYOUT, ROWS)
        else:
            width, value_width = shape.width, shape.value_width
            rows = _describe(base, place.queries, width, LAYOUT.QUERY, BLOCKS.M, BLOCKS.E)
            query = rows.load([q0, 0])
            bases = (
                _describe(bases[0], place.keys, width, LAYOUT.KEY, BLOCKS.N, BLOCKS.E),
                _describe(bases[1], place.keys, value_width, LAYOUT.VALUE, BLOCKS.N, BLOCKS.V),
            )
        largest = tl.full([BLOCKS.M], float("-inf"), tl.float32)
        weight = tl.full([BLOCKS.M], 0.0, tl.float32)
        if problem.tensors.sinks is not None:
            sink = tl.load(problem.tensors.sinks + place.head).to(tl.float32) * LOG2E
            largest = tl.full([BLOCKS.M], 0.0, tl.float32) + sink
            weight += 1.0
        a, b, c, d = key_phases(problem, place, q0, BLOCKS, FEATURES)
        words = (0, 0, 0, 0)
        if FEATURES.DROPS and BLOCKS.AHEAD:
            words = draw_tile(problem, place, criterion, q0, a, 0, BLOCKS)
        state = (tl.full([BLOCKS.M, BLOCKS.V], 0.0, tl.float32), largest, weight, words)
        if BLOCKS.SPECIAL is not None:
            state = _attend(
                state, query, bases, problem, place, criterion, q0, a, d,
                BLOCKS.SPECIAL, BLOCKS, FEATURES, LAYOUT,
            )  # fmt: skip
        else:
            if FEATURES.LOWER or FEATURES.SHIFTED:
                state = _attend(
                    state, query, bases, problem, place, criterion, q0, a, b,
                    EDGE, BLOCKS, FEATURES, LAYOUT,
                )  # fmt: skip
            state = _attend(
                state, query, bases, problem, place, criterion, q0, b, c,
                INNER, BLOCKS, FEATURES, LAYOUT,
            )  # fmt: skip
            state = _attend(
                state, query, bases, problem, place, criterion, q0, c, d,
                EDGE, BLOCKS, FEATURES, LAYOUT,
            )  # fmt: skip
        total, largest, weight, _ = state
        empty = weight == 0
        share = tl.where(empty, 0.0, criterion[2] / tl.where(empty, 1.0, weight))
        q_end = at_end(q0, threshold)
        row = q_end + tl.arange(0, BLOCKS.M)
        rows = statistics_at(lse, problem, place, FEATURES)
        # log2(0) = -inf is the log-sum-exp of a query whose keys are all excluded.
        tl.store(rows + row, (largest + tl.log2(weight)) * LN2, mask=row < place.queries)
        _, base = query_bases(problem, out, place, FEATURES, LAYOUT)
        store_rows(
            base, LAYOUT.OUT, q_end, place.queries, shape.value_width, total * share[:, None],
            BLOCKS.M, BLOCKS.V,
        )  # fmt: skip
