"""The operators of products with a dropped matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..spec.product import ProductOptions
from .elementwise import OPTIONS as ELEMENTWISE_OPTIONS
from .elementwise import pack, unpack_shared
from .library import define, filled, read_rate

OPTIONS = f"{ELEMENTWISE_OPTIONS}, int[] ranks, float gain, bool one_mask"


def pack_product(options: ProductOptions, backend: str) -> tuple[Any, ...]:
    """The options as the arguments that an operator takes."""
    return *pack(options, backend), list(options.ranks), options.gain, options.one_mask


def unpack_product(*packed: Any) -> tuple[ProductOptions, str]:
    """The inverse of :func:`pack_product`."""
    *values, backend, ranks, gain, one_mask = packed
    options = ProductOptions(
        **unpack_shared(*values), ranks=tuple(ranks), gain=gain, one_mask=one_mask
    )
    return options, backend


def _forward(
    x: Tensor, weight: Tensor, seeds: Tensor | None, p_tensor: Tensor | None, *packed: Any
) -> Tensor:
    options, backend = unpack_product(*packed)
    p_tensor, options = read_rate(p_tensor, options)
    module = backends.serving(backend, x, weight)
    return module.product_forward(x, weight, seeds, p_tensor, options)


def _forward_fake(
    x: Tensor, weight: Tensor, seeds: Tensor | None, p_tensor: Tensor | None, *packed: Any
) -> Tensor:
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seeds: Tensor | None,
    p_tensor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *packed, needs_x, needs_weight = arguments
    options, backend = unpack_product(*packed)
    p_tensor, options = read_rate(p_tensor, options)
    module = backends.serving(backend, grad, x, weight)
    needs = (needs_x, needs_weight)
    return filled(module.product_backward(grad, x, weight, seeds, p_tensor, options, needs), grad)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    seeds: Tensor | None,
    p_tensor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    results = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
        for t, needed in zip((x, weight), arguments[-2:], strict=True)
    )
    return filled(list(results), grad)


product_forward = define(
    "product_forward(Tensor x, Tensor weight, Tensor? seeds, Tensor? p_tensor, "
    f"{OPTIONS}) -> Tensor",
    _forward,
    _forward_fake,
)
# Absent gradients come back as empty tensors.
product_backward = define(
    "product_backward(Tensor grad, Tensor x, Tensor weight, Tensor? seeds, Tensor? p_tensor, "
    f"{OPTIONS}, bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
