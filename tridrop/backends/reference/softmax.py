"""Softmax and dropout of attention scores in torch.

    s   = scale * scores + mask              -inf where a key is excluded
    P   = exp(s - lse)                       lse = log(sum(exp(s))); P = 0 in a row without keys
    out = P * multiplier

``multiplier`` is keep * scale of the probabilities, a constant for the derivative. Attention uses
:func:`band` and :func:`attention_multiplier` too. A backend may pass a ``random_part`` of its own
with the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...base.memory import readable
from ...base.torch_private import aten_softmax_backward
from ...contract import mask as contract
from ...spec.attention import AttentionOptions, SoftmaxOptions, four
from ...spec.operands import Softmax, SoftmaxBackward
from .elementwise import Dtypes, Multiplier, compute, to, unaliased

# A function (shape of the scores, seed, p in a tensor, options) that gives their random part.
RandomPart = Callable[[Sequence[int], Tensor | None, Tensor | None, AttentionOptions], Multiplier]


def attention_multiplier(
    shape: Sequence[int],
    seed: Tensor | None,
    p: Tensor | None,
    options: AttentionOptions,
    draw: ModuleType = contract,
) -> Multiplier:
    """The random part for scores of ``shape``, ``[..., queries, keys]``.

    ``draw`` is the module that draws the mask: the contract's, or a backend's twin of it.
    """
    threshold: int | Tensor = options.threshold()
    factor: float | Tensor = options.keep_scale()
    if p is not None:
        table = contract.rate_table(p)
        threshold, factor = table[0].to(torch.int64), table[1]
    elif threshold == 0:
        return Multiplier(None, 1.0)
    assert seed is not None
    keep = draw.attention_keep_mask(seed, four(shape), threshold, origin=options.origin)
    return Multiplier(keep.reshape(tuple(shape)), factor)


def band(queries: int, keys: int, options: AttentionOptions, device: torch.device) -> Tensor | None:
    """Which keys have ``lower <= key - query <= upper``: bool, [queries, keys]; None if all do."""
    upper = keys if options.upper is None else max(options.upper, -queries)
    lower = -queries if options.lower is None else min(options.lower, keys)
    if upper >= keys - 1 and lower <= 1 - queries:
        return None
    return torch.ones((queries, keys), dtype=torch.bool, device=device).tril(upper).triu(lower)


def masked_scores(scores: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """Scaled scores plus a float attention mask; -inf where a bool mask or the band excludes."""
    allowed = band(scores.shape[-2], scores.shape[-1], options, scores.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else allowed & mask
    elif mask is not None:
        scores = scores + mask
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def safe_softmax(
    scores: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(probabilities, log-sum-exp, probability of the sink); a row without keys has zeros and -inf.

    ``sinks`` has one entry per head, dimension -3, which takes part in the sum. All results can be
    differentiated any number of times.
    """
    if scores.shape[-1]:
        largest = scores.detach().amax(-1, keepdim=True)
    else:
        largest = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.detach()[:, None, None])
    largest = torch.where(largest == -math.inf, 0.0, largest)
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(-1, keepdim=True)
    share: Tensor | None = None
    if sinks is not None:
        share = torch.exp(sinks[:, None, None] - largest)
        total = total + share
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, largest + torch.log(total)).squeeze(-1)
    # An excluded key has the probability 0 even in a row with NaN.
    probabilities = torch.where(scores == -math.inf, 0.0, exponentials / total)
    return probabilities, lse, None if share is None else share / total


def _differentiable(scores: Tensor) -> Tensor:
    return safe_softmax(scores)[0]


def _probabilities(scores: Tensor) -> Tensor:
    """The probabilities without a derivative, in one pass and in the dtype of the scores."""
    if scores.device.type == "cpu" and scores.numel():
        found = torch.softmax(scores, -1)
        # torch gives NaN for all of a row without keys, and for all of a row with a NaN.
        if not bool(found[..., 0].isnan().any()):
            return found
    (wide,) = compute(scores)
    assert wide is not None
    return _differentiable(wide).to(scores.dtype)


