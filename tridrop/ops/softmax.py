"""The operators of the softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.protocol import Backend
from ..spec.attention import AttentionOptions
from .attention import OPTIONS as OPTIONS
from .attention import unpack_attention
from .library import define, filled, read_rate


def _settle(
    scores: Tensor, mask: Tensor | None, p_tensor: Tensor | None, packed: tuple[Any, ...]
) -> tuple[Backend, Tensor | None, AttentionOptions]:
    p_tensor, options = read_rate(p_tensor, unpack_attention(*packed))
    return backends.serving(packed[-1], scores, mask), p_tensor, options


def _forward(
    scores: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *packed, return_softmax = arguments
    module, p_tensor, options = _settle(scores, mask, p_tensor, tuple(packed))
    results = module.softmax_forward(scores, mask, seed, p_tensor, options, return_softmax)
    return filled(results, scores)


def _forward_fake(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = scores.new_empty(scores.shape)
    softmax = scores.new_empty(scores.shape if arguments[-1] else 0)
    return out, softmax, scores.new_empty(scores.shape[:-1], dtype=torch.float32)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    dout, dsoftmax, scores, mask, lse, seed, p_tensor = arguments[:7]
    *packed, scores_dtype, mask_dtype = arguments[7:]
    module, p_tensor, options = _settle(scores, mask, p_tensor, tuple(packed))
    dtypes = (scores_dtype, mask_dtype)
    results = module.softmax_backward(
        dout, dsoftmax, scores, mask, lse, seed, p_tensor, options, dtypes
    )
    return filled(results, scores)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    scores, mask = arguments[2:4]
    results = (
        None if dtype is None else scores.new_empty(t.shape, dtype=dtype)
        for t, dtype in zip((scores, mask), arguments[-2:], strict=True)
    )
    return filled(list(results), scores)


# Without return_softmax the second result is empty, as are absent gradients.
softmax_forward = define(
    "softmax_forward(Tensor scores, Tensor? mask, Tensor? seed, Tensor? p_tensor, "
    f"{OPTIONS}, bool return_softmax) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
softmax_backward = define(
    "softmax_backward(Tensor? dout, Tensor? dsoftmax, Tensor scores, Tensor? mask, Tensor lse, "
    f"Tensor? seed, Tensor? p_tensor, {OPTIONS}, ScalarType? scores_dtype, "
    "ScalarType? mask_dtype) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
