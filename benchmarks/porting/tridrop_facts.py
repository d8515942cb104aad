"""Dropout of tridrop, asked the same as the others."""

import facts
import torch

import tridrop


def dropped_ones(n, p, dtype):
    return tridrop.dropout(torch.ones(n, dtype=getattr(torch, dtype)), p, seed=5).float()


def attention():
    module = tridrop.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, 6, 16)
    _, weights = module(x, x, x, average_attn_weights=False)
    return "after dropout" if (weights == 0).any() else "before dropout"


def gradient_at_1():
    x = torch.ones(4, requires_grad=True)
    tridrop.dropout(x, 1.0).sum().backward()
    return x.grad.tolist()


x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
facts.report(
    "tridrop",
    ["torch"],
    {
        "drawn": facts.drawn(dropped_ones, ("float32", "float16", "bfloat16")),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.float(), tridrop.dropout(x, 0.01, seed=5).float(), 0.01
        ),
        "p = 1": facts.said(lambda: tridrop.dropout(torch.ones(2), 1.0).tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(tridrop.dropout(torch.full((64,), torch.nan), 0.5, seed=1)),
        "noise_shape (None, 1, None) varies along": facts.varies(
            tridrop.dropout(torch.ones(4, 8, 16), 0.5, noise_shape=(None, 1, None), seed=1) != 0
        ),
        "attention returns weights": attention(),
    },
)
