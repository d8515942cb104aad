"""The operators that multiply matrices, in torch's count of floating-point operations.

``torch.utils.flop_counter.FlopCounterMode`` looks an operator's formula up by its name. These are
torch's own formulas of attention and of a linear layer: a multiplication and an addition are two,
what a mask or a band leaves out is counted as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OP = torch.ops.tridrop


def register() -> None:
    """Give torch the formulas of attention and of products with a dropped matrix."""
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in (
        (_OP.attention_forward, _attention),
        (_OP.attention_backward, _attention_backward),
        (_OP.product_forward, _product),
        (_OP.product_backward, _product_backward),
    ):
        register_flop_formula(operator, get_raw=True)(formula)


def _scores(query: Tensor, key: Tensor, cu_query: Tensor | None, cu_key: Tensor | None) -> int:
    """How many scores there are; of packed sequences each has its own."""
    batch, heads, queries, _ = query.shape
    if cu_query is None or cu_key is None:
        return batch * heads * queries * key.shape[2]
    if cu_query.is_meta or cu_query.numel() < 2:
        return heads * queries * key.shape[2]  # unknown: all of one
    return heads * int((cu_query.diff().long() * cu_key.diff().long()).sum())


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, out_val: Any = None, **_: Any
) -> int:
    """query key^T and P value; ``others`` are as in ops/attention.py."""
    return 2 * _scores(query, key, others[3], others[4]) * (key.shape[-1] + value.shape[-1])


def _attention_backward(
    dout: Tensor, dlse: Any, out: Any, lse: Any, query: Tensor, key: Tensor, value: Tensor,
    *others: Any, out_val: Any = None, **_: Any,
) -> int:  # fmt: skip
    """The scores once more, and the gradients of P, query, key and value."""
    widths = 3 * key.shape[-1] + 2 * value.shape[-1]
    return 2 * _scores(query, key, others[3], others[4]) * widths


def _product(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *others: Any, out_val: Any = None, **_: Any
) -> int:
    """One product for each gradient that is wanted; the last two arguments say which."""
    return 2 * x.numel() * weight.shape[0] * sum(map(bool, others[-2:]))
