"""Dropout of MLX."""

import inspect
import os
import tempfile

import facts
import mlx.core as mx
import numpy as np
from mlx import nn

mx.random.seed(0)


def dropped_ones(n, p, dtype):
    return np.array(nn.Dropout(p)(mx.ones((n,), getattr(mx, dtype))).astype(mx.float32))


def kept(layer):
    return np.array(layer(mx.ones((4096,)))) != 0


def compiled(**state):
    layer = nn.Dropout(0.5)
    call = mx.compile(lambda x: layer(x), **state)
    return facts.same(lambda: kept(call))


def saved_by_weights():
    """Saved and loaded by a program that seeds as it begins."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    def save():
        model.save_weights(path := os.path.join(tempfile.mkdtemp(), "w.safetensors"))
        return path

    def load(path):
        mx.random.seed(0)
        model.load_weights(path)

    mx.random.seed(0)
    return facts.resumed(lambda: kept(model.layers[1]), save, load)


def saved_by_state():
    def load(saved):
        mx.random.state[0] = mx.array(saved)

    layer = nn.Dropout(0.5)
    return facts.resumed(lambda: kept(layer), lambda: np.array(mx.random.state[0]), load)


class Training:
    """A loop that saves its step, of which it makes the seed."""

    def __init__(self):
        self.layer, self.step = nn.Dropout(0.5), 0

    def mask(self):
        self.step += 1
        mx.random.seed(self.step)
        return kept(self.layer)

    def load(self, step):
        self.step = step


def compiled_as_eager():
    layer, masks = nn.Dropout(0.5), []
    for call in (layer, mx.compile(lambda x: layer(x), mx.random.state, mx.random.state)):
        mx.random.seed(1)
        masks.append(kept(call))
    return bool(np.array_equal(*masks))


training = Training()


def exported():
    layer, path = nn.Dropout(0.5), os.path.join(tempfile.mkdtemp(), "dropout.mlxfn")
    mx.export_function(path, lambda x: layer(x), mx.ones((4096,)))
    call = mx.import_function(path)
    return facts.same(lambda: kept(lambda x: call(x)[0]))


def attention():
    layer = nn.MultiHeadAttention(16, 2)
    x = mx.ones((1, 6, 16))
    arguments = [
        name for name in inspect.signature(nn.MultiHeadAttention).parameters if "drop" in name
    ]
    return {"arguments of dropout": arguments, "returns": type(layer(x, x, x)).__name__}


x = mx.random.uniform(shape=(1 << 20,)).astype(mx.bfloat16)
facts.report(
    "mlx",
    ["mlx"],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            np.array(x.astype(mx.float32)),
            np.array(nn.Dropout(0.01)(x).astype(mx.float32)),
            0.01,
        ),
        "p = 1": facts.said(lambda: np.array(nn.Dropout(1.0)(mx.ones((2,)))).tolist()),
        "NaN": facts.of_nan(np.array(nn.Dropout(0.5)(mx.full((64,), float("nan"))))),
        "Dropout2d of [N, H, W, C] varies along": facts.varies(
            np.array(nn.Dropout2d(0.5)(mx.ones((4, 8, 8, 16)))) != 0
        ),
        "attention": attention(),
        "saved by save_weights and loaded": saved_by_weights(),
        "saved by mx.random.state and loaded": facts.said(saved_by_state),
        "saved by the step, of mx.random.seed": facts.resumed(
            training.mask, lambda: training.step, training.load
        ),
        "compiled": compiled(),
        "compiled, the mask of eager from the same seed": compiled_as_eager(),
        "compiled, the random state as inputs and outputs": compiled(
            inputs=mx.random.state, outputs=mx.random.state
        ),
        "export_function in training": facts.said(exported),
    },
)
