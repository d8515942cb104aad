"""Dropout of torch."""

import facts
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


def dropped_ones(n, p, dtype):
    return F.dropout(torch.ones(n, dtype=getattr(torch, dtype)), p).float()


def attention():
    module = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, 6, 16)
    _, weights = module(x, x, x, average_attn_weights=False)
    return "after dropout" if (weights == 0).any() else "before dropout"


def gradient_at_1():
    x = torch.ones(4, requires_grad=True)
    F.dropout(x, 1.0).sum().backward()
    return x.grad.tolist()


x = torch.rand(1 << 20).bfloat16()
facts.report(
    "torch",
    ["torch"],
    {
        "drawn": facts.drawn(dropped_ones, ("float32", "float16", "bfloat16")),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.float(), F.dropout(x, 0.01).float(), 0.01
        ),
        "p = 1": facts.said(lambda: F.dropout(torch.ones(2), 1.0).tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(F.dropout(torch.full((64,), torch.nan), 0.5)),
        "attention returns weights": attention(),
    },
)
