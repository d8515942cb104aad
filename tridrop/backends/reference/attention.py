"""Attention in torch: the composition that the kernels must equal, with all scores in memory.

    score = scale * q k^T;   score = softcap * tanh(score / softcap);   score = score + mask
    P = exp(score - lse),   lse = log(sum over keys of exp(score) + exp(sink))
    out = (P * multiplier) v

A score that a mask excludes is -inf. A query with no score left has P = 0, out = 0 and lse = -inf.
``multiplier`` is the random part, constant for the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce, wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec_attention import AttentionInputs, AttentionOptions, empty_output
from . import flash
from . import scores as loops
from .blocks import blocks, is_block
from .elementwise import Multiplier, compute, to
from .softmax import are_finite, attention_multiplier, band, masked_scores, safe_softmax

Gradients = tuple[Tensor | None, ...]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _repeat(t: Tensor, heads: int) -> Tensor:
    """Key heads [B, Hkv, S, E], each for its group of query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def scores(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """(scores, tanh(score / softcap) where there is a softcap), [B, H, Sq, Sk]."""
    query, key, mask, key_mask = inputs.query, inputs.key, inputs.mask, inputs.key_mask
    score = (query * options.scale) @ _repeat(key, query.shape[1]).transpose(-1, -2)
    capped: Tensor | None = None
    if options.softcap:
        capped = torch.tanh(score / options.softcap)
        score = capped * options.softcap
    score = masked_scores(score, mask, options)
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return score, capped


def _by_loops(inputs: AttentionInputs, *others: Tensor) -> bool:
    """Whether compiled loops make the probabilities, and their gradient, of such a block."""
    given = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.key_mask, *others)
    return inputs.sinks is None and loops.serves(inputs.seed, inputs.p, *given)


def _has_float_mask(inputs: AttentionInputs) -> bool:
    return inputs.mask is not None and inputs.mask.dtype != torch.bool


def _wide(inputs: AttentionInputs) -> AttentionInputs:
    """The call in the dtype that is computed in."""
    mask = inputs.mask if _has_float_mask(inputs) else None
    q, k, v, floats, sinks = compute(inputs.query, inputs.key, inputs.value, mask, inputs.sinks)
    assert q is not None
    assert k is not None
    assert v is not None
    mask = inputs.mask if floats is None else floats
    return inputs._replace(query=q, key=k, value=v, mask=mask, sinks=sinks)


