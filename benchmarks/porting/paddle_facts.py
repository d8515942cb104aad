"""Dropout of PaddlePaddle."""

import os
import tempfile

import facts
import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

paddle.seed(0)
ones = paddle.ones


def dropped_ones(n, p, dtype):
    return F.dropout(ones([n], dtype), p, training=True).astype("float32").numpy()


def infer(mode, training):
    paddle.seed(1)
    out = F.dropout(ones([8, 8]), 0.25, training=training, mode=mode).numpy()
    return sorted({round(float(value), 6) for value in out.ravel()})


def kept(call=lambda x: F.dropout(x, 0.5)):
    return call(ones([4096])).numpy() != 0


def gradient_at_1():
    x = ones([2])
    x.stop_gradient = False
    F.dropout(x, 1.0).sum().backward()
    return x.grad.numpy().tolist()


def saved_by_state_dict():
    """Saved and loaded by a program that seeds as it begins."""
    layer = nn.Dropout(0.5)

    def save():
        paddle.save(layer.state_dict(), path := os.path.join(tempfile.mkdtemp(), "state"))
        return path

    def load(path):
        paddle.seed(0)
        layer.set_state_dict(paddle.load(path))

    paddle.seed(0)
    return facts.resumed(lambda: kept(layer), save, load)


def attention(**options):
    layer = nn.MultiHeadAttention(16, 2, dropout=0.5, **options)
    layer.train()
    return layer(paddle.rand([1, 6, 16]))


def weights_of_attention():
    _, weights = attention(need_weights=True)
    return "after dropout" if (weights.numpy() == 0).any() else "before dropout"


def attention_masks():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    layer = nn.MultiHeadAttention(16, 8, dropout=0.5, need_weights=True)
    layer.train()
    _, weights = layer(paddle.zeros([2, 4, 16]))
    return facts.varies(weights.numpy() != 0)


def exported():
    layer, path = nn.Dropout(0.5), os.path.join(tempfile.mkdtemp(), "dropout")
    layer.train()
    paddle.jit.save(layer, path, [paddle.static.InputSpec([4096], "float32")])
    loaded = paddle.jit.load(path)
    return "nothing dropped" if kept(loaded).all() else "drops, " + facts.same(lambda: kept(loaded))


@paddle.jit.to_static(full_graph=True)
def compiled(x):
    return F.dropout(x, 0.5)


def compiled_as_eager():
    masks = []
    for call in (lambda x: F.dropout(x, 0.5), compiled):
        paddle.seed(0)
        masks.append(kept(call))
    return bool(np.array_equal(*masks))


x = paddle.rand([1 << 20]).astype("bfloat16")
facts.report(
    "paddle",
    ["paddlepaddle"],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.astype("float32").numpy(), F.dropout(x, 0.01).astype("float32").numpy(), 0.01
        ),
        "p = 1": facts.said(lambda: F.dropout(ones([2]), 1.0).numpy().tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(F.dropout(paddle.full([64], float("nan")), 0.5).numpy()),
        "axis=[0] of three varies along": facts.varies(
            F.dropout(ones([4, 8, 16]), 0.5, axis=[0]).numpy() != 0
        ),
        "attention returns": type(attention()).__name__,
        "attention with need_weights returns weights": weights_of_attention(),
        "attention's mask varies along": attention_masks(),
        "saved by state_dict and loaded": saved_by_state_dict(),
        "saved by get_rng_state and loaded": facts.resumed(
            kept, paddle.get_rng_state, paddle.set_rng_state
        ),
        "to_static": facts.same(lambda: kept(compiled)),
        "to_static, the mask of eager from the same seed": compiled_as_eager(),
        "jit.save in training": facts.said(exported),
        "downscale_in_infer, p = 0.25, values of ones in training": infer(
            "downscale_in_infer", True
        ),
        "downscale_in_infer, p = 0.25, values of ones in evaluation": infer(
            "downscale_in_infer", False
        ),
        "downscale_in_infer in evaluation, of one dimension": facts.said(
            lambda: F.dropout(ones([4]), 0.25, training=False, mode="downscale_in_infer").tolist()
        ),
        "upscale_in_train, p = 0.25, values of ones in training": infer("upscale_in_train", True),
        "upscale_in_train, p = 0.25, values of ones in evaluation": infer(
            "upscale_in_train", False
        ),
    },
)
