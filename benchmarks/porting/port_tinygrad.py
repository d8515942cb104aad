"""A port from tinygrad, which compiles by clang, or what CC names: see port.py."""

import os

import numpy as np
from port import WEIGHTS, Masks, P, X, hold

os.environ.setdefault("DEV", "CPU")  # before it is imported
from tinygrad import Context, Tensor, nn

masks = Masks("numpy")


def our_dropout(site, x):
    """Tensor.dropout's place, with the mask of tridrop, made by NumPy."""
    return Tensor(masks.keep(site, x.shape)).where(x, 0) * masks.scale


class Model:
    def __init__(self, dropout):
        self.dropout = dropout
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        w1, b1, w2, b2 = WEIGHTS
        for layer, weight, bias in ((self.first, w1, b1), (self.second, w2, b2)):
            layer.weight = Tensor(np.ascontiguousarray(weight.T))  # [out, in], as torch's
            layer.bias = Tensor(bias)

    def __call__(self, x):
        hidden = self.dropout(0, self.first(x).relu())
        return self.dropout(1, self.second(hidden))


x = Tensor(X)
evaluated = Model(lambda site, x: x.dropout(P))(x)  # TRAINING is 0
ours = Model(our_dropout)
with Context(TRAINING=1):
    trained = ours(x)
    weights = [ours.first.weight, ours.first.bias, ours.second.weight, ours.second.bias]
    slopes = trained.square().sum().gradient(*weights)
w1, b1, w2, b2 = (slope.numpy() for slope in slopes)
hold(evaluated.numpy(), trained.numpy(), [w1.T, b1, w2.T, b2])
