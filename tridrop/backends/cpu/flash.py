"""Attention that drops nothing, by the fused CPU kernel under torch's own attention function.

The results are those of attention.py, which computes what the kernel cannot: dropout, softcap,
sinks, packed sequences, gradients of attention masks and of the log-sum-exp, values of another
width than the keys, and fp64 masks of narrower tensors. The call's options and operands decide
which of the two runs; in a few cases the kernel's result decides, see :func:`forward`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.torch_private import cpu_attention
from ...spec.attention import AttentionInputs, AttentionOptions
from ...spec.operands import AttentionBackward, inputs_of
from ..reference.softmax import band

_FORWARD, _BACKWARD = cpu_attention(backward=False), cpu_attention(backward=True)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Plan(NamedTuple):
    """The arguments of the kernel: is_causal and a float mask; and the dtype of its sums."""

    is_causal: bool
    mask: Tensor | None
    wide: torch.dtype


def _plan(inputs: AttentionInputs, options: AttentionOptions) -> _Plan | None:
    """The plan for a call; None where the kernel does not compute such calls."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    # For causal order the kernel multiplies an infinity by the scale.
    scales = options.scale >= torch.finfo(torch.float32).tiny
    if (
        _FORWARD is None
        or _BACKWARD is None
        or query.device.type != "cpu"
        or query.dtype not in _DTYPES
        or inputs.p is not None
        or options.threshold() != 0
        or options.softcap != 0
        or not scales
        or inputs.sinks is not None
        or inputs.cu_query is not None
        or key.shape[-1] != value.shape[-1]
        or query.numel() == 0
        or key.numel() == 0
    ):
        return None
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if mask is not None and mask.dtype == torch.float64 != wide:
        return None
    is_causal = options.lower is None and options.upper == 0
    lengths = query.shape[2], key.shape[2]
    allowed = None if is_causal else band(*lengths, options, query.device)
    floats: Tensor | None = None
    if mask is not None and mask.dtype != torch.bool:
        floats = mask.to(wide)
    elif mask is not None:
        allowed = mask if allowed is None else allowed & mask
    if inputs.key_mask is not None:
        padding = inputs.key_mask[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    if allowed is not None:
        hidden = torch.zeros(allowed.shape, dtype=wide).masked_fill_(~allowed, -torch.inf)
        floats = hidden if floats is None else torch.where(allowed, floats, -torch.inf)
    if floats is not None and floats.stride(-1) > 1:
        floats = floats.contiguous()
    return _Plan(is_causal, floats, wide)


def _adjacent(t: Tensor) -> Tensor:
    """``t`` with adjacent elements in the last dimension; the kernel takes any other strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _without_keys(mask: Tensor, queries: int, keys: int, plan: _Plan) -> Tensor:
    """Whether all keys of a row are excluded: bool, [B or 1, H or 1, Sq or 1]."""
    seen = mask > -torch.inf
    if plan.is_causal:
        seen = seen & torch.ones((queries, keys), dtype=torch.bool).tril()
    return ~seen.any(-1)


def forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor] | None:
    """(out, lse) as attention.py computes them, or None where attention.py must."""
    plan = _plan(inputs, options)
    if plan is None:
        return None
    query, key, value = map(_adjacent, (inputs.query, inputs.key, inputs.value))
    found, log_sum = _FORWARD(
        query, key, value, 0.0, plan.is_causal, attn_mask=plan.mask, scale=options.scale
    )
    lse = log_sum.contiguous()
    low, high = map(float, torch.aminmax(lse))
    if not high < torch.inf:
        # Some score is NaN or infinite. The kernel adds minus infinity to an excluded key's score,
        # which leaves NaN there; and its log-sum-exp differs from the composition's.
        return None
    # 0 stands for a row without keys, and rarely for another one
    if low <= 0 <= high and bool((lse == 0).any()):
        if plan.mask is not None:
            empty = _without_keys(plan.mask, query.shape[2], key.shape[2], plan)
            lse.masked_fill_(empty, -torch.inf)
        if bool(((lse == 0) & (found == 0).all(-1)).any()):
            return None  # perhaps all scores are minus infinity, from infinite operands
    # The strides are those of spec.attention.empty_output: no copy where heads are adjacent.
    if inputs.query.stride(1) < inputs.query.stride(2):
        return found.transpose(1, 2).contiguous().transpose(1, 2), lse
    return found.contiguous(), lse


def backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    """Gradients of query, key and value, or None where attention.py must compute them.

    The kernel gets fp32 or fp64 operands: with narrower ones it would sum its blocks' gradients in
    the narrow dtype.
    """
    inputs, lse = inputs_of(operands), operands.lse
    plan = None if operands.dlse is not None or needs[3] else _plan(inputs, options)
    if plan is None:
        return None
    given = (operands.dout, inputs.query, inputs.key, inputs.value, operands.out)
    wide = [_adjacent(t.to(plan.wide)) for t in given]
    lse = lse.to(plan.wide)
    # A row without keys has probabilities of 0, whatever its scores are: exp(score - inf). Only a
    # mask makes such rows.
    if plan.mask is not None and float(lse.amin()) == -torch.inf:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    found = _BACKWARD(*wide, lse, 0.0, plan.is_causal, attn_mask=plan.mask, scale=options.scale)
    # With an infinite gradient or operand the kernel gives NaN for an excluded key, whose
    # probability and gradient are 0. Where that is in the gradient of the values, the gradient of
    # the scores has it, and so has that of the queries; and where it is in that of the keys, unless
    # the row of the query has no keys.
    total = found[0].sum()
    if not math.isfinite(total if plan.mask is None else total + found[1].sum()):
        return None
    return (*found, None, None)
