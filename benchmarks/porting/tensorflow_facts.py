"""Dropout of TensorFlow, eagerly and by XLA."""

import facts
import tensorflow as tf

tf.random.set_seed(0)


def dropped_ones(n, p, dtype):
    return tf.cast(tf.nn.dropout(tf.ones(n, dtype), p), tf.float32).numpy()


@tf.function(jit_compile=True, autograph=False)
def compiled(x, p):
    return tf.cast(tf.nn.dropout(x, p), tf.float32)


def by_xla(n, p, dtype):
    return compiled(tf.ones(n, dtype), p).numpy()


facts.report(
    "tensorflow",
    ["tensorflow-cpu"],
    {
        "drawn": facts.drawn(dropped_ones, ("float32", "float16", "bfloat16")),
        "drawn, by XLA": facts.drawn(by_xla, ("float32", "bfloat16")),
        "p = 1": facts.said(lambda: tf.nn.dropout(tf.ones(2), 1.0).numpy().tolist()),
        "NaN": facts.of_nan(tf.nn.dropout(tf.fill(64, float("nan")), 0.5).numpy()),
        "noise_shape (4, 1, 16) varies along": facts.varies(
            tf.nn.dropout(tf.ones((4, 8, 16)), 0.5, noise_shape=(4, 1, 16)).numpy() != 0
        ),
    },
)
