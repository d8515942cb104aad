"""Softmax and dropout of scores on a CPU: one compiled loop each for forward and backward.

The formulas and the rounding are those of the reference, to which calls go that the loops do not
serve: fp64, a ``p`` in a tensor, and, in attention, sinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import Facts, readable, whole
from ...contract import mask as contract
from ...spec.attention import AttentionOptions, SoftmaxOptions, four
from ...spec.operands import Softmax, SoftmaxBackward
from ..reference import softmax as reference
from ..reference.elementwise import Dtypes, Multiplier, unaliased
from ..reference.softmax import masked_scores, widened
from . import masks, serving
from .memory import NONE, NUMBERS, SEED, Operand, Reads, Tensors, blanks, in_fp32, matrix, result
from .threads import parts_of, share

_FAR = 1 << 62  # a bound beyond all indices
# What the kernels take for scores that are there: how they are cut, and no handles.
NO_PRODUCTS = {
    "softmax_forward": ((1, 1, 0, 0), (0,) * 5),
    "softmax_backward": ((1, 1, 0, 0), (0,) * 8),
}


def serves(seed: Tensor | None, p: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the loops take such scores and attention masks."""
    for t in tensors:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu" or not t.numel()):
            return False
    return p is None and readable(seed)


def without_band(options: AttentionOptions) -> AttentionOptions:
    """The options without a band, for scores that go to the loops, which apply the band."""
    return replace(options, lower=None, upper=None)


@lru_cache(256)
def _reads(shape: tuple[int, ...], backward: bool) -> Reads:
    """What the loops read of scores of ``shape`` and the gradients."""
    rows, count = math.prod(shape[:-1]), math.prod(shape)
    scores = Operand("scores", count)
    if not backward:
        return Reads.of(SEED, scores)
    grads = Operand("dout", count), Operand("dsoftmax", count), Operand("dlse", rows, NUMBERS)
    return Reads.of(SEED, scores, *grads)


def arguments_of(
    shape: Sequence[int], options: AttentionOptions, scale: float, *results: Any
) -> tuple[Any, ...]:
    """What the kernels take, for scores of ``shape``, before the ways in which they are cut."""
    _, heads, queries, keys = four(shape)
    threshold = options.threshold()
    decisions = (contract.DOMAINS["attention"] << 28, threshold - 1, *options.origin)
    band = (
        -_FAR if options.lower is None else options.lower,
        _FAR if options.upper is None else options.upper,
    )
    factor = options.keep_scale()
    return (keys, (heads, queries), decisions, factor, band, float(scale), *results)


def _call(
    name: str,
    tensors: Tensors,
    reads: Reads,
    options: AttentionOptions,
    scale: float,
    keep_alive: Any,
    *results: Any,
) -> None:
    """Call a kernel for all rows of the scores, by several threads.

    ``reads`` says what the kernel reads of the ``tensors``: the seed, the scores, and others.
    ``keep_alive`` holds those to whose memory ``results`` point.
    """
    x = tensors[1]
    assert x is not None
    batch, heads, queries, keys = four(x.shape)
    kernel = getattr(serving.kernels(), name)
    given = (*arguments_of(x.shape, options, scale, *results), *NO_PRODUCTS[name])
    share(kernel, parts_of(batch * heads * queries, keys), tensors, reads, given, keep_alive)


