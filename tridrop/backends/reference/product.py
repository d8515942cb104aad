"""Products with a dropped matrix, in torch.

    out_i = gain * drop_i(x) @ weight_i^T,   the weight_i stacked along the rows of ``weight``

The dropped matrix is a temporary, which forward and backward each make.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...contract import mask
from ...spec.operands import Product, ProductBackward
from ...spec.product import ProductOptions
from .elementwise import Multiplier, compute, multiplier, to, unaliased


def _drops(
    x: Tensor,
    seeds: Tensor | None,
    p: Tensor | None,
    options: ProductOptions,
    draw: ModuleType,
) -> list[Multiplier]:
    """The random part of each product; with ``one_mask`` all have the same."""
    masks = [
        multiplier(tuple(x.shape), None if seeds is None else seeds[i], p, options, draw)
        for i in range(options.masks)
    ]
    return masks * len(options.ranks) if options.one_mask else masks


def product_forward(operands: Product, options: ProductOptions, draw: ModuleType = mask) -> Tensor:
    """The products, side by side, in the weight's dtype."""
    return unaliased(composed(operands, options, draw), operands.x)


def composed(operands: Product, options: ProductOptions, draw: ModuleType = mask) -> Tensor:
    """The products in torch's own operators."""
    x, weight, seeds, p = operands
    wide, w = compute(x, weight)
    assert wide is not None
    assert w is not None
    parts = [
        drop(wide) @ part.T
        for drop, part in zip(
            _drops(x, seeds, p, options, draw), w.split(options.ranks), strict=True
        )
    ]
    return to(torch.cat(parts, -1) * options.gain, weight.dtype)


def product_backward(
    operands: ProductBackward,
    options: ProductOptions,
    needs: tuple[bool, ...],
    draw: ModuleType = mask,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight in their dtypes; None where not needed."""
    grad, x, weight, seeds, p = operands
    g, wide, w = compute(grad, x, weight)
    assert g is not None
    assert wide is not None
    assert w is not None
    g = (g * options.gain).reshape(-1, weight.shape[0])
    dx, parts = torch.zeros_like(wide), []
    each = zip(
        _drops(x, seeds, p, options, draw), g.split(options.ranks, -1), w.split(options.ranks),
        strict=True,
    )  # fmt: skip
    for drop, dout, part in each:
        if needs[0]:
            dx += drop((dout @ part).view(x.shape))
        if needs[1]:
            parts.append(dout.T @ drop(wide).view(-1, x.shape[-1]))
    return (
        unaliased(dx.to(x.dtype), grad) if needs[0] else None,
        torch.cat(parts).to(weight.dtype) if needs[1] else None,
    )
