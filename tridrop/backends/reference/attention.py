"""Attention in torch, computed by blocks of queries: the composition that the kernels must equal.

    score = scale * q k^T;   score = softcap * tanh(score / softcap);   score = score + mask
    P = exp(score - lse),   lse = log(sum over keys of exp(score) + exp(sink))
    out = (P * multiplier) v

The score of a key that a mask or a band excludes is -inf. A query whose keys are all excluded has
P = 0, out = 0 and lse = -inf. ``multiplier`` is the random part, a constant for the derivative. A
backend may compute the steps of a block in its own way, with the same values: see :class:`Steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.torch_private import transformation
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
    """Key heads [B, Hkv, S, E], each repeated for its group of query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def scores(
    inputs: AttentionInputs,
    options: AttentionOptions,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, Tensor | None]:
    """(scores, tanh(score / softcap) or None without a softcap), both [B, H, Sq, Sk]."""
    query, key, mask, key_mask = inputs.query, inputs.key, inputs.mask, inputs.key_mask
    score = multiply(query * options.scale, repeat(key, query.shape[1]).transpose(-1, -2))
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
    """The operands in the dtype of the arithmetic, fp32 or fp64."""
    mask = inputs.mask if _has_float_mask(inputs) else None
    q, k, v, floats, sinks = compute(inputs.query, inputs.key, inputs.value, mask, inputs.sinks)
    assert q is not None
    assert k is not None
    assert v is not None
    mask = inputs.mask if floats is None else floats
    return inputs._replace(query=q, key=k, value=v, mask=mask, sinks=sinks)


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with autocast off, which would compute products of fp32 operands in 16 bits."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
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


class ScoreGradients(NamedTuple):
    """What a block's gradients are computed from, besides its operands."""

    kept: Tensor  # P * multiplier
    dscore: Tensor  # the gradient of the scores after the attention mask
    capped: Tensor | None  # the second result of scores()
    dsinks: Tensor | None  # [H]


