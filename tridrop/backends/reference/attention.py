"""Attention in torch: the composition that the kernels must equal, with all scores in memory.

    score = scale * q k^T;   score = softcap * tanh(score / softcap);   score = score + mask
    P = exp(score - lse),   lse = log(sum over keys of exp(score) + exp(sink))
    out = (P * multiplier) v

A score that a mask excludes is -inf. A query with no score left has P = 0, out = 0 and lse = -inf.
``multiplier`` is the random part, constant for the derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...spec_attention import AttentionInputs, AttentionOptions, empty_output
from .elementwise import compute
from .softmax import attention_multiplier, masked_scores, safe_softmax

Gradients = tuple[Tensor | None, ...]


def sequences(
    inputs: AttentionInputs, options: AttentionOptions
) -> Iterator[tuple[AttentionInputs, AttentionOptions, slice, slice]]:
    """Each packed sequence as a call of its own, and where its tokens lie; or the one call."""
    if inputs.cu_query is None or inputs.cu_key is None:
        yield inputs, options, slice(None), slice(None)
        return
    queries, keys = inputs.cu_query.tolist(), inputs.cu_key.tolist()
    batch, *others = options.origin
    for i in range(len(queries) - 1):
        at, from_ = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        lengths = (at.stop - at.start, from_.stop - from_.start)

        def cut(mask: Tensor, index: int, lengths: Sequence[int]) -> Tensor:
            row = mask[index : index + 1] if mask.shape[0] > 1 else mask
            for dim, length in zip((-2, -1), lengths, strict=False):
                if row.shape[dim] > 1:
                    row = row.narrow(dim, 0, length)
            return row

        one = inputs._replace(
            query=inputs.query[:, :, at],
            key=inputs.key[:, :, from_],
            value=inputs.value[:, :, from_],
            mask=None if inputs.mask is None else cut(inputs.mask, i, lengths),
            key_mask=None if inputs.key_mask is None else inputs.key_mask[i : i + 1, : lengths[1]],
            cu_query=None,
            cu_key=None,
        )
        yield one, replace(options, origin=(batch + i, *others)), at, from_  # type: ignore[arg-type]


def _repeat(t: Tensor, heads: int) -> Tensor:
    """Key heads [B, Hkv, S, E], each for its group of query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def scores(
    query: Tensor, key: Tensor, mask: Tensor | None, key_mask: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scores, tanh(score / softcap) where there is a softcap), [B, H, Sq, Sk]."""
    score = query @ _repeat(key, query.shape[1]).transpose(-1, -2) * options.scale
    capped: Tensor | None = None
    if options.softcap:
        capped = torch.tanh(score / options.softcap)
        score = capped * options.softcap
    score = masked_scores(score, mask, options)
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return score, capped


def attention_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The op; arguments as in ``backends.Backend.attention_forward``."""
    query = inputs.query
    out = empty_output(query, inputs.value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    if inputs.cu_query is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    for one, its, at, _ in sequences(inputs, options):
        q, k, v, mask, sinks = compute(*_wide(one))
        assert q is not None
        assert k is not None
        assert v is not None
        score, _ = scores(q, k, _with_bool(mask, one), one.key_mask, its)
        probabilities, log_sum, _ = safe_softmax(score, sinks)
        drop = attention_multiplier(tuple(score.shape), one.seed, one.p, its)
        out[:, :, at] = (drop(probabilities) @ _repeat(v, q.shape[1])).to(out.dtype)
        lse[:, :, at] = log_sum.to(wide)
    return out, lse


def _wide(one: AttentionInputs) -> tuple[Tensor | None, ...]:
    """The floating-point operands."""
    floats = None if one.mask is None or one.mask.dtype == torch.bool else one.mask
    return one.query, one.key, one.value, floats, one.sinks


def _with_bool(mask: Tensor | None, one: AttentionInputs) -> Tensor | None:
    return one.mask if mask is None else mask


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    needs: tuple[bool, ...],
    known: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Of one call that is not packed; see :func:`attention_gradients`.

    ``known`` are (out, lse) of more keys than these.
    """
    heads, groups = query.shape[1], key.shape[1]
    score, capped = scores(query, key, _with_bool(mask, inputs), inputs.key_mask, options)
    drop = attention_multiplier(tuple(score.shape), inputs.seed, inputs.p, options)
    probabilities, _, sink = safe_softmax(score, sinks)
    if known is not None:
        lse = known[1].unsqueeze(-1)
        probabilities = torch.where(lse == -torch.inf, 0, torch.exp(score - lse))
    dvalue = drop(probabilities).transpose(-1, -2) @ dout
    dp = drop(dout @ _repeat(value, heads).transpose(-1, -2))
    terms = dp * probabilities if known is None else dout * known[0]
    delta = terms.sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    dscore = probabilities * (dp - delta)
    draw = dscore * options.scale
    if capped is not None:
        draw = draw * (1 - capped * capped)

    def of_groups(t: Tensor) -> Tensor:
        """Sum over the query heads that share a key head."""
        return t if groups == heads else t.unflatten(1, (groups, heads // groups)).sum(2)

    return (
        draw @ _repeat(key, heads) if needs[0] else None,
        of_groups(draw.transpose(-1, -2) @ query) if needs[1] else None,
        of_groups(dvalue) if needs[2] else None,
        dscore.sum_to_size(mask.shape) if needs[3] and mask is not None else None,
        -(sink * delta).sum((0, 2, 3)) if needs[4] and sink is not None else None,
    )


def attention_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    drop: object,
    options: tuple[AttentionInputs, AttentionOptions],
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of query, key, value, mask and sinks; differentiable.

        dP = (dout v^T) * multiplier;   dS = P * (dP - sum over keys of dP * P + dlse)
        dq = scale * dS k;   dk = scale * dS^T q;   dv = (P * multiplier)^T dout;   dmask = dS
        dsink = - P(sink) * (sum over keys of dP * P - dlse)

    ``options`` holds the tensors without a derivative besides the options; ``drop`` is drawn here.
    """
    given, its = options
    floats = given.mask is not None and given.mask.dtype != torch.bool
    given = given._replace(
        query=query, key=key, value=value, mask=mask if floats else given.mask, sinks=sinks
    )
    if given.cu_query is None:
        return _gradients(dout, dlse, query, key, value, mask, sinks, given, its, needs)
    pieces: list[Gradients] = []
    end = [0, 0]
    for one, own, at, from_ in sequences(given, its):
        d, dl = dout[:, :, at], None if dlse is None else dlse[:, :, at]
        its_mask = one.mask if floats else None
        found = _gradients(d, dl, one.query, one.key, one.value, its_mask, sinks, one, own, needs)
        dmask = found[3]
        if dmask is not None and mask is not None:
            # As long as the mask, which covers the longest sequence.
            missing = [m - n for m, n in zip(mask.shape[2:], dmask.shape[2:], strict=True)]
            dmask = torch.nn.functional.pad(dmask, (0, missing[1], 0, missing[0]))
        pieces.append((*found[:3], dmask, found[4]))
        end = [at.stop, from_.stop]
    tails = (query[:, :, end[0] :], key[:, :, end[1] :], value[:, :, end[1] :])
    columns = list(zip(*pieces, strict=True))
    tokens = [
        torch.cat([*column, torch.zeros_like(tail)], dim=2) if need else None
        for column, tail, need in zip(columns, tails, needs, strict=False)
    ]
    dmask, dsinks = None, None
    if needs[3] and mask is not None:
        dmask = torch.cat(columns[3]) if mask.shape[0] > 1 else torch.stack(columns[3]).sum(0)
    if needs[4] and sinks is not None:
        dsinks = torch.stack(columns[4]).sum(0)
    return (*tokens, dmask, dsinks)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    options: AttentionOptions,
    needs: tuple[bool, ...],
) -> Gradients:
    """The op's gradients; arguments as in ``backends.Backend.attention_backward``."""
    wide = compute(dout, dlse, *_wide(inputs))
    d, dl, q, k, v, mask, sinks = wide
    assert d is not None
    assert q is not None
    assert k is not None
    assert v is not None
    if options.block:
        known = (out.to(d.dtype), lse.to(d.dtype))
        results = _gradients(d, dl, q, k, v, mask, sinks, inputs, options, needs, known)
    else:
        given = (inputs, options)
        results = attention_gradients(d, dl, q, k, v, mask, sinks, None, given, needs)
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    return tuple(
        None if t is None or source is None else torch.empty_like(source).copy_(t)
        for t, source in zip(results, like, strict=True)
    )
