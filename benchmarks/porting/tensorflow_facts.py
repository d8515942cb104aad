"""Dropout of TensorFlow, eagerly and by XLA."""

import tempfile

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


def gained():
    x = tf.cast(tf.random.uniform([1 << 20]), "bfloat16")
    out = tf.nn.dropout(x, 0.01)
    # Of the elements that are kept: the rate is another than 0.01, and the scale is what is asked.
    return facts.gained(tf.cast(x, "float32"), tf.cast(out, "float32"), 0.01)


class Module(tf.Module):
    @tf.function(autograph=False, input_signature=[tf.TensorSpec([4096])])
    def __call__(self, x):
        return tf.nn.dropout(x, 0.5)


def kept(call=lambda x: tf.nn.dropout(x, 0.5)):
    return call(tf.ones(4096)).numpy() != 0


def saved_by_a_checkpoint():
    """Saved and loaded by a program that seeds as it begins."""
    module, folder = Module(), tempfile.mkdtemp()

    def load(path):
        tf.random.set_seed(0)
        tf.train.Checkpoint(module=module).restore(path)

    tf.random.set_seed(0)
    return facts.resumed(
        kept, lambda: tf.train.Checkpoint(module=module).save(f"{folder}/checkpoint"), load
    )


class Training:
    """A loop that saves its step, of which a stateless dropout makes the mask."""

    step = 0

    def mask(self):
        self.step += 1
        seed = (7, self.step)
        return tf.nn.experimental.stateless_dropout(tf.ones(4096), 0.5, seed).numpy() != 0

    def load(self, step):
        self.step = step


def of_one_seed(first, second):
    masks = []
    for call in (first, second):
        tf.random.set_seed(0)
        masks.append(kept(call))
    return bool((masks[0] == masks[1]).all())


def exported():
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(Module(), folder)
        loaded = tf.saved_model.load(folder)
        return "drops, " + facts.same(lambda: kept(loaded)) if not kept(loaded).all() else "nothing"


training = Training()
eager = lambda x: tf.nn.dropout(x, 0.5)  # noqa: E731
by_function = tf.function(eager, autograph=False)
xla = tf.function(eager, autograph=False, jit_compile=True)
facts.report(
    "tensorflow",
    ["tensorflow-cpu"],
    {
        "drawn": facts.drawn(dropped_ones),
        "drawn, by XLA": facts.drawn(by_xla),
        "bfloat16, p = 0.01, uniform values gain": gained(),
        "p = 1": facts.said(lambda: tf.nn.dropout(tf.ones(2), 1.0).numpy().tolist()),
        "NaN": facts.of_nan(tf.nn.dropout(tf.fill(64, float("nan")), 0.5).numpy()),
        "noise_shape (4, 1, 16) varies along": facts.varies(
            tf.nn.dropout(tf.ones((4, 8, 16)), 0.5, noise_shape=(4, 1, 16)).numpy() != 0
        ),
        "functions of tf.nn with attention in their name": [
            name for name in dir(tf.nn) if "attention" in name
        ],
        "saved by a checkpoint and loaded": saved_by_a_checkpoint(),
        "saved by the step, of stateless_dropout": facts.resumed(
            training.mask, lambda: training.step, training.load
        ),
        "tf.function": facts.same(lambda: kept(by_function)),
        "XLA": facts.same(lambda: kept(xla)),
        "tf.function, the mask of eager from the same seed": of_one_seed(eager, by_function),
        "XLA, the mask of tf.function from the same seed": of_one_seed(by_function, xla),
        "a SavedModel of a function that drops": exported(),
    },
)
