"""Softmax and dropout of scores on a CPU: one compiled loop each for forward and backward.

The formulas and the rounding are those of the reference, to which calls go that the loops do not
serve: fp64, a ``p`` in a tensor, and, in attention, sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...base.memory import readable
from ...contract import mask as contract
from ...spec.attention import AttentionOptions, SoftmaxOptions, four
from ...spec.operands import Functions, Prepared, Softmax, SoftmaxBackward
from ..reference import softmax as reference
from ..reference.elementwise import Dtypes, Multiplier, unaliased
from ..reference.softmax import masked_scores, widened
from . import masks, serving
from .memory import matrix, result, vector
from .threads import parts_of, share

_FAR = 1 << 62  # a bound beyond all indices


def serves(seed: Tensor | None, p: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the loops take such scores and attention masks."""
    for t in tensors:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu" or not t.numel()):
            return False
    return p is None and readable(seed)


def without_band(options: AttentionOptions) -> AttentionOptions:
    """The options without a band, for scores that go to the loops, which apply the band."""
    return replace(options, lower=None, upper=None)


def _call(
    name: str,
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    keep_alive: Any,
    *arguments: Any,
) -> None:
    """Call a kernel for all rows of the scores ``x``, by several threads.

    ``keep_alive`` holds the tensors to whose memory the arguments point.
    """
    batch, heads, queries, keys = four(x.shape)
    rows = batch * heads * queries
    threshold = options.threshold()
    pair, address = masks.pair_of(seed)
    decisions = (address, contract.DOMAINS["attention"] << 28, threshold - 1, *options.origin)
    band = (
        -_FAR if options.lower is None else options.lower,
        _FAR if options.upper is None else options.upper,
    )
    kernel = getattr(serving.kernels(), name)
    given = (keys, (heads, queries), decisions, options.keep_scale(), band, *arguments)
    share(kernel, parts_of(rows, keys), given, (keep_alive, pair))


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
    rows, count = x.numel() // x.shape[-1], x.numel()
    (_x, u), (_out, o) = matrix(x, count, "scores"), matrix(out, count, "out")
    (_both, b), (_lse, m) = matrix(probabilities, count, "softmax"), vector(lse, rows, "lse")
    _call(
        "softmax_forward", x, seed, options, (_x, _out, _both, _lse),
        float(scale), u, o, b, m,
    )  # fmt: skip


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
    rows, count = x.numel() // x.shape[-1], x.numel()
    (_x, u), (_dx, o) = matrix(x, count, "scores"), matrix(dx, count, "dx")
    (_dout, d), (_both, s) = matrix(dout, count, "dout"), matrix(dsoftmax, count, "dsoftmax")
    (_dlse, m), (_kept, k) = vector(dlse, rows, "dlse"), matrix(kept, count, "kept")
    _call(
        "softmax_backward", x, seed, options, (_x, _dx, _dout, _both, _dlse, _kept),
        float(scale), (u, d, s, m), k, o,
    )  # fmt: skip


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


def softmax_forward(
    operands: Softmax, options: SoftmaxOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, softmax or None, lse) by the loops."""
    scores, mask, seed, _ = operands
    x, scale = _scaled(scores, mask, options)
    out, _ = result(x, scores.dtype)
    both = torch.empty_like(out) if options.return_softmax else None
    forward(x, seed, options, scale, out, both)
    return out, both, scores.new_zeros(scores.shape[:-1], dtype=torch.float32)


def softmax_backward(
    operands: SoftmaxBackward, options: SoftmaxOptions, dtypes: Dtypes
) -> tuple[Tensor | None, ...]:
    """The gradients of scores and mask by the loops."""
    dout, dsoftmax, scores, mask, _, seed, _ = operands
    x, scale = _scaled(scores, mask, options)
    dx, _ = result(x, x.dtype)
    backward(x, seed, options, scale, dout, dx, dsoftmax)
    dscores = dmask = None
    if dtypes[0] is not None:
        dscores = (dx if scale == options.scale else dx * options.scale).to(dtypes[0])
    if dtypes[1] is not None and mask is not None:
        dmask = unaliased(dx.sum_to_size(mask.shape).to(dtypes[1]), dx)
    return dscores, dmask


_LOOPS = Functions(softmax_forward, softmax_backward)


def prepare(
    shape: tuple[int, ...],
    options: SoftmaxOptions,
    operands: Softmax | SoftmaxBackward,
    wanted: Sequence[Any],
) -> Prepared | None:
    """Both directions; None where the loops do not serve such calls, or torch's softmax does."""
    scores, mask, seed, p = operands.scores, operands.mask, operands.seed, operands.p
    if _is_torchs(mask, options) or not serves(seed, p, scores, mask):
        return None
    return _LOOPS.prepare(options)


def _is_torchs(mask: Tensor | None, options: AttentionOptions) -> bool:
    """Whether the op is nothing but torch's softmax."""
    whole = options.lower is None and options.upper is None
    return options.threshold() == 0 and mask is None and options.scale == 1 and whole


def _scaled(scores: Tensor, mask: Tensor | None, options: AttentionOptions) -> tuple[Tensor, float]:
    """Contiguous scores with the attention mask added, and the factor that they still need.

    The band is not applied, since the loops apply it.
    """
    if mask is None:
        return scores.contiguous(), options.scale
    wide, added = widened(scores, mask)
    masked = masked_scores(options.scale * wide, added, without_band(options))
    return masked.contiguous(), 1.0
