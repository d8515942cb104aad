"""Attention in torch: the composition that the kernels must equal, by blocks of queries.

    score = scale * q k^T;   score = softcap * tanh(score / softcap);   score = score + mask
    P = exp(score - lse),   lse = log(sum over keys of exp(score) + exp(sink))
    out = (P * multiplier) v

A score that a mask excludes is -inf. A query with no score left has P = 0, out = 0 and lse = -inf.
``multiplier`` is the random part, constant for the derivative. A backend may make the scores' part
in its own way, with the same values: :data:`Keep` and :data:`OfScores`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec.attention import AttentionInputs, AttentionOptions, empty_output
from ...spec.operands import AttentionBackward, inputs_of
from .blocks import blocks, is_block
from .elementwise import compute, to
from .softmax import (
    RandomPart,
    are_finite,
    attention_multiplier,
    band,
    masked_scores,
    safe_softmax,
)

Gradients = tuple[Tensor | None, ...]
_P = ParamSpec("_P")
_R = TypeVar("_R")


def repeat(t: Tensor, heads: int) -> Tensor:
    """Key heads [B, Hkv, S, E], each for its group of query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def scores(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """(scores, tanh(score / softcap) where there is a softcap), [B, H, Sq, Sk]."""
    query, key, mask, key_mask = inputs.query, inputs.key, inputs.mask, inputs.key_mask
    score = (query * options.scale) @ repeat(key, query.shape[1]).transpose(-1, -2)
    capped: Tensor | None = None
    if options.softcap:
        capped = torch.tanh(score / options.softcap)
        score = capped * options.softcap
    score = masked_scores(score, mask, options)
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return score, capped


def _has_float_mask(inputs: AttentionInputs) -> bool:
    return inputs.mask is not None and inputs.mask.dtype != torch.bool


def wide_of(inputs: AttentionInputs) -> AttentionInputs:
    """The call in the dtype that is computed in."""
    mask = inputs.mask if _has_float_mask(inputs) else None
    q, k, v, floats, sinks = compute(inputs.query, inputs.key, inputs.value, mask, inputs.sinks)
    assert q is not None
    assert k is not None
    assert v is not None
    mask = inputs.mask if floats is None else floats
    return inputs._replace(query=q, key=k, value=v, mask=mask, sinks=sinks)


def as_given(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Without autocast, which would make 16 bits of products of fp32 operands."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call


def kept_probabilities(
    inputs: AttentionInputs,
    options: AttentionOptions,
    random_part: RandomPart = attention_multiplier,
) -> tuple[Tensor, Tensor]:
    """(P * multiplier, lse) of a block."""
    score, _ = scores(inputs, options)
    probabilities, lse, _ = safe_softmax(score, inputs.sinks)
    return random_part(tuple(score.shape), inputs.seed, inputs.p, options)(probabilities), lse


Keep = Callable[[AttentionInputs, AttentionOptions], tuple[Tensor, Tensor]]


@as_given
def attention_forward(
    inputs: AttentionInputs, options: AttentionOptions, keep: Keep = kept_probabilities
) -> tuple[Tensor, Tensor]:
    """(out, lse): out as empty_output makes it; lse [B, H, Sq], fp32, or fp64 for fp64."""
    query = inputs.query
    out = empty_output(query, inputs.value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    if inputs.cu_query is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    for block in blocks(inputs, options):
        one = wide_of(block.inputs)
        kept, log_sum = keep(one, block.options)
        out[block.query] = kept @ repeat(one.value, one.query.shape[1])
        lse[block.query] = log_sum
    return out, lse


@as_given
def composed(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The op in torch's own operators, of sequences that are not packed."""
    wide = wide_of(inputs)
    score, _ = scores(wide, options)
    probabilities, lse, _ = safe_softmax(score, wide.sinks)
    drop = attention_multiplier(score.shape, inputs.seed, inputs.p, options)
    out = drop(probabilities) @ repeat(wide.value, wide.query.shape[1])
    return to(out, inputs.query.dtype), lse


@as_given
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
    key, value = (repeat(t, query.shape[1]) for t in (inputs.key, inputs.value))
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=options.scale
    )


class ScoreGradients(NamedTuple):
    """What a block's gradients are made of, beside its operands."""

    kept: Tensor  # P * multiplier
    dscore: Tensor  # of the scores with their mask
    capped: Tensor | None  # as :func:`scores` gives it
    dsinks: Tensor | None  # [H]


def score_gradients(
    dkept: Tensor,
    delta: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    random_part: RandomPart = attention_multiplier,
) -> ScoreGradients:
    """Of a block; ``dkept`` is the gradient of P * multiplier.

    ``delta`` and ``lse`` are given where they are those of more keys than these.
    """
    score, capped = scores(inputs, options)
    drop = random_part(tuple(score.shape), inputs.seed, inputs.p, options)
    probabilities, _, sink = safe_softmax(score, inputs.sinks)
    if lse is not None:
        lse = lse.unsqueeze(-1)
        probabilities = torch.where(lse == -torch.inf, 0, torch.exp(score - lse))
    kept = drop(probabilities)
    terms = kept * dkept
    of_these = delta is None
    if delta is None:
        delta = terms.sum(-1, keepdim=True)
    finite = are_finite(delta)
    if not finite:  # what is dropped, or has no part, has none in the sum, and no gradient
        terms = (probabilities * drop(dkept)).masked_fill(probabilities == 0, 0.0)
        delta = terms.sum(-1, keepdim=True) if of_these else delta
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
        finite = finite and are_finite(delta)
    dscore = torch.addcmul(terms, probabilities, delta, value=-1)
    if not finite:
        dscore = dscore.masked_fill(probabilities == 0, 0.0)
    dsinks = None if sink is None else -(sink * delta).sum((0, 2, 3))
    return ScoreGradients(kept, dscore, capped, dsinks)


# As score_gradients().
OfScores = Callable[
    [
        Tensor,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        AttentionInputs,
        AttentionOptions,
    ],
    ScoreGradients,
]


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    needs: tuple[bool, ...],
    of_scores: OfScores,
) -> Gradients:
    """Of one block; see :func:`attention_gradients`."""
    query, key, mask = inputs.query, inputs.key, inputs.mask
    heads, groups = query.shape[1], key.shape[1]
    dkept = dout @ repeat(inputs.value, heads).transpose(-1, -2)
    delta = None if out is None else (dout * out).sum(-1, keepdim=True)
    kept, dscore, capped, dsinks = of_scores(dkept, delta, dlse, lse, inputs, options)
    dvalue = kept.transpose(-1, -2) @ dout
    draw = dscore if capped is None else dscore * (1 - capped * capped)

    def of_groups(t: Tensor) -> Tensor:
        """Sum over the query heads that share a key head."""
        return t if groups == heads else t.unflatten(1, (groups, heads // groups)).sum(2)

    return (
        draw @ repeat(key, heads) * options.scale if needs[0] else None,
        of_groups(draw.transpose(-1, -2) @ (query * options.scale)) if needs[1] else None,
        of_groups(dvalue) if needs[2] else None,
        dscore.sum_to_size(mask.shape) if needs[3] and mask is not None else None,
        dsinks if needs[4] else None,
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
    of_scores: OfScores = score_gradients,
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
        return _gradients(grad, dlse, out, lse, wide_of(given), its, needs, of_scores)
    totals = [
        None if t is None or not need else dout.new_zeros(t.shape, dtype=wide)
        for t, need in zip(like, needs, strict=True)
    ]
    for block in blocks(given, its):
        grad, dlse_part, out_part, lse_part = (
            None if t is None else t[block.query].to(wide) for t in (dout, dlse, out, lse)
        )
        assert grad is not None
        of_block = wide_of(block.inputs), block.options
        found = _gradients(grad, dlse_part, out_part, lse_part, *of_block, needs, of_scores)
        places = (block.query, block.key, block.key, block.mask, (block.heads,))
        for sums, gradient, place in zip(totals, found, places, strict=True):
            if sums is not None and gradient is not None:
                sums[place].add_(gradient)
    return tuple(totals)


def _like(t: Tensor, source: Tensor) -> Tensor:
    """A gradient in the dtype and the layout of its tensor."""
    room = torch.empty_like(source)
    return t if t.dtype == room.dtype and t.stride() == room.stride() else room.copy_(t)


@as_given
def attention_backward(
    operands: AttentionBackward,
    options: AttentionOptions,
    needs: tuple[bool, ...],
    of_scores: OfScores = score_gradients,
) -> Gradients:
    """Gradients of query, key, value, mask and sinks, like their tensors, or None."""
    dout, dlse, out, lse, *_ = operands
    inputs = inputs_of(operands)
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    known_out, known_lse = (out, lse) if options.block else (None, None)
    results = attention_gradients(
        dout, dlse, *like, None, (inputs, options), needs, known_out, known_lse, of_scores
    )
    return as_tensors(results, inputs)


def as_tensors(results: Gradients, inputs: AttentionInputs) -> Gradients:
    """The gradients in the dtypes and the layouts of their tensors."""
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    return tuple(
        None if t is None or source is None else _like(t, source)
        for t, source in zip(results, like, strict=True)
    )
