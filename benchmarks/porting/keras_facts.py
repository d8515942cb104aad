"""Dropout of Keras on the backend that KERAS_BACKEND names."""

import os
import tempfile

import facts
import keras
import numpy as np
from keras import layers, ops

BACKEND = keras.backend.backend()


def numbers(value):
    return ops.convert_to_numpy(ops.cast(value, "float32"))


def dropped_ones(n, p, dtype):
    return numbers(layers.Dropout(p, seed=3, dtype=dtype)(ops.ones((n,), dtype), training=True))


def mask(layer):
    return numbers(layer(ops.ones((64, 64)), training=True)) != 0


def of_call(seed, calls):
    layer = layers.Dropout(0.5, seed=seed)
    return [mask(layer) for _ in range(calls)][-1]


def saved():
    model = keras.Sequential([layers.Dropout(0.5, seed=5)])
    first, _ = mask(model.layers[0]), mask(model.layers[0])
    model.build((64, 64))
    with tempfile.TemporaryDirectory() as folder:
        model.save(os.path.join(folder, "model.keras"))
        loaded = keras.models.load_model(os.path.join(folder, "model.keras"))
    again = mask(loaded.layers[0])
    if np.array_equal(again, first):
        return "begins again"
    return "goes on" if np.array_equal(again, mask(model.layers[0])) else "neither"


def attention():
    layer = layers.MultiHeadAttention(2, 8, dropout=0.5, seed=3)
    x = keras.random.normal((1, 6, 16), seed=0)
    _, scores = layer(x, x, return_attention_scores=True, training=True)
    return "after dropout" if (numbers(scores) == 0).any() else "before dropout"


def shared():
    layer = layers.Dropout(0.5, noise_shape=(4, 1, 16), seed=1)
    return facts.varies(numbers(layer(ops.ones((4, 8, 16)), training=True)) != 0)


facts.report(
    f"keras_{BACKEND}",
    ["keras", {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow-cpu"}[BACKEND]],
    {
        "drawn": facts.drawn(dropped_ones, ("float32", "float16", "bfloat16")),
        "p = 1": facts.said(
            lambda: numbers(layers.Dropout(1.0)(ops.ones(2), training=True)).tolist()
        ),
        "NaN": facts.of_nan(
            numbers(layers.Dropout(0.5, seed=1)(ops.full((64,), float("nan")), training=True))
        ),
        "noise_shape (4, 1, 16) varies along": shared(),
        "attention returns scores": attention(),
        "call 2 of seed 1 is call 1 of seed 2": bool(np.array_equal(of_call(1, 2), of_call(2, 1))),
        "after save and load": saved(),
    },
)
