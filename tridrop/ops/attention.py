"""The operators and the autograd functions of attention."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import attention as reference
from ..base.torch_private import forward_mode
from ..distributed import layouts
from ..spec.attention import AttentionInputs, AttentionOptions, empty_output
from ..spec.operands import AttentionBackward as Incoming
from .common import (
    Function,
    apply_in_backward,
    by_sample,
    differentiate,
    prepared_backward,
    resume,
    save,
    unchanged,
    wanted,
)
from .library import Known, composes, define, filled, prepared

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_mask, Tensor? sinks, "
    "Tensor? cu_query, Tensor? cu_key, Tensor? seed, Tensor? p_tensor"
)
OPTIONS = (
    "float p, float scale, SymInt? lower, SymInt? upper, float softcap, SymInt[] origin, "
    "SymInt max_query, SymInt max_key, str backend"
)


class PackedAttention(NamedTuple):
    """The options in the form that operators take."""

    p: float
    scale: float
    lower: int | None
    upper: int | None
    softcap: float
    origin: list[int]
    max_query: int
    max_key: int
    backend: str


def pack_attention(options: AttentionOptions, backend: str) -> PackedAttention:
    """The options and the name of a backend, packed."""
    o = options
    return PackedAttention(
        float(o.p), o.scale, o.lower, o.upper, o.softcap, list(o.origin), o.max_query, o.max_key,
        backend,
    )  # fmt: skip


def score_options(packed: Any) -> dict[str, Any]:
    """The options that :func:`pack_attention` packed, which attention and the softmax share."""
    return {
        "p": packed.p,
        "scale": packed.scale,
        "lower": packed.lower,
        "upper": packed.upper,
        "softcap": packed.softcap,
        "origin": tuple(packed.origin),
        "max_query": packed.max_query,
        "max_key": packed.max_key,
    }


def unpack_attention(packed: PackedAttention) -> AttentionOptions:
    """The inverse of :func:`pack_attention`."""
    return AttentionOptions(**score_options(packed))


_OPERANDS, _INCOMING = len(AttentionInputs._fields), len(Incoming._fields)


def _differentiable(inputs: Any) -> tuple[Any, ...]:
    """The entries that may have a gradient, of the inputs or of a tuple with one entry for each."""
    return inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks


def _at_inputs(query: Any, key: Any, value: Any, mask: Any, sinks: Any) -> tuple[Any, ...]:
    """The gradients at the places of their inputs."""
    return AttentionInputs(query, key, value, mask=mask, sinks=sinks)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(*arguments[:_OPERANDS])
    packed = PackedAttention(*arguments[_OPERANDS:])
    shape, options = inputs.query.shape, unpack_attention(packed)
    op, inputs = prepared("attention", shape, options, packed.backend, inputs)
    out, lse = op.forward(inputs)
    return out, lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    return empty_output(query, value.shape[-1]), lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    operands = Incoming(*arguments[:_INCOMING])
    *values, needs, block = arguments[_INCOMING:]
    packed, dout = PackedAttention(*values), operands.dout
    options = dataclasses.replace(unpack_attention(packed), block=block)
    op, operands = prepared("attention", dout.shape, options, packed.backend, operands)
    return filled(op.backward(operands, tuple(needs)), dout)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    operands = Incoming(*arguments[:_INCOMING])
    *_, needs, _block = arguments
    return filled(
        [
            torch.empty_like(t) if t is not None and need else None
            for t, need in zip(_differentiable(operands), needs, strict=True)
        ],
        operands.dout,
    )


attention_forward = define(
    f"attention_forward({_INPUTS}, {OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Gradients of query, key, value, mask and sinks; empty tensors for those that are not needed.
# ``block`` says that out and lse were computed from more keys than these.
attention_backward = define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"{_INPUTS}, {OPTIONS}, bool[] needs, bool block) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def torchs_attention(inputs: AttentionInputs, options: AttentionOptions) -> Tensor | None:
    """The result of torch's own attention, for exported graphs.

    None where torch's function cannot compute the call, as in forward mode, and where the call need
    not consist of torch's own operators.
    """
    if inputs.seed is not None or not composes(None) or forward_mode():
        return None
    if inputs.cu_query is not None or inputs.sinks is not None or options.softcap:
        return None
    return reference.torchs(inputs, options)


@by_sample
class Attention(Function):
    """(out, lse) of attention; see ``backends/reference/attention.py``."""

    sharding = staticmethod(layouts.attention)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor] | None:
        *tensors, packed = arguments
        inputs = AttentionInputs(*tensors)
        if inputs.cu_query is not None or not composes(inputs.seed):
            return None
        return reference.composed(inputs, unpack_attention(packed))

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
        packed: PackedAttention | Known,
    ) -> tuple[Tensor, Tensor]:
        inputs = AttentionInputs(
            query, key, value, mask, key_mask, sinks, cu_query, cu_key, seed, p
        )
        if isinstance(packed, Known):
            out, lse = packed.prepared.forward(inputs)
        else:
            out, lse = attention_forward(*inputs, *packed)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, packed = inputs
        if not resume(ctx, packed):
            ctx.needs = _differentiable(AttentionInputs(*ctx.needs_input_grad[:-1]))
        ctx.set_materialize_grads(False)
        save(ctx, packed, Incoming, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (_OPERANDS + 1)
        if dout is None:
            dout = torch.zeros_like(saved[0])
        found = prepared_backward(ctx, Incoming, (dout, dlse), saved, ctx.needs)
        if found is None:
            given = (dout, dlse, *unchanged(ctx, saved), ctx.packed, ctx.needs)
            found = apply_in_backward(AttentionBackward, *given)
        return *_at_inputs(*found), None


@by_sample
class AttentionBackward(Function):
    """The gradients of :class:`Attention`; out and lse count as functions of the other tensors."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, needs = inputs
        dtypes = tuple(torch.float32 if need else None for need in needs)
        return wanted(attention_backward(*tensors, *packed, list(needs), False), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.needs = inputs
        save(ctx, ctx.packed, Incoming, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dlse, _, _, *tensors = unchanged(ctx, ctx.saved_tensors)
        inputs, options = AttentionInputs(*tensors), unpack_attention(ctx.packed)
        floats = inputs.mask is not None and inputs.mask.dtype != torch.bool
        given = {"dout": dout, "dlse": dlse, "query": inputs.query, "key": inputs.key}
        given |= {"value": inputs.value, "mask": inputs.mask if floats else None}
        given["sinks"] = inputs.sinks
        dtypes = tuple(torch.float32 if need else None for need in ctx.needs)
        ddout, ddlse, *others = differentiate(
            reference.attention_gradients, given, cotangents, None, (inputs, options), dtypes
        )
        return ddout, ddlse, None, None, *_at_inputs(*others), None, None
