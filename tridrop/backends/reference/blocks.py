"""Attention calls cut into blocks of queries, each of which is a call of its own.

The scores of one block stay in a CPU's cache, and no others are in memory at the same time. Keys
that a block's band excludes are cut off. The softmax is over keys, so blocks of queries are
independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ...spec.attention import AttentionInputs, AttentionOptions

Index = tuple[slice, ...]

# Scores per block: 4 MiB in fp32. Of 2^18 to 2^21 scores, 2^20 took the least time (4 x 8 heads of
# 512 tokens, two cores). On an accelerator the launches of small blocks would cost more.
_SCORES = {"cpu": 1 << 20}
_MOST_SCORES = 1 << 26
# Calls with so few scores are not cut, even where a band excludes keys.
_SMALL = 1 << 16
_WHOLE: Index = (slice(None),)
# Queries per block where a band bounds the keys that they see.
_BAND = 128


class Block(NamedTuple):
    """A call, and the indices of its tensors in those of the whole call.

    ``query`` indexes [B, H, Sq], ``key`` [B, Hkv, Sk], and ``mask`` the attention mask.
    """

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
    """The queries and the keys of each packed sequence; without packing, all of them."""
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
    group = heads // max(1, inputs.key.shape[1]) or 1  # query heads per key head
    lower, upper = options.lower, options.upper
    rows = _SCORES.get(inputs.query.device.type, _MOST_SCORES) // max(1, keys)
    step = min(queries, rows if lower is None and upper is None else min(rows, _BAND)) or 1
    count = max(1, min(heads, rows // step))
    # A block has whole groups of query heads, or a part of one group.
    count = count // group * group or max(n for n in range(1, count + 1) if group % n == 0)
    samples = max(1, rows // step // heads) if count == heads else 1
    for b in range(0, batch, samples):
        for h in range(0, heads, count):
            for q in range(0, queries, step):
                part = _range(q, step, queries)
                end = keys if upper is None else min(max(0, part.stop + upper), keys)
                start = 0 if lower is None else min(max(0, part.start + lower), end)
                yield _range(b, samples, batch), _range(h, count, heads), part, slice(start, end)


def shared(mask: Tensor | None, where: Index) -> Index:
    """The index ``where`` of the scores, for an attention mask that broadcasts to them."""
    if mask is None:
        return ()
    return tuple(
        part if size > 1 else slice(None) for part, size in zip(where, mask.shape, strict=True)
    )


def is_block(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether the call stays one block, with all of its keys.

    That is so if a block holds all of its scores, or if cutting it would cost more than it saves.
    """
    if inputs.cu_query is not None:
        return False
    (batch, heads, queries, _), keys = inputs.query.shape, inputs.key.shape[2]
    if batch * heads * queries * keys <= _SMALL:
        return True
    whole = tuple(slice(0, size) for size in (batch, heads, queries, keys))
    return next(_cuts(inputs, options, queries, keys)) == whole


def blocks(inputs: AttentionInputs, options: AttentionOptions) -> Iterator[Block]:
    """The call as a sequence of calls that are not packed and have few scores each."""
    if is_block(inputs, options):
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
            offset = queries.start - keys.start  # local key - query is larger by this
            block_options = replace(
                options,
                lower=None if options.lower is None else options.lower + offset,
                upper=None if options.upper is None else options.upper + offset,
                origin=tuple(
                    o + part.start for o, part in zip(options.origin, scores, strict=True)
                ),
            )
            yield Block(one, block_options, at, from_, masked, heads)
