"""Dropout of torch."""

import io

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


def kept(call=F.dropout):
    return call(torch.ones(4096), 0.5) != 0


def saved_by_state_dict():
    """Saved and loaded by a program that seeds as it begins."""
    module = nn.Dropout(0.5)

    def save():
        torch.save(module.state_dict(), file := io.BytesIO())
        return file.getvalue()

    def load(saved):
        torch.manual_seed(0)
        module.load_state_dict(torch.load(io.BytesIO(saved)))

    torch.manual_seed(0)
    return facts.resumed(kept, save, load)


compiled = torch.compile(F.dropout)


def compiled_as_eager():
    masks = []
    for call in (F.dropout, compiled):
        torch.manual_seed(0)
        masks.append(kept(call))
    return torch.equal(*masks)


def feature(kind, shape):
    return facts.varies(getattr(F, kind)(torch.ones(shape), 0.5) != 0)


def attention_masks():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    q = torch.zeros(2, 8, 4, 4)  # equal scores, so that each weight is 0 or not by its mask
    weights = F.scaled_dot_product_attention(q, q, torch.eye(4).expand(2, 8, 4, 4), dropout_p=0.5)
    return facts.varies(weights != 0)


def exported():
    program = torch.export.export(nn.Dropout(0.5).train(), (torch.ones(4),))
    (node,) = (node for node in program.graph.nodes if "dropout" in str(node.target))
    return f"{node.target} with train={node.args[2]}"


x = torch.rand(1 << 20).bfloat16()
facts.report(
    "torch",
    ["torch"],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.float(), F.dropout(x, 0.01).float(), 0.01
        ),
        "p = 1": facts.said(lambda: F.dropout(torch.ones(2), 1.0).tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(F.dropout(torch.full((64,), torch.nan), 0.5)),
        "attention returns weights": attention(),
        "scaled_dot_product_attention's mask varies along": attention_masks(),
        "dropout1d of [N, C, L] varies along": feature("dropout1d", (4, 8, 16)),
        "dropout2d of [N, C, H, W] varies along": feature("dropout2d", (4, 8, 4, 4)),
        "saved by state_dict and loaded": saved_by_state_dict(),
        "saved by get_rng_state and loaded": facts.resumed(
            kept, torch.get_rng_state, torch.set_rng_state
        ),
        "compiled": facts.same(lambda: kept(compiled)),
        "compiled, the mask of eager from the same seed": compiled_as_eager(),
        "torch.export in training": exported(),
    },
)
