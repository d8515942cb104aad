"""The operators of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..spec.attention import AttentionInputs, AttentionOptions, empty_output
from .library import define, filled, read_rate

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_mask, Tensor? sinks, "
    "Tensor? cu_query, Tensor? cu_key, Tensor? seed, Tensor? p_tensor"
)
OPTIONS = (
    "float p, float scale, SymInt? lower, SymInt? upper, float softcap, SymInt[] origin, "
    "SymInt max_query, SymInt max_key, str backend"
)
_WIDTH = len(AttentionInputs._fields)

PackedAttention = tuple[Any, ...]


def pack_attention(options: AttentionOptions, backend: str) -> PackedAttention:
    """The options as the arguments that an operator takes."""
    o = options
    return (
        float(o.p), o.scale, o.lower, o.upper, o.softcap, list(o.origin), o.max_query, o.max_key,
        backend,
    )  # fmt: skip


def unpack_attention(*packed: Any) -> AttentionOptions:
    """The inverse of :func:`pack_attention`."""
    p, scale, lower, upper, softcap, origin, max_query, max_key, _ = packed
    return AttentionOptions(p, scale, lower, upper, softcap, tuple(origin), max_query, max_key)


def _settle(
    tensors: tuple[Any, ...], packed: tuple[Any, ...]
) -> tuple[Any, AttentionInputs, AttentionOptions]:
    inputs = AttentionInputs(*tensors)
    p, options = read_rate(inputs.p, unpack_attention(*packed))
    serving = (inputs.query, inputs.key, inputs.value, inputs.sinks)
    floats = None if inputs.mask is None or inputs.mask.dtype == torch.bool else inputs.mask
    module = backends.serving(packed[-1], *serving, floats)
    return module, inputs._replace(p=p), options


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    module, inputs, options = _settle(arguments[:_WIDTH], arguments[_WIDTH:])
    out, lse = module.attention_forward(inputs, options)
    return out, lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    return empty_output(query, value.shape[-1]), lse


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *packed, needs, block = arguments[_WIDTH:]
    module, inputs, options = _settle(arguments[:_WIDTH], tuple(packed))
    options = dataclasses.replace(options, block=block)
    results = module.attention_backward(dout, dlse, out, lse, inputs, options, tuple(needs))
    return filled(results, dout)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    inputs, needs = AttentionInputs(*arguments[:_WIDTH]), arguments[-2]
    differentiable = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks)
    return filled(
        [
            torch.empty_like(t) if t is not None and need else None
            for t, need in zip(differentiable, needs, strict=True)
        ],
        dout,
    )


attention_forward = define(
    f"attention_forward({_INPUTS}, {OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
# Gradients of query, key, value, mask and sinks; empty tensors for those that are not wanted.
# ``block`` is whether the keys are some of those that out and lse are of.
attention_backward = define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"{_INPUTS}, {OPTIONS}, bool[] needs, bool block) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
