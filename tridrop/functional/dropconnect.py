"""DropConnect: dropout on weights instead of activations."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..contract.seeds import seed_for
from ..ops.remade import Recipe, remade
from ..spec import elementwise as spec
from ..spec.product import check_matrix, check_same_dtype, product_dtype
from .elementwise import dropout, in_batch
from .product import dropped_product

# With at most so many rows of x, the Triton backend applies the mask while the product loads the
# weight. A dropped weight in memory would be written and read once more in forward and in backward,
# whatever the batch; the fused product is made for few rows.
FUSED_ROWS = 64


def dropconnect_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer whose weights are dropped, one mask for the whole batch.

        out = x @ dropout(weight)^T + bias

    (Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of neural networks using DropConnect", ICML
    2013; scaled in training by 1 / (1 - p), so that evaluation uses the weights as they are.) The
    dropped weight is never kept for backward, which draws it again. For up to 64 rows of x the
    Triton backend applies the mask while the product loads the weight, and never writes the dropped
    weight to memory.

    Args:
        x: [..., in].
        weight: [out, in], of x's dtype.
        bias: [out], or None.
        p, training, seed: as in :func:`tridrop.dropout`. The mask is
            ``tridrop.keep_mask(seed, weight.shape, p)``.

    Returns:
        [..., out].

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`; operands that do not fit, or of two
            dtypes.

    >>> import torch
    >>> dropconnect_linear(torch.ones(1, 4), torch.ones(2, 4), p=0.5, seed=1)
    tensor([[4., 6.]])
    """
    spec.check_input(x)
    spec.check_probability(p, tensor_allowed=True)
    if x.dim() == 0:
        raise ValueError("x is a scalar; a linear layer takes [..., in]")
    check_matrix(weight, "weight", None, x.shape[-1], x, f"x has {x.shape[-1]} features")
    spec.check_vector(bias, "bias", weight.shape[0], x)
    autocast = spec.autocast_dtype(x.device) is not None
    if not autocast:
        check_same_dtype(x, weight, ("x", "weight"))
    if not spec.drops(p, training):
        return F.linear(x, weight, bias)
    seed = seed_for(x.device, seed)
    rows = x.numel() // max(1, x.shape[-1])
    fused = backends.name_for(x.device) == "triton" and 0 < rows <= FUSED_ROWS
    if fused:
        # Compared with LoRA's product the roles are exchanged: the weight is the dropped matrix.
        whole = in_batch(weight.shape, dim=None)
        out = dropped_product(weight, (x.reshape(rows, -1),), p, True, shard=whole, seeds=(seed,))
        out = out.T.reshape(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias.to(out.dtype)
    if autocast:  # cast before dropping: a linear layer keeps the weight that autocast has cast
        weight = weight.to(product_dtype(x, weight))
    dropped, recipe = drop_weight(weight, p, seed)
    with remade([(dropped, recipe)]):
        return F.linear(x, dropped, bias)


def drop_weight(weight: Tensor, p: float | Tensor, seed: int | Tensor) -> tuple[Tensor, Recipe]:
    """A dropped copy of a weight, and the recipe that draws it again: for ``ops.remade``."""
    draw = partial(_draw, p=p, seed=seed)
    what = "a dropped weight is drawn again in backward"
    return draw(weight), Recipe(draw, (weight,), ("weight",), what)


def _draw(weight: Tensor, p: float | Tensor, seed: int | Tensor) -> Tensor:
    return dropout(weight, p, True, shard=in_batch(weight.shape, dim=None), seed=seed)
