"""A port from PaddlePaddle, see port.py; and what corrects a model of downscale_in_infer."""

import numpy as np
import paddle
import torch
from paddle import nn
from paddle.nn import functional as F
from port import WEIGHTS, Masks, P, X, hold

import tridrop

masks = Masks("numpy")


class TridropDropout(nn.Layer):
    """nn.Dropout's place, with the mask of tridrop, made by NumPy."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        if not self.training:
            return x
        keep = paddle.to_tensor(masks.keep(self.site, x.shape))
        return paddle.where(keep, x, paddle.zeros_like(x)) * masks.scale


def model(drops):
    layers = [nn.Linear(8, 16), nn.ReLU(), drops[0], nn.Linear(16, 4), drops[1]]
    made = nn.Sequential(*layers)
    for parameter, weight in zip(made.parameters(), WEIGHTS, strict=True):
        parameter.set_value(weight)
    return made


x = paddle.to_tensor(X)
old = model([nn.Dropout(P), nn.Dropout(P)])
old.eval()
ours = model([TridropDropout(0), TridropDropout(1)])
ours.train()
trained = ours(x)
trained.square().sum().backward()
hold(old(x).numpy(), trained.numpy(), [p.grad.numpy() for p in ours.parameters()])

# downscale_in_infer keeps 1 as 1 in training and makes 1 - p of it in evaluation: it is
# (1 - p) * tridrop.dropout(x, p, training), in both.
ones = paddle.ones([64, 64])
for training in (True, False):
    theirs = F.dropout(ones, P, training=training, mode="downscale_in_infer").numpy()
    equal = ((1 - P) * tridrop.dropout(torch.ones(64, 64), P, training, seed=1)).numpy()
    assert np.array_equal(np.unique(theirs), np.unique(equal)), (training, np.unique(theirs))
    assert abs(theirs.mean() - equal.mean()) < 0.05
print("downscale_in_infer is (1 - p) * dropout")
