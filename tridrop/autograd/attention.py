"""The autograd functions of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import attention
from ..base.torch_private import forward_mode
from ..distributed import layouts
from ..ops.attention import attention_backward, attention_forward
from ..ops.library import Known, composes
from ..spec.attention import AttentionInputs
from .common import (
    Function,
    apply_in_backward,
    differentiate,
    each_sample,
    packed_and_prepared,
    prepared_backward,
    save,
    unchanged,
    wanted,
)

_WIDTH = len(AttentionInputs._fields)
_SAVED = ("out", "lse", *AttentionInputs._fields)
# Of the inputs: query, key, value, mask and sinks.
_DIFFERENTIABLE = (0, 1, 2, 3, 5)


def _spread(found: Sequence[Tensor | None], width: int) -> list[Tensor | None]:
    """Gradients at the places of the arguments they belong to."""
    result: list[Tensor | None] = [None] * width
    for place, gradient in zip(_DIFFERENTIABLE, found, strict=True):
        result[place] = gradient
    return result


def torchs_attention(*arguments: Any) -> Tensor | None:
    """The heads by torch's own attention, for exported graphs; it knows no forward mode.

    None where it cannot compute them, and where nobody asks for torch's own operators.
    """
    *tensors, packed = arguments
    inputs, options = AttentionInputs(*tensors), ops.unpack_attention(*packed)
    if inputs.seed is not None or not composes(None) or forward_mode():
        return None
    if inputs.cu_query is not None or inputs.sinks is not None or options.softcap:
        return None
    return attention.torchs(inputs, options)


class Attention(Function):
    """(out, lse) of attention; see ``backends/reference/attention.py``."""

    sharding = staticmethod(layouts.attention)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor] | None:
        *tensors, packed = arguments
        inputs = AttentionInputs(*tensors)
        if inputs.cu_query is not None or not composes(inputs.seed):
            return None
        return attention.composed(inputs, ops.unpack_attention(*packed))

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_mask: Tensor | None,
        sinks: Tensor | None,
        cu_query: Tensor | None,
        cu_key: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: ops.PackedAttention | Known,
    ) -> tuple[Tensor, Tensor]:
        inputs = (query, key, value, mask, key_mask, sinks, cu_query, cu_key, seed)
        if isinstance(packed, Known):
            out, lse = packed.prepared.forward(*inputs)
        else:
            out, lse = attention_forward(*inputs, p, *packed)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, packed = inputs
        ctx.packed, ctx.prepared = packed_and_prepared(packed)
        ctx.needs = tuple(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE)
        ctx.set_materialize_grads(False)
        save(ctx, packed, _SAVED, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (_WIDTH + 1)
        if dout is None:
            dout = torch.zeros_like(saved[0])
        found = prepared_backward(ctx, (dout, dlse), saved, ctx.needs)
        if found is None:
            given = (dout, dlse, *unchanged(ctx, saved), ctx.packed, ctx.needs)
            found = apply_in_backward(AttentionBackward, *given)
        return *_spread(found, _WIDTH), None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(Attention.apply, info, in_dims, args)


class AttentionBackward(Function):
    """The gradients of :class:`Attention`. out and lse are functions of the other tensors."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, needs = inputs
        dtypes = tuple(torch.float32 if need else None for need in needs)
        return wanted(attention_backward(*tensors, *packed, list(needs), False), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.needs = inputs
        save(ctx, ctx.packed, ("dout", "dlse", *_SAVED), *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dlse, _, _, *tensors = unchanged(ctx, ctx.saved_tensors)
        inputs = AttentionInputs(*tensors)
        options = ops.unpack_attention(*ctx.packed)
        floats = inputs.mask is not None and inputs.mask.dtype != torch.bool
        given = {"dout": dout, "dlse": dlse, "query": inputs.query, "key": inputs.key}
        given |= {"value": inputs.value, "mask": inputs.mask if floats else None}
        given["sinks"] = inputs.sinks
        dtypes = tuple(torch.float32 if need else None for need in ctx.needs)
        found = differentiate(
            attention.attention_gradients, given, cotangents, None, (inputs, options), dtypes
        )
        return *found[:2], None, None, *_spread(found[2:], _WIDTH), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(AttentionBackward.apply, info, in_dims, args)
