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


def saved_by_state():
    layer = layers.Dropout(0.5, seed=5)
    state = layer.seed_generator.state
    return facts.resumed(lambda: mask(layer), lambda: ops.convert_to_numpy(state), state.assign)


def attention():
    layer = layers.MultiHeadAttention(2, 8, dropout=0.5, seed=3)
    x = keras.random.normal((1, 6, 16), seed=0)
    _, scores = layer(x, x, return_attention_scores=True, training=True)
    return "after dropout" if (numbers(scores) == 0).any() else "before dropout"


def shared():
    layer = layers.Dropout(0.5, noise_shape=(4, 1, 16), seed=1)
    return facts.varies(numbers(layer(ops.ones((4, 8, 16)), training=True)) != 0)


def gradient_at_1():
    layer = layers.Dropout(1.0)
    if BACKEND == "torch":
        x = ops.ones((2,)).requires_grad_()
        layer(x, training=True).sum().backward()
        return x.grad.tolist()
    if BACKEND == "jax":
        import jax

        return jax.grad(lambda x: layer(x, training=True).sum())(ops.ones((2,))).tolist()
    import tensorflow as tf

    x = tf.Variable(tf.ones(2))
    with tf.GradientTape() as tape:
        out = tf.reduce_sum(layer(x, training=True))
    slope = tape.gradient(out, x)
    return slope if slope is None else slope.numpy().tolist()


def compiled():
    """Two calls of a layer that the backend has compiled by itself."""
    layer = layers.Dropout(0.5, seed=1)
    call, x = (lambda x: layer(x, training=True)), ops.ones((4096,))
    if BACKEND == "torch":
        import torch

        call = torch.compile(call)
    elif BACKEND == "jax":
        import jax

        call = jax.jit(call)
    else:
        import tensorflow as tf

        call = tf.function(call, autograph=False)
    first = numbers(call(x)) != 0
    eager = numbers(layers.Dropout(0.5, seed=1)(x, training=True)) != 0
    return {
        "two calls": facts.same(lambda: numbers(call(x)) != 0),
        "the mask of eager from the same seed": bool(np.array_equal(first, eager)),
    }


def fitted():
    """Two steps of ``fit``, as Keras compiles it: a weight is trained where its input is kept."""

    def trained():
        before = numbers(dense.kernel.value)
        model.train_on_batch(x, y)
        return numbers(dense.kernel.value) != before

    x, y = np.ones((1, 256), "float32"), np.ones((1, 1), "float32")
    dense = layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((256,)), layers.Dropout(0.5, seed=1), dense])
    model.compile(keras.optimizers.SGD(0.001), "mse", jit_compile=BACKEND != "torch")
    return facts.same(trained)


def exported():
    """What Keras exports of a model with dropout: a graph of ONNX, or a SavedModel."""
    model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5, seed=1)])
    x = np.ones((1, 64), "float32")
    model(x)  # Keras exports what has been called
    with tempfile.TemporaryDirectory() as folder:
        if BACKEND != "torch":
            import tensorflow as tf

            model.export(folder, format="tf_saved_model", verbose=False)
            loaded = tf.saved_model.load(folder)
            out = loaded.serve(x)
        else:
            import onnxruntime

            path = os.path.join(folder, "model.onnx")
            model.export(path, format="onnx", verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            out = session.run(None, {session.get_inputs()[0].name: x})[0]
    return "nothing dropped" if (numbers(out) == 1).all() else "drops"


def attention_masks():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    layer = layers.MultiHeadAttention(8, 4, dropout=0.5, seed=3)
    layer.build((2, 4, 4), (2, 4, 4))
    q = ops.zeros((2, 4, 8, 4))  # equal scores, so that each weight is 0 or not by its mask
    v = ops.broadcast_to(ops.reshape(ops.eye(4), (1, 4, 1, 4)), (2, 4, 8, 4))
    out, _ = layer._compute_attention(q, q, v, training=True)
    return facts.varies(np.swapaxes(numbers(out), 1, 2) != 0)


x = keras.random.uniform((1 << 20,), seed=0)
x = ops.cast(x, "bfloat16")
facts.report(
    f"keras_{BACKEND}",
    ["keras", {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow-cpu"}[BACKEND]],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            numbers(x),
            numbers(layers.Dropout(0.01, seed=3, dtype="bfloat16")(x, training=True)),
            0.01,
        ),
        "p = 1": facts.said(
            lambda: numbers(layers.Dropout(1.0)(ops.ones(2), training=True)).tolist()
        ),
        "gradient at p = 1": facts.said(lambda: str(gradient_at_1())),
        "NaN": facts.of_nan(
            numbers(layers.Dropout(0.5, seed=1)(ops.full((64,), float("nan")), training=True))
        ),
        "noise_shape (4, 1, 16) varies along": shared(),
        "SpatialDropout1D varies along": facts.varies(
            numbers(layers.SpatialDropout1D(0.5, seed=1)(ops.ones((4, 8, 16)), training=True)) != 0
        ),
        "attention returns scores": attention(),
        "attention's mask varies along": attention_masks(),
        "call 2 of seed 1 is call 1 of seed 2": bool(np.array_equal(of_call(1, 2), of_call(2, 1))),
        "after save and load": saved(),
        "saved by the SeedGenerator's state and loaded": saved_by_state(),
        "compiled by the backend": facts.said(compiled),
        "steps of fit": facts.said(fitted),
        "exported": facts.said(exported),
    },
)
