"""A port from Flax: see port.py."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("jax")


class TridropDropout(nn.Module):
    """nn.Dropout's place, with the mask of tridrop."""

    site: int

    @nn.compact
    def __call__(self, x, deterministic):
        if deterministic:
            return x
        return jnp.where(masks.keep(self.site, x.shape), x, 0) * masks.scale


class Model(nn.Module):
    ours: bool

    @nn.compact
    def __call__(self, x, deterministic):
        drops = [TridropDropout(i) if self.ours else nn.Dropout(P) for i in range(2)]
        hidden = drops[0](nn.relu(nn.Dense(16)(x)), deterministic=deterministic)
        return drops[1](nn.Dense(4)(hidden), deterministic=deterministic)


w1, b1, w2, b2 = map(jnp.asarray, WEIGHTS)
params = {"Dense_0": {"kernel": w1, "bias": b1}, "Dense_1": {"kernel": w2, "bias": b2}}


def loss(params):
    out = Model(ours=True).apply({"params": params}, X, deterministic=False)
    return jnp.square(out).sum(), out


evaluated = Model(ours=False).apply({"params": params}, X, deterministic=True)
slopes, trained = jax.jit(jax.grad(loss, has_aux=True))(params)
first, second = slopes["Dense_0"], slopes["Dense_1"]
hold(evaluated, trained, [first["kernel"], first["bias"], second["kernel"], second["bias"]])
