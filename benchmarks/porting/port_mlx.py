"""A port from MLX: see port.py."""

import mlx.core as mx
import numpy as np
from mlx import nn
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("numpy")


class TridropDropout(nn.Module):
    """nn.Dropout's place, with the mask of tridrop, made by NumPy."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def __call__(self, x):
        if not self.training:
            return x
        return mx.where(mx.array(masks.keep(self.site, x.shape)), x, 0) * masks.scale


def model(drops):
    made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), drops[0], nn.Linear(16, 4), drops[1])
    w1, b1, w2, b2 = map(mx.array, WEIGHTS)
    for i, weight, bias in ((0, w1, b1), (3, w2, b2)):
        made.layers[i].weight, made.layers[i].bias = weight.T, bias  # [out, in], as torch's
    return made


def loss(x):
    out = ours(x)
    return mx.square(out).sum(), out


old = model([nn.Dropout(P), nn.Dropout(P)]).eval()
ours = model([TridropDropout(0), TridropDropout(1)]).train()
x = mx.array(X)
(_, trained), slopes = nn.value_and_grad(ours, loss)(x)
first, second = (slopes["layers"][i] for i in (0, 3))
hold(
    np.array(old(x)),
    np.array(trained),
    [np.array(g) for g in (first["weight"].T, first["bias"], second["weight"].T, second["bias"])],
)