class Product(NamedTuple):
    """A gradient that is scale * left @ right, [B, H, M, N], or its sums over groups of heads."""

    left: Tensor
    right: Tensor
    scale: float
    heads: int  # of the gradient

    def value(self) -> Tensor:
        """The gradient; differentiable."""
        found = self.left @ self.right
        if self.scale != 1:
            found = found * self.scale
        if self.heads == found.shape[1]:
            return found
        return found.unflatten(1, (self.heads, found.shape[1] // self.heads)).sum(2)


def write(gradient: Product | Tensor, into: Tensor, add: bool) -> None:
    """Write a gradient, or add it to what is there."""
    found = gradient.value() if isinstance(gradient, Product) else gradient
    if add:
        into.add_(found)
    else:
        into.copy_(found)


@without_autocast
def composed(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The op in torch's own operators, for sequences that are not packed."""
    wide = wide_of(inputs)
    score, _ = scores(wide, options)
    probabilities, lse, _ = safe_softmax(score, wide.sinks)
    drop = attention_multiplier(score.shape, inputs.seed, inputs.p, options)
    out = drop(probabilities) @ repeat(wide.value, wide.query.shape[1])
    return to(out, inputs.query.dtype), lse


@without_autocast
def torchs(inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
    """torch's own attention, with everything that excludes keys in one attention mask."""
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


def score_gradients(
    dkept: Tensor,
    delta: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    random_part: RandomPart = attention_multiplier,
) -> ScoreGradients:
    """The :class:`ScoreGradients` of a block; ``dkept`` is the gradient of P * multiplier.

    ``delta`` and ``lse`` are given where they come from more keys than those of the block.
    """
    score, capped = scores(inputs, options)
    drop = random_part(tuple(score.shape), inputs.seed, inputs.p, options)
    probabilities, _, sink = safe_softmax(score, inputs.sinks)
    if lse is not None:
        lse = lse.unsqueeze(-1)
        probabilities = torch.where(lse == -torch.inf, 0, torch.exp(score - lse))
    kept = drop(probabilities)
    terms = kept * dkept
    sums_here = delta is None
    if delta is None:
        delta = terms.sum(-1, keepdim=True)
    finite = are_finite(delta)
    if not finite:  # dropped and excluded keys must count neither in the sum nor as a gradient
        terms = (probabilities * drop(dkept)).masked_fill(probabilities == 0, 0.0)
        delta = terms.sum(-1, keepdim=True) if sums_here else delta
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
        finite = finite and are_finite(delta)
    dscore = torch.addcmul(terms, probabilities, delta, value=-1)
    if not finite:
        dscore = dscore.masked_fill(probabilities == 0, 0.0)
    dsinks = None if sink is None else -(sink * delta).sum((0, 2, 3))
    return ScoreGradients(kept, dscore, capped, dsinks)


class Steps(NamedTuple):
    """How a block is computed: by this file's differentiable functions, or a backend's own."""

    keep: Callable[..., tuple[Tensor, Tensor]]  # as kept_probabilities()
    of_scores: Callable[..., ScoreGradients]  # as score_gradients()
    multiply: Callable[[Tensor, Tensor], Tensor]  # a product of matrices [B, H, M, K], [B, H, K, N]
    write: Callable[[Product | Tensor, Tensor, bool], None]  # as write()
    in_place: bool  # whether results are written where they stay even if a call is one block


STEPS = Steps(kept_probabilities, score_gradients, torch.matmul, write, False)


@without_autocast
def attention_forward(
    inputs: AttentionInputs, options: AttentionOptions, steps: Steps = STEPS
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
        kept, lse[block.query] = steps.keep(one, block.options)
        heads = one.query.shape[1]
        attended = Product(kept, repeat(one.value, heads), 1.0, heads)
        steps.write(attended, out[block.query], False)
    return out, lse


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    needs: tuple[bool, ...],
    steps: Steps,
) -> tuple[Product | Tensor | None, ...]:
    """The gradients of one block; see :func:`attention_gradients`."""
    query, key, mask, scale = inputs.query, inputs.key, inputs.mask, options.scale
    heads, groups = query.shape[1], key.shape[1]
    dkept = steps.multiply(dout, repeat(inputs.value, heads).transpose(-1, -2))
    delta = None if out is None else (dout * out).sum(-1, keepdim=True)
    kept, dscore, capped, dsinks = steps.of_scores(dkept, delta, dlse, lse, inputs, options)
    draw = dscore if capped is None else dscore * (1 - capped * capped)
    return (
        Product(draw, repeat(key, heads), scale, heads) if needs[0] else None,
        Product(draw.transpose(-1, -2), query, scale, groups) if needs[1] else None,
        Product(kept.transpose(-1, -2), dout, 1.0, groups) if needs[2] else None,
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
    steps: Steps = STEPS,
) -> Gradients:
    """Gradients of query, key, value, mask and sinks; differentiable.

        dS = P * multiplier * (dout v^T) - P * delta
        delta = sum over keys of P * multiplier * (dout v^T) - dlse
        dq = scale * dS k;   dk = scale * dS^T q;   dv = (P * multiplier)^T dout;   dmask = dS
        dsink = - P(sink) * delta

    ``options`` is a pair: the operands, of which this takes those without a derivative, and the
    options. ``drop`` is ignored, since each block draws its own mask. ``out`` and ``lse`` are given
    where they come from more keys than these. Where several blocks share an operand, its gradient
    is summed in fp32 or fp64, in the order of the blocks.
    """
    inputs, settings = options
    mask = mask if _has_float_mask(inputs) else inputs.mask
    inputs = inputs._replace(query=query, key=key, value=value, mask=mask, sinks=sinks)
    like = (query, key, value, mask, sinks)
    wide = reduce(torch.promote_types, (t.dtype for t in like if t is not None), torch.float32)
    whole = is_block(inputs, settings)
    if whole and not steps.in_place:
        grad, dlse, out, lse = (None if t is None else t.to(wide) for t in (dout, dlse, out, lse))
        assert grad is not None
        found = _gradients(grad, dlse, out, lse, wide_of(inputs), settings, needs, steps)
        return tuple(t.value() if isinstance(t, Product) else t for t in found)
    # Every block has queries of its own. Without a band, blocks have all keys of other heads, or
    # all keys of the same ones; of these the first one writes, and the others add.
    whole_keys = settings.lower is None and settings.upper is None and inputs.cu_query is None
    whole_queries = inputs.cu_query is None
    written_whole = (whole_queries, whole_keys or whole, whole_keys or whole, whole, whole)
    totals = [
        None if t is None or not need else _sums(t, dout, wide, first)
        for t, need, first in zip(like, needs, written_whole, strict=True)
    ]
    written = set()
    for block in blocks(inputs, settings):
        grad, dlse_part, out_part, lse_part = (
            None if t is None else t[block.query].to(wide) for t in (dout, dlse, out, lse)
        )
        assert grad is not None
        of_block = wide_of(block.inputs), block.options
        gradients = _gradients(grad, dlse_part, out_part, lse_part, *of_block, needs, steps)
        places = (block.query, block.key, block.key, block.mask, (block.heads,))
        for i, (sums, gradient, place) in enumerate(zip(totals, gradients, places, strict=True)):
            if sums is None or gradient is None:
                continue
            at = i, *((part.start, part.stop) for part in place)
            steps.write(gradient, sums[place], not written_whole[i] or at in written)
            written.add(at)
    return tuple(totals)


def _sums(t: Tensor, dout: Tensor, dtype: torch.dtype, written_whole: bool) -> Tensor:
    """Memory for the gradient of ``t``, with its strides where they need not be made later.

    It is 0, unless blocks write to all of it before they add.
    """
    if not written_whole:
        return dout.new_zeros(t.shape, dtype=dtype)
    if transformation() is None:
        return torch.empty_like(t, dtype=dtype)
    return dout.new_empty(t.shape, dtype=dtype)


def _like(t: Tensor, source: Tensor) -> Tensor:
    """A gradient in the dtype and with the strides of its tensor."""
    empty = torch.empty_like(source)
    return t if t.dtype == empty.dtype and t.stride() == empty.stride() else empty.copy_(t)


def wide_gradients(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...], steps: Steps
) -> Gradients:
    """Gradients of query, key, value, mask and sinks in fp32 or fp64; None if not needed."""
    dout, dlse, out, lse, *_ = operands
    inputs = inputs_of(operands)
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    whole_out, whole_lse = (out, lse) if options.block else (None, None)
    return attention_gradients(
        dout, dlse, *like, None, (inputs, options), needs, whole_out, whole_lse, steps
    )


@without_autocast
def attention_backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of query, key, value, mask and sinks, like their tensors; None if not needed."""
    return as_tensors(wide_gradients(operands, options, needs, STEPS), inputs_of(operands))


def as_tensors(results: Gradients, inputs: AttentionInputs) -> Gradients:
    """The gradients in the dtypes and with the strides of their tensors."""
    like = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    return tuple(
        None if t is None or source is None else _like(t, source)
        for t, source in zip(results, like, strict=True)
    )
