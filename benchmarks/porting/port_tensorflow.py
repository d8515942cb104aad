"""A port from TensorFlow without Keras, in a tf.function: see port.py."""

import tensorflow as tf
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("tensorflow")


def old_dropout(site, x):
    return tf.nn.dropout(x, P)


def our_dropout(site, x):
    """tf.nn.dropout's place, with the mask of tridrop."""
    return tf.where(masks.keep(site, x.shape), x, 0) * masks.scale


class Model(tf.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.weights = [tf.Variable(weight) for weight in WEIGHTS]

    @tf.function(autograph=False)
    def __call__(self, x, training):
        w1, b1, w2, b2 = self.weights
        hidden = tf.nn.relu(x @ w1 + b1)
        hidden = self.dropout(0, hidden) if training else hidden
        out = hidden @ w2 + b2
        return self.dropout(1, out) if training else out


ours = Model(our_dropout)
with tf.GradientTape() as tape:
    trained = ours(X, True)
    loss = tf.reduce_sum(trained**2)
slopes = tape.gradient(loss, ours.weights)
hold(Model(old_dropout)(X, False).numpy(), trained.numpy(), [slope.numpy() for slope in slopes])
