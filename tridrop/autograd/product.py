"""The autograd functions of products with a dropped matrix.

A product is bilinear in x and the weight, so its derivatives are such products again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends.reference import product
from ..distributed import layouts
from ..ops.library import composes
from ..ops.product import product_backward, product_forward, unpack_product
from .common import Function, apply_in_backward, each_sample, save, unchanged

_SAVED = ("x", "weight", "seeds", "p")


class Product(Function):
    """gain * drop_i(x) @ weight_i^T for each i, side by side: [..., sum of ranks]."""

    sharding = staticmethod(layouts.product)

    @staticmethod
    def composed(*arguments: Any) -> Tensor | None:
        *tensors, packed = arguments
        if not composes(tensors[2]):
            return None
        return product.composed(*tensors, unpack_product(*packed)[0])  # type: ignore[call-arg]

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, seeds: Tensor | None, p: Tensor | None, packed: tuple[Any, ...]
    ) -> Tensor:
        out: Tensor = product_forward(x, weight, seeds, p, *packed)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.packed = inputs
        save(ctx, ctx.packed, _SAVED, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dweight = apply_in_backward(
            ProductBackward,
            grad,
            *unchanged(ctx, ctx.saved_tensors),
            ctx.packed,
            tuple(ctx.needs_input_grad[:2]),
        )
        return dx, dweight, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(Product.apply, info, in_dims, args)


class ProductBackward(Function):
    """The gradients of x and weight of :class:`Product`."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        seeds: Tensor | None,
        p: Tensor | None,
        packed: tuple[Any, ...],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, ...]:
        results = product_backward(grad, x, weight, seeds, p, *packed, *needs)
        return tuple(t if needed else None for t, needed in zip(results, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, _ = inputs
        ctx.set_materialize_grads(False)
        save(ctx, ctx.packed, ("grad", *_SAVED), *tensors)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        # out is linear in each of grad, x and weight:
        #   <ddx, dx> + <ddweight, dweight> = <grad, product(ddx, weight) + product(x, ddweight)>
        grad, x, weight, *drop = unchanged(ctx, ctx.saved_tensors)
        dgrad = dx = dweight = None
        if ddx is not None:
            ddx = ddx.to(x.dtype)
            dgrad = Product.apply(ddx, weight, *drop, ctx.packed)
            dweight = ProductBackward.apply(grad, ddx, weight, *drop, ctx.packed, (False, True))[1]
        if ddweight is not None:
            other = Product.apply(x, ddweight, *drop, ctx.packed)
            dgrad = other if dgrad is None else dgrad + other
            dx = ProductBackward.apply(grad, x, ddweight, *drop, ctx.packed, (True, False))[0]
        return dgrad, dx, dweight, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(ProductBackward.apply, info, in_dims, args)
