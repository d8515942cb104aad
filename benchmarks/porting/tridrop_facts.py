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


def kept(call=tridrop.dropout, **seed):
    return call(torch.ones(4096), 0.5, **seed) != 0


class Training:
    """A loop whose masks are a function of its step."""

    step = 0

    def mask(self):
        with tridrop.rng(tridrop.fold_in(7, self.step)):
            mask = kept()
        self.step += 1
        return mask

    def load(self, step):
        self.step = step


training = Training()
compiled = torch.compile(lambda x, p, seed=None: tridrop.dropout(x, p, seed=seed))


def shared(*noise_shape):
    x = torch.ones(4, 8, 16) if len(noise_shape) == 3 else torch.ones(2, 8, 4, 4)
    return facts.varies(tridrop.dropout(x, 0.5, noise_shape=noise_shape, seed=1) != 0)


def attention_masks():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    q = torch.zeros(2, 8, 4, 4)
    v = torch.eye(4).expand(2, 8, 4, 4)
    return facts.varies(tridrop.scaled_dot_product_attention(q, q, v, None, 0.5, seed=1) != 0)


def exported(training):
    module = tridrop.nn.Dropout(0.5).train(training)
    program = torch.export.export(module, (torch.ones(4),))
    return sorted({str(n.target) for n in program.graph.nodes if n.op == "call_function"})


def to_onnx():
    return torch.onnx.export(tridrop.nn.Dropout(0.5).train(), (torch.ones(4),), dynamo=True)


x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
facts.report(
    "tridrop",
    ["torch"],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.float(), tridrop.dropout(x, 0.01, seed=5).float(), 0.01
        ),
        "p = 1": facts.said(lambda: tridrop.dropout(torch.ones(2), 1.0).tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(tridrop.dropout(torch.full((64,), torch.nan), 0.5, seed=1)),
        "bfloat16, share dropped at p = 0.0078125": dropped_ones(1 << 20, 0.0078125, "bfloat16")
        .eq(0)
        .float()
        .mean()
        .item(),
        "noise_shape (None, 1, None) varies along": shared(None, 1, None),
        "noise_shape (None, 1, 1) varies along": shared(None, 1, 1),
        "noise_shape (None, None, 1) varies along": shared(None, None, 1),
        "noise_shape (1, 1, None, None) varies along": shared(1, 1, None, None),
        "noise_shape (None, 1, 1, None) varies along": shared(None, 1, 1, None),
        "noise_shape (None, None, 1, 1) varies along": shared(None, None, 1, 1),
        "scaled_dot_product_attention's mask varies along": attention_masks(),
        "saved by the number of the step": facts.resumed(
            training.mask, lambda: training.step, training.load
        ),
        "compiled": facts.same(lambda: kept(compiled)),
        "compiled, the mask of eager from the same seed": torch.equal(
            kept(seed=7), kept(compiled, seed=7)
        ),
        "torch.export in evaluation": exported(False),
        "torch.export in training": facts.said(lambda: exported(True)),
        "ONNX in training": facts.said(to_onnx),
        "attention returns weights": attention(),
    },
)
