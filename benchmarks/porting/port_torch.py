"""A port from torch, by tridrop.swap of the model as it is: see port.py."""

import torch
from port import SEED, WEIGHTS, Masks, P, X, hold
from torch import nn

import tridrop

masks = Masks("numpy")


class TridropDropout(nn.Module):
    """nn.Dropout's place, with the mask of tridrop, made by NumPy."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        keep = torch.from_numpy(masks.keep(self.site, x.shape))
        return torch.where(keep, x, 0) * masks.scale


def model(drops):
    made = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), drops[0], nn.Linear(16, 4), drops[1])
    for parameter, weight in zip(made.parameters(), WEIGHTS, strict=True):
        parameter.data = torch.tensor(weight.T if weight.ndim == 2 else weight)
    return made


def step(made):
    """A training forward, and the gradients with weights as [in, out]."""
    out = made.train()(x)
    gradients = torch.autograd.grad(out.square().sum(), list(made.parameters()))
    return out.detach().numpy(), [g.T.numpy() for g in gradients]


x = torch.tensor(X)
old = model([nn.Dropout(P), nn.Dropout(P)])
evaluated = old.eval()(x).detach().numpy()
hold(evaluated, *step(model([TridropDropout(0), TridropDropout(1)])))

# The whole port in one call: the model's two sites draw the streams 0 and 1 of the seed.
report = tridrop.swap(old)
assert [site.stream for site in report.sites] == [0, 1], report
with tridrop.rng(SEED):
    hold(old.eval()(x).detach().numpy(), *step(old))
