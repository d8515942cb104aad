"""Attention that drops nothing, by the fused kernel for CPUs that torch's own function runs on.

The results are those of attention.py, which computes what the kernel cannot: anything dropped,
softcap, sinks, packed sequences, gradients of masks and of the log-sum-exp, values of another
width than the keys, fp64 masks of narrower tensors. What a call asks for decides, and in one case
what the kernel gave: see :func:`forward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...base.torch_private import cpu_attention
from ...spec.attention import AttentionInputs, AttentionOptions
from ...spec.operands import AttentionBackward, inputs_of
from ..reference.softmax import are_finite, band

_FORWARD, _BACKWARD = cpu_attention(backward=False), cpu_attention(backward=True)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Plan(NamedTuple):
    """How the kernel is asked: is_causal, and a mask to add; and the dtype of its sums."""

    is_causal: bool
    mask: Tensor | None
    wide: torch.dtype


def _plan(inputs: AttentionInputs, options: AttentionOptions) -> _Plan | None:
    """None where the kernel does not compute what is asked for."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    # Causal order is an infinity that the kernel scales.
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
        there = inputs.key_mask[:, None, None, :]
        allowed = there if allowed is None else allowed & there
    if allowed is not None:
        hidden = torch.zeros(allowed.shape, dtype=wide).masked_fill_(~allowed, -torch.inf)
        floats = hidden if floats is None else torch.where(allowed, floats, -torch.inf)
    if floats is not None and floats.stride(-1) > 1:
        floats = floats.contiguous()
    return _Plan(is_causal, floats, wide)


def _adjacent(t: Tensor) -> Tensor:
    """The kernel takes any strides but of the last dimension."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _without_keys(mask: Tensor, queries: int, keys: int, plan: _Plan) -> Tensor:
    """The rows, [B or 1, H or 1, Sq or 1], whose keys are all left out."""
    seen = mask > -torch.inf
    if plan.is_causal:
        seen = seen & torch.ones((queries, keys), dtype=torch.bool).tril()
    return ~seen.any(-1)


def forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor] | None:
    """(out, lse) as attention.py makes them, or None where that has to."""
    plan = _plan(inputs, options)
    if plan is None:
        return None
    query, key, value = map(_adjacent, (inputs.query, inputs.key, inputs.value))
    found, log_sum = _FORWARD(
        query, key, value, 0.0, plan.is_causal, attn_mask=plan.mask, scale=options.scale
    )
    lse = log_sum.contiguous()
    if not bool((lse < torch.inf).all()):
        # Of a score that is NaN or infinite: a key that is left out has none of it, to which the
        # kernel adds minus infinity; and its log-sum-exp is another than the composition's.
        return None
    if bool((lse == 0).any()):  # of a row without keys, and rarely of another
        if plan.mask is not None:
            empty = _without_keys(plan.mask, query.shape[2], key.shape[2], plan)
            lse.masked_fill_(empty, -torch.inf)
        if bool(((lse == 0) & (found == 0).all(-1)).any()):
            return None  # perhaps of scores that are all minus infinity: of infinite operands
    # Laid out as spec.attention.empty_output does; no copy where heads are next to each other.
    if inputs.query.stride(1) < inputs.query.stride(2):
        return found.transpose(1, 2).contiguous().transpose(1, 2), lse
    return found.contiguous(), lse


def backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    """Gradients of query, key and value, or None where attention.py has to make them.

    Always in fp32 or fp64: of narrower tensors the kernel would add up those of its blocks in
    their dtype.
    """
    inputs, lse = inputs_of(operands), operands.lse
    plan = None if operands.dlse is not None or needs[3] else _plan(inputs, options)
    if plan is None:
        return None
    given = (operands.dout, inputs.query, inputs.key, inputs.value, operands.out)
    wide = [_adjacent(t.to(plan.wide)) for t in given]
    lse = lse.to(plan.wide)
    if plan.mask is not None:
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf) and not exp(-inf + inf)
    found = _BACKWARD(*wide, lse, 0.0, plan.is_causal, attn_mask=plan.mask, scale=options.scale)
    if not all(map(are_finite, found)):
        # An infinite gradient or operand makes NaN of the probability 0 of a key that is left out,
        # whose gradient then is 0 all the same.
        return None
    return (*found, None, None)
