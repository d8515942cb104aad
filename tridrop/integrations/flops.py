"""FLOP formulas for torch, of the operators that multiply matrices.

``torch.utils.flop_counter.FlopCounterMode`` looks up a formula for each operator. These are torch's
own formulas for attention and linear layers: a multiplication and an addition count as two
operations, and scores that a mask or a band excludes count too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OP = torch.ops.tridrop


def register() -> None:
    """Register the formulas of attention and of products with a dropped matrix."""
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in (
        (_OP.attention_forward, _attention),
        (_OP.attention_backward, _attention_backward),
        (_OP.product_forward, _product),
        (_OP.product_backward, _product_backward),
    ):
        register_flop_formula(operator, get_raw=True)(formula)


def _scores(query: Tensor, key: Tensor, cu_query: Tensor | None, cu_key: Tensor | None) -> int:
    """The number of scores. Each packed sequence has scores only within itself."""
    batch, heads, queries, _ = query.shape
    if cu_query is None or cu_key is None:
        return batch * heads * queries * key.shape[2]
    if cu_query.is_meta or cu_query.numel() < 2:
        return heads * queries * key.shape[2]  # lengths are unknown: as if all were one sequence
    return heads * int((cu_query.diff().long() * cu_key.diff().long()).sum())


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, out_val: Any = None, **_: Any
) -> int:
    """The products query key^T and P value; ``others`` are the arguments in ops/attention.py."""
    return 2 * _scores(query, key, others[3], others[4]) * (key.shape[-1] + value.shape[-1])


def _attention_backward(
    dout: Tensor, dlse: Any, out: Any, lse: Any, query: Tensor, key: Tensor, value: Tensor,
    *others: Any, out_val: Any = None, **_: Any,
) -> int:  # fmt: skip
    """The scores again, and the gradients of P, query, key and value."""
    widths = 3 * key.shape[-1] + 2 * value.shape[-1]
    return 2 * _scores(query, key, others[3], others[4]) * widths


def _product(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *others: Any, out_val: Any = None, **_: Any
) -> int:
    """One product per gradient that is needed, as the last two arguments say."""
    return 2 * x.numel() * weight.shape[0] * sum(map(bool, others[-2:]))
