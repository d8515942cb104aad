"""The operators and the autograd functions of products with a dropped matrix.

A product is linear in x and in the weight, so its derivatives are such products again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import product as reference
from ..distributed import layouts
from ..spec.operands import Product, ProductBackward
from ..spec.product import ProductOptions
from .common import Function, apply_in_backward, by_sample, save, unchanged
from .elementwise import OPTIONS as ELEMENTWISE_OPTIONS
from .elementwise import pack, shared_options
from .library import composes, define, filled, prepared

OPTIONS = f"{ELEMENTWISE_OPTIONS}, int[] ranks, float gain, bool one_mask"


class PackedProduct(NamedTuple):
    """The options in the form that operators take."""

    activation: str
    p: float
    drop_path: float
    shared: list[int]
    global_shape: list[int]
    origin: list[int]
    noise: str
    backend: str
    ranks: list[int]
    gain: float
    one_mask: bool


def pack_product(options: ProductOptions, backend: str) -> PackedProduct:
    """The options and the name of a backend, packed."""
    common = pack(options, backend)
    return PackedProduct(*common, list(options.ranks), options.gain, options.one_mask)


def unpack_product(packed: PackedProduct) -> ProductOptions:
    """The inverse of :func:`pack_product`."""
    return ProductOptions(
        **shared_options(packed),
        ranks=tuple(packed.ranks),
        gain=packed.gain,
        one_mask=packed.one_mask,
    )


_OPERANDS, _INCOMING = len(Product._fields), len(ProductBackward._fields)


def _forward(*arguments: Any) -> Tensor:
    operands, packed = Product(*arguments[:_OPERANDS]), PackedProduct(*arguments[_OPERANDS:])
    shape, options = operands.x.shape, unpack_product(packed)
    op, operands = prepared("product", shape, options, packed.backend, operands)
    out: Tensor = op.forward(operands)
    return out


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    operands = ProductBackward(*arguments[:_INCOMING])
    *values, needs_x, needs_weight = arguments[_INCOMING:]
    packed, needs = PackedProduct(*values), (needs_x, needs_weight)
    grad, options = operands.grad, unpack_product(packed)
    op, operands = prepared("product", operands.x.shape, options, packed.backend, operands)
    return filled(op.backward(operands, needs), grad)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, needs_x, needs_weight = arguments
    results = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
        for t, needed in ((x, needs_x), (weight, needs_weight))
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


@by_sample
class DroppedProduct(Function):
    """gain * drop_i(x) @ weight_i^T for each i, side by side: [..., sum of ranks]."""

    sharding = staticmethod(layouts.product)

    @staticmethod
    def composed(*arguments: Any) -> Tensor | None:
        *tensors, packed = arguments
        operands = Product._make(tensors)
        if not composes(operands.seeds):
            return None
        return reference.composed(operands, unpack_product(packed))

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, seeds: Tensor | None, p: Tensor | None, packed: PackedProduct
    ) -> Tensor:
        out: Tensor = product_forward(x, weight, seeds, p, *packed)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.packed = inputs
        save(ctx, ctx.packed, ProductBackward, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dweight = apply_in_backward(
            DroppedProductBackward,
            grad,
            *unchanged(ctx, ctx.saved_tensors),
            ctx.packed,
            tuple(ctx.needs_input_grad[:2]),
        )
        return dx, dweight, None, None, None


@by_sample
class DroppedProductBackward(Function):
    """The gradients of x and weight of :class:`DroppedProduct`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, needs = inputs
        results = product_backward(*tensors, *packed, *needs)
        return tuple(t if needed else None for t, needed in zip(results, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, _ = inputs
        ctx.set_materialize_grads(False)
        save(ctx, ctx.packed, ProductBackward, *tensors)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        # out is linear in each of grad, x and weight:
        #   <ddx, dx> + <ddweight, dweight> = <grad, product(ddx, weight) + product(x, ddweight)>
        grad, x, weight, *rest = *unchanged(ctx, ctx.saved_tensors), ctx.packed
        dgrad = dx = dweight = None
        if ddx is not None:
            ddx = ddx.to(x.dtype)
            dgrad = DroppedProduct.apply(ddx, weight, *rest)
            _, dweight = DroppedProductBackward.apply(grad, ddx, weight, *rest, (False, True))
        if ddweight is not None:
            other = DroppedProduct.apply(x, ddweight, *rest)
            dgrad = other if dgrad is None else dgrad + other
            dx, _ = DroppedProductBackward.apply(grad, x, ddweight, *rest, (True, False))
        return dgrad, dx, dweight, None, None, None, None