def softmax_forward(
    operands: Softmax,
    options: SoftmaxOptions,
    random_part: RandomPart = attention_multiplier,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, softmax or None, lse), with lse = 0: this file's backward computes it again."""
    scores, mask, seed, p = operands
    drop = random_part(scores.shape, seed, p, options)
    if drop.keep is None and options.scale == 1 and (mask is None or mask.dtype == torch.bool):
        score = masked_scores(scores, mask, options)  # torch's softmax is fp32 inside
    else:
        wide, added = widened(scores, mask)
        score = masked_scores(options.scale * wide, added, options)
    probabilities = _probabilities(score)
    out = unaliased(drop(probabilities).to(scores.dtype), scores)
    softmax = unaliased(probabilities.to(scores.dtype), out) if options.return_softmax else None
    lse = scores.new_zeros(scores.shape[:-1], dtype=torch.float32)
    return out, softmax, lse


def composed(operands: Softmax, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, softmax), both in torch's own operators."""
    scores, mask, seed, p = operands
    wide, added = widened(scores, mask)
    scaled = wide if options.scale == 1 else options.scale * wide
    if mask is None and options.lower is None and options.upper is None:
        probabilities = torch.softmax(scaled, -1)
    else:  # some rows may be without keys
        probabilities = _differentiable(masked_scores(scaled, added, options))
    drop = attention_multiplier(scores.shape, seed, p, options)
    return to(drop(probabilities), scores.dtype), to(probabilities, scores.dtype)


def softmax_gradients(
    dout: Tensor | None,
    dsoftmax: Tensor | None,
    scores: Tensor,
    mask: Tensor | None,
    drop: Multiplier,
    options: AttentionOptions,
    needs: tuple[bool, ...],
    softmax: Callable[[Tensor], Tensor] = _differentiable,
) -> tuple[Tensor | None, ...]:
    """Gradients of the scores and a float mask; differentiable if the function ``softmax`` is."""
    scale = options.scale
    scaled = scores if scale == 1 else scale * scores
    probabilities = softmax(masked_scores(scaled, mask, options))
    dp = torch.zeros_like(probabilities) if dout is None else drop(dout)
    if dsoftmax is not None:
        dp = dp + dsoftmax
    ds = of_scores(dp, probabilities)
    return (
        None if not needs[0] else ds if scale == 1 else scale * ds,
        ds.sum_to_size(mask.shape) if needs[1] and mask is not None else None,
    )


def of_scores(dprobabilities: Tensor, probabilities: Tensor) -> Tensor:
    """P * (dP - sum(dP * P)) by torch's own backward of the softmax; differentiable.

    It is 0 where P is 0, whatever dP is there or elsewhere in the row.
    """
    dtype = probabilities.dtype
    found = aten_softmax_backward(dprobabilities, probabilities, -1, dtype)
    if are_finite(found[..., :1]):  # if a row's sum is not finite, none of its elements is
        return found
    excluded = probabilities == 0
    incoming = dprobabilities.masked_fill(excluded, 0.0)
    found = aten_softmax_backward(incoming, probabilities, -1, dtype)
    return found.masked_fill(excluded, 0.0)


def are_finite(t: Tensor) -> bool:
    """Whether the host can read the numbers and all of them are finite.

    It looks at their sum, which takes one pass whatever the strides.
    """
    return readable(t) and not t.requires_grad and math.isfinite(t.sum())


def softmax_backward(
    operands: SoftmaxBackward,
    options: SoftmaxOptions,
    dtypes: Dtypes,
    random_part: RandomPart = attention_multiplier,
) -> tuple[Tensor | None, ...]:
    """Gradients of scores and mask in these dtypes; None where the dtype is None."""
    dout, dsoftmax, scores, mask, _, seed, p = operands
    drop = random_part(scores.shape, seed, p, options)
    wide, added = widened(scores, mask)
    g, h = compute(dout, dsoftmax)
    needs = tuple(dtype is not None for dtype in dtypes)
    results = softmax_gradients(g, h, wide, added, drop, options, needs, _probabilities)
    dscores, dmask = (
        None if t is None or dtype is None else t.to(dtype).contiguous()
        for t, dtype in zip(results, dtypes, strict=True)
    )
    if dmask is not None:
        dmask = unaliased(dmask, scores if dscores is None else dscores)
    return dscores, dmask


def widened(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both tensors in fp32 or fp64, the dtype of the arithmetic; a bool mask stays as it is."""
    if mask is not None and mask.dtype == torch.bool:
        (wide,) = compute(scores)
        added: Tensor | None = mask
    else:
        wide, added = compute(scores, mask)
    assert wide is not None
    return wide, added