def forward(
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    scale: float,
    out: Tensor,
    probabilities: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Fill ``out`` with dropout(softmax(scale * x)) within the band; likewise the optional results.

    ``probabilities`` get the softmax before dropout and ``lse`` the log-sum-exp, in fp32. All are
    contiguous, and ``out`` may be ``x``.
    """
    results = (matrix(out), matrix(probabilities), matrix(lse)[0])
    held, reads = (out, probabilities, lse), _reads(x.shape, False)
    _call("softmax_forward", (seed, x), reads, options, scale, held, results)


def backward(
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    scale: float,
    dout: Tensor | None,
    dx: Tensor,
    dsoftmax: Tensor | None = None,
    dlse: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Fill ``dx`` with the gradient of x, and ``kept``, where given, with forward's ``out``.

    Both are contiguous, and ``dlse`` is fp32. ``kept`` may be ``x``, and ``dx`` may be ``dout``.
    """
    dlse = None if dlse is None else in_fp32(dlse, "dlse")
    tensors = (seed, x, dout, dsoftmax, dlse)
    held, reads = (dx, kept), _reads(x.shape, True)
    _call("softmax_backward", tensors, reads, options, scale, held, matrix(kept), matrix(dx))


class ScoreMultiplier(Multiplier):
    """The random part of scores: a :class:`Multiplier` that is faster where autograd is not used.

    There it takes the bitwise "and" of the numbers and the mask, which takes a fifth of the time of
    torch.where on a CPU and gives exactly 0 for a dropped NaN as well.
    """

    def __call__(self, value: Tensor) -> Tensor:
        """value * scale where kept, exactly 0 elsewhere."""
        plain = value.dtype == torch.float32 and readable(value) and not value.requires_grad
        if self.keep is None or not plain:
            return super().__call__(value)
        ones = self.keep.view(torch.int8).neg().to(torch.int32)  # all bits set, or none
        return (value.view(torch.int32) & ones).view(torch.float32) * self.scale


def attention_multiplier(
    shape: Sequence[int], seed: Tensor | None, p: Tensor | None, options: AttentionOptions
) -> Multiplier:
    """The random part for scores of ``shape``, with a mask from the loops."""
    return ScoreMultiplier(*reference.attention_multiplier(shape, seed, p, options, masks))


class PreparedSoftmax(NamedTuple):
    """The softmax family, for calls whose scores have one shape."""

    options: SoftmaxOptions
    like: dict[torch.dtype, Tensor]  # how results are made
    forward_reads: Reads
    backward_reads: Reads

    def forward(self, operands: Softmax) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, softmax or None, lse); the log-sum-exp is 0, since backward does not need it."""
        x, scale = _scaled(operands.scores, operands.mask, self.options)
        scores, _, seed, _ = operands
        out, at = result(self.like[scores.dtype])
        both = torch.empty_like(out) if self.options.return_softmax else None
        results = at, matrix(both), 0
        tensors, reads, held = (seed, x), self.forward_reads, (out, both)
        _call("softmax_forward", tensors, reads, self.options, scale, held, results)
        return out, both, scores.new_zeros(scores.shape[:-1], dtype=torch.float32)

    def backward(self, operands: SoftmaxBackward, dtypes: Dtypes) -> tuple[Tensor | None, ...]:
        """The gradients of scores and mask."""
        dout, dsoftmax, scores, mask, _, seed, _ = operands
        x, scale = _scaled(scores, mask, self.options)
        # Without a mask, the scores themselves are what needs a gradient.
        dtype = dtypes[0] if mask is None else torch.float32
        assert dtype is not None
        dx, at = result(self.like[dtype])
        tensors, reads = (seed, x, dout, dsoftmax, None), self.backward_reads
        _call("softmax_backward", tensors, reads, self.options, scale, dx, NONE, at)
        dscores = dmask = None
        if dtypes[0] is not None:
            factor = self.options.scale
            dscores = (dx if scale == factor else dx * factor).to(dtypes[0])
        if dtypes[1] is not None and mask is not None:
            dmask = unaliased(dx.sum_to_size(mask.shape).to(dtypes[1]), dx)
        return dscores, dmask

    def held_to(self, saved: tuple[Facts, ...]) -> tuple[PreparedSoftmax, tuple[Facts, ...]]:
        """See :class:`tridrop.spec.operands.Prepared`."""
        if any(facts.name == "mask" for facts in saved):
            return self, saved  # the kernel gets scores to which torch has added the mask
        reads, others = self.backward_reads.held_to(saved)
        return self._replace(backward_reads=reads), others


def prepare(
    shape: tuple[int, ...],
    options: SoftmaxOptions,
    operands: Softmax | SoftmaxBackward,
    wanted: Sequence[Any],
) -> PreparedSoftmax | None:
    """Both directions; None where the loops do not serve such calls, or torch's softmax does."""
    scores, mask, seed, p = operands.scores, operands.mask, operands.seed, operands.p
    if _is_torchs(mask, options) or not serves(seed, p, scores, mask):
        return None
    return PreparedSoftmax(options, blanks(shape), _reads(shape, False), _reads(shape, True))


def _is_torchs(mask: Tensor | None, options: AttentionOptions) -> bool:
    """Whether the op is nothing but torch's softmax."""
    whole = options.lower is None and options.upper is None
    return options.threshold() == 0 and mask is None and options.scale == 1 and whole


def _scaled(scores: Tensor, mask: Tensor | None, options: AttentionOptions) -> tuple[Tensor, float]:
    """Contiguous scores with the attention mask added, and the factor that they still need.

    The band is not applied, since the loops apply it. ValueError where torch's operators would read
    a tensor that has lost its memory.
    """
    if mask is None:
        if scores.is_contiguous():
            return scores, options.scale
        return whole(scores, "scores").contiguous(), options.scale
    wide, added = widened(whole(scores, "scores"), whole(mask, "mask"))
    masked = masked_scores(options.scale * wide, added, without_band(options))
    return masked.contiguous(), 1.0