def _as_given(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Without autocast, which would make 16 bits of products of fp32 operands."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call


@_as_given
def attention_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The op; arguments as in ``backends.Backend.attention_forward``."""
    found = flash.forward(inputs, options)
    if found is not None:
        return found
    query = inputs.query
    out = empty_output(query, inputs.value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    if inputs.cu_query is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    for block in blocks(inputs, options):
        one = _wide(block.inputs)
        if _by_loops(one):
            kept, _ = scores(one, loops.without_band(block.options))
            log_sum = kept.new_empty(kept.shape[:-1], dtype=torch.float32)
            kept = kept.contiguous()
            loops.forward(kept, one.seed, block.options, 1.0, kept, lse=log_sum)
        else:
            score, _ = scores(one, block.options)
            probabilities, log_sum, _ = safe_softmax(score, one.sinks)
            drop = attention_multiplier(tuple(score.shape), one.seed, one.p, block.options)
            kept = drop(probabilities)
        out[block.query] = kept @ _repeat(one.value, one.query.shape[1])
        lse[block.query] = log_sum
    return out, lse


@_as_given
def composed(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The op in torch's own operators, of sequences that are not packed."""
    wide = _wide(inputs)
    score, _ = scores(wide, options)
    probabilities, lse, _ = safe_softmax(score, wide.sinks)
    drop = Multiplier(*attention_multiplier(score.shape, inputs.seed, inputs.p, options))
    out = drop(probabilities) @ _repeat(wide.value, wide.query.shape[1])
    return to(out, inputs.query.dtype), lse


@_as_given
def torchs(inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
    """torch's own attention, with all that leaves keys out in one mask."""
    query, mask = inputs.query, inputs.mask
    causal = options.upper == 0 and options.lower is None
    causal = causal and mask is None and inputs.key_mask is None
    allowed = None if causal else band(query.shape[2], inputs.key.shape[2], options, query.device)
    if inputs.key_mask is not None:
        padding = inputs.key_mask[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    if mask is None or allowed is None:
        mask = allowed if mask is None else mask
    elif mask.dtype == torch.bool:
        mask = mask & allowed
    else:
        mask = mask.masked_fill(~allowed, -torch.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = to(mask, query.dtype)
    key, value = (_repeat(t, query.shape[1]) for t in (inputs.key, inputs.value))
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=options.scale
    )


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    needs: tuple[bool, ...],
) -> Gradients:
    """Of one block; see :func:`attention_gradients`."""
    query, key, mask = inputs.query, inputs.key, inputs.mask
    heads, groups = query.shape[1], key.shape[1]
    dkept = dout @ _repeat(inputs.value, heads).transpose(-1, -2)
    sink: Tensor | None = None
    if out is None and _by_loops(inputs, dkept):
        kept, capped = scores(inputs, loops.without_band(options))
        kept, dkept = kept.contiguous(), dkept.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        loops.backward(kept, inputs.seed, options, 1.0, dkept, dkept, dlse=dlse, kept=kept)
        dscore = dkept
    else:
        score, capped = scores(inputs, options)
        drop = attention_multiplier(tuple(score.shape), inputs.seed, inputs.p, options)
        probabilities, _, sink = safe_softmax(score, inputs.sinks)
        if lse is not None:
            lse = lse.unsqueeze(-1)
            probabilities = torch.where(lse == -torch.inf, 0, torch.exp(score - lse))
        kept = drop(probabilities)
        terms = kept * dkept
        delta = (terms if out is None else dout * out).sum(-1, keepdim=True)
        finite = are_finite(delta)
        if not finite:  # what is dropped, or has no part, has none in the sum, and no gradient
            terms = (probabilities * drop(dkept)).masked_fill(probabilities == 0, 0.0)
            delta = terms.sum(-1, keepdim=True) if out is None else delta
        if dlse is not None:
            delta = delta - dlse.unsqueeze(-1)
            finite = finite and are_finite(delta)
        dscore = torch.addcmul(terms, probabilities, delta, value=-1)
        if not finite:
            dscore = dscore.masked_fill(probabilities == 0, 0.0)
    dvalue = kept.transpose(-1, -2) @ dout
    draw = dscore if capped is None else dscore * (1 - capped * capped)

    def of_groups(t: Tensor) -> Tensor:
        """Sum over the query heads that share a key head."""
        return t if groups == heads else t.unflatten(1, (groups, heads // groups)).sum(2)

    return (
        draw @ _repeat(key, heads) * options.scale if needs[0] else None,
        of_groups(draw.transpose(-1, -2) @ (query * options.scale)) if needs[1] else None,
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
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Gradients:
    """Gradients of query, key, value, mask and sinks; differentiable.

        dS = P * multiplier * (dout v^T) - P * delta
        delta = sum over keys of P * multiplier * (dout v^T) - dlse
        dq = scale * dS k;   dk = scale * dS^T q;   dv = (P * multiplier)^T dout;   dmask = dS
        dsink = - P(sink) * delta

    ``options`` holds the tensors without a derivative besides the options; ``drop`` is drawn here.
    ``out`` and ``lse`` are given where they are those of more keys than these. Gradients of what
    several blocks share are summed in the dtype that is computed in, in the order of the blocks.
    """
    given, its = options
    mask = mask if _has_float_mask(given) else given.mask
    given = given._replace(query=query, key=key, value=value, mask=mask, sinks=sinks)
    like = (query, key, value, mask, sinks)
    wide = reduce(torch.promote_types, (t.dtype for t in like if t is not None), torch.float32)
    if is_block(given):
        grad, dlse, out, lse = (None if t is None else t.to(wide) for t in (dout, dlse, out, lse))
        assert grad is not None
        return _gradients(grad, dlse, out, lse, _wide(given), its, needs)
    totals = [
        None if t is None or not need else dout.new_zeros(t.shape, dtype=wide)
        for t, need in zip(like, needs, strict=True)
    ]
    for block in blocks(given, its):
        grad, dlse_part, out_part, lse_part = (
            None if t is None else t[block.query].to(wide) for t in (dout, dlse, out, lse)
        )
        assert grad is not None
        found = _gradients(
            grad, dlse_part, out_part, lse_part, _wide(block.inputs), block.options, needs
        )
        places = (block.query, block.key, block.key, block.mask, (block.heads,))
        for sums, gradient, place in zip(totals, found, places, strict=True):
            if sums is not None and gradient is not None:
                sums[place].add_(gradient)
    return tuple(totals)


def _like(t: Tensor, source: Tensor) -> Tensor:
    """A gradient in the dtype and the layout of its tensor."""
    room = torch.empty_like(source)
    return t if t.dtype == room.dtype and t.stride() == room.stride() else room.copy_(t)


@_as_given
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
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    results = flash.backward(dout, dlse, out, lse, inputs, options, needs)
    if results is None:
        known = (out, lse) if options.block else (None, None)
        results = attention_gradients(dout, dlse, *like, None, (inputs, options), needs, *known)
    return tuple(
        None if t is None or source is None else _like(t, source)
        for t, source in zip(results, like, strict=True)
    )
