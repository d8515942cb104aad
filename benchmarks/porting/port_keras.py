"""A port from Keras on torch or TensorFlow, as KERAS_BACKEND says: see port.py."""

import keras
import numpy as np
from keras import layers, ops
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("keras")


class TridropDropout(layers.Layer):
    """layers.Dropout's place, with the mask of tridrop."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def call(self, x, training=False):
        if not training:
            return x
        return ops.where(masks.keep(self.site, x.shape), x, 0.0) * masks.scale


def model(drops):
    made = keras.Sequential([layers.Dense(16, "relu"), drops[0], layers.Dense(4), drops[1]])
    made.build((5, 8))
    made.set_weights(WEIGHTS)
    return made


evaluated = model([layers.Dropout(P), layers.Dropout(P)])(X, training=False)
ours = model([TridropDropout(0), TridropDropout(1)])
if keras.backend.backend() == "torch":
    trained = ours(X, training=True)
    trained.square().sum().backward()
    slopes = [w.value.grad for w in ours.trainable_weights]
else:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        trained = ours(X, training=True)
        loss = tf.reduce_sum(trained**2)
    slopes = tape.gradient(loss, ours.trainable_weights)
hold(*(ops.convert_to_numpy(v) for v in (evaluated, trained)), [np.asarray(s) for s in slopes])
