"""Calls of attention cut into blocks of queries, each a call of its own.

A block's scores stay in a CPU's cache, and are all that is in memory at a time; the keys that its
band leaves out are cut off. The softmax is over keys, so blocks of queries know nothing of each
other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ...spec.attention import AttentionInputs, AttentionOptions

Index = tuple[slice, ...]

# Scores of a block: 4 MiB in fp32. Of 2^18 to 2^21 scores 2^20 took the least time (4 x 8 heads of
# 512 tokens, two cores). On an accelerator it would be the launches of small blocks that cost.
_SCORES = {"cpu": 1 << 20}
_MOST_SCORES = 1 << 26
# So few that a band is not worth a cut.
_SMALL = 1 << 16
_WHOLE: Index = (slice(None),)
# Queries of a block where the keys that they see lie in a band.
_BAND = 128


class Block(NamedTuple):
    """A call, and where its tensors lie in the whole's: [B, H, Sq], [B, Hkv, Sk], the mask's."""

    inputs: AttentionInputs
    options: AttentionOptions
    query: Index
    key: Index
    mask: Index
    heads: slice


def _range(start: int, length: int, most: int) -> slice:
    return slice(start, min(start + length, most))


def _from(start: int, part: slice) -> slice:
    return slice(start + part.start, start + part.stop)


def _spans(inputs: AttentionInputs) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each packed sequence; or all."""
    if inputs.cu_query is None or inputs.cu_key is None:
        yield slice(0, inputs.query.shape[2]), slice(0, inputs.key.shape[2])
        return
    queries, keys = inputs.cu_query.tolist(), inputs.cu_key.tolist()
    for i in range(len(queries) - 1):
        yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])


def _cuts(
    inputs: AttentionInputs, options: AttentionOptions, queries: int, keys: int
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """(batch, heads, queries, keys) of the blocks of one sequence."""
    batch, heads = inputs.query.shape[:2]
    group = heads // max(1, inputs.key.shape[1]) or 1  # the query heads of a key head
    lower, upper = options.lower, options.upper
    rows = _SCORES.get(inputs.query.device.type, _MOST_SCORES) // max(1, keys)
    step = min(queries, rows if lower is None and upper is None else min(rows, _BAND)) or 1
    count = max(1, min(heads, rows // step))
    # Whole groups, or parts of one.
    count = count // group * group or max(n for n in range(1, count + 1) if group % n == 0)
    samples = max(1, rows // step // heads) if count == heads else 1
    for b in range(0, batch, samples):
        for h in range(0, heads, count):
            for q in range(0, queries, step):
                its = _range(q, step, queries)
                end = keys if upper is None else min(max(0, its.stop + upper), keys)
                start = 0 if lower is None else min(max(0, its.start + lower), end)
                yield _range(b, samples, batch), _range(h, count, heads), its, slice(start, end)


def shared(mask: Tensor | None, where: Index) -> Index:
    """``where``, of the scores, in a mask that broadcasts to them."""
    if mask is None:
        return ()
    return tuple(
        part if size > 1 else slice(None) for part, size in zip(where, mask.shape, strict=True)
    )


def is_block(inputs: AttentionInputs) -> bool:
    """Whether the call is one block as it is: to cut it would take longer than what it saves."""
    batch, heads, queries, _ = inputs.query.shape
    return inputs.cu_query is None and batch * heads * queries * inputs.key.shape[2] <= _SMALL


def blocks(inputs: AttentionInputs, options: AttentionOptions) -> Iterator[Block]:
    """The call as calls that are not packed, each with few scores; in order."""
    if is_block(inputs):
        yield Block(inputs, options, _WHOLE, _WHOLE, _WHOLE, slice(None))
        return
    packed = inputs.cu_query is not None
    group = inputs.query.shape[1] // max(1, inputs.key.shape[1])
    for number, (tokens, others) in enumerate(_spans(inputs)):
        lengths = (tokens.stop - tokens.start, others.stop - others.start)
        for batch, heads, queries, keys in _cuts(inputs, options, *lengths):
            samples = slice(number, number + 1) if packed else batch
            scores = (samples, heads, queries, keys)
            at = (batch, heads, _from(tokens.start, queries))
            from_ = (
                batch,
                slice(heads.start // group, -(-heads.stop // group)),
                _from(others.start, keys),
            )
            masked = shared(inputs.mask, scores)
            key_mask, sinks = inputs.key_mask, inputs.sinks
            one = inputs._replace(
                query=inputs.query[at],
                key=inputs.key[from_],
                value=inputs.value[from_],
                mask=None if inputs.mask is None else inputs.mask[masked],
                key_mask=None if key_mask is None else key_mask[samples, keys],
                sinks=None if sinks is None else sinks[heads],
                cu_query=None,
                cu_key=None,
            )
            apart = queries.start - keys.start  # key - query is less by this than in the whole
            own = replace(
                options,
                lower=None if options.lower is None else options.lower + apart,
                upper=None if options.upper is None else options.upper + apart,
                origin=tuple(
                    o + part.start for o, part in zip(options.origin, scores, strict=True)
                ),
            )
            yield Block(one, own, at, from_, masked, heads)
