"""DropConnect: weights dropped in the place of activations."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..contract.seeds import seed_for
from ..ops.remade import Remade, remade
from ..spec import elementwise as spec
from ..spec.product import check_matrix, check_same_dtype, product_dtype
from .elementwise import dropout, in_batch
from .product import dropped_product

# Rows of x up to which the mask is applied as the product loads the weight, on the Triton backend.
# A dropped weight in memory costs writing and reading it once more each way, whatever the batch; a
# product of the kernel's kind is made for few rows.
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
    2013; scaled in training by 1 / (1 - p), so that evaluation takes the weights as they are.) The
    dropped weight is never kept for backward, which draws it again; up to 64 rows of x the Triton
    backend applies the mask as the product loads the weight, and writes no dropped weight at all.

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
    fused = backends.choose(x.device) == "triton" and 0 < rows <= FUSED_ROWS
    if fused:
        # The roles of a LoRA's product are exchanged: the weight is the matrix that is dropped.
        whole = in_batch(weight.shape, dim=None)
        out = dropped_product(weight, (x.reshape(rows, -1),), p, True, shard=whole, seeds=(seed,))
        out = out.T.reshape(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias.to(out.dtype)
    if autocast:  # first, as what a linear layer keeps is the weight that autocast has made
        weight = weight.to(product_dtype(x, weight))
    dropped, rule = drop_weight(weight, p, seed)
    with remade([(dropped, rule)]):
        return F.linear(x, dropped, bias)


def drop_weight(weight: Tensor, p: float | Tensor, seed: int | Tensor) -> tuple[Tensor, Remade]:
    """A weight, dropped, and the rule that draws it again: for :func:`ops.remade`."""
    draw = partial(_draw, p=p, seed=seed)
    what = "a weight whose dropped copy backward draws again"
    return draw(weight), Remade(draw, (weight,), ("weight",), what)


def _draw(weight: Tensor, p: float | Tensor, seed: int | Tensor) -> Tensor:
    return dropout(weight, p, True, shard=in_batch(weight.shape, dim=None), seed=seed)
