"""Products with a dropped matrix, which LoRA and DropConnect share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops import DroppedProduct, apply, pack_product
from ..spec import elementwise as spec
from ..spec.product import ProductOptions, product_dtype
from .elementwise import ShardLike, distinct, in_batch, seed_of


def dropped_product(
    x: Tensor,
    weights: Sequence[Tensor],
    p: float | Tensor,
    training: bool,
    *,
    gain: float = 1.0,
    one_mask: bool = False,
    shard: ShardLike | None = None,
    seeds: Sequence[int | Tensor | None] = (None,),
) -> Tensor:
    """gain * drop_i(x) @ weight_i^T for each i, side by side, in the weights' dtype.

    The weights are checked already. There is one seed per mask.
    """
    where = in_batch(x.shape, spec.resolve_shard(shard, x.shape))
    dtype = product_dtype(x, weights[0])
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    weight = weight.to(dtype)
    drops = spec.drops(p, training)
    spec.check_rate(p, x.device)
    if not drops and x.dtype == dtype:
        out = F.linear(x, weight)
        return out if gain == 1 else out * gain
    options = ProductOptions(
        shard=where, ranks=tuple(w.shape[0] for w in weights), gain=gain, one_mask=one_mask
    )
    drawn = None
    if drops:
        each = [seed_of(x, seed) for seed in seeds]
        drawn = each[0].view(1, 2) if len(each) == 1 else torch.stack(each)
        if not isinstance(p, Tensor):
            options = replace(options, p=float(p))
    p_tensor = p if drops and isinstance(p, Tensor) else None
    packed = pack_product(options, backends.name_for(x.device))
    operands = distinct(x, weight)
    out = apply(DroppedProduct, *operands, drawn, p_tensor, packed)
    return out
