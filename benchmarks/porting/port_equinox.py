"""A port from Equinox, whose layers are of one sample: see port.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import nn
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("jax")
KEY = jax.random.key(0)


class TridropDropout(eqx.Module):
    """nn.Dropout's place, with the mask of tridrop: of the batch, so outside of vmap."""

    site: int

    def __call__(self, x, key=None):
        return jnp.where(masks.keep(self.site, x.shape), x, 0) * masks.scale


class Model(eqx.Module):
    first: nn.Linear
    second: nn.Linear
    drops: tuple

    def __call__(self, x, key):
        keys = jax.random.split(key)
        hidden = jax.nn.relu(jax.vmap(self.first)(x))
        hidden = self.drops[0](hidden, key=keys[0])
        return self.drops[1](jax.vmap(self.second)(hidden), key=keys[1])


def linear(weight, bias):
    """A layer with given weights; Equinox keeps them as [out, in], as torch does."""
    made = nn.Linear(*weight.shape, key=KEY)
    return eqx.tree_at(lambda m: (m.weight, m.bias), made, (jnp.asarray(weight.T), bias))


w1, b1, w2, b2 = WEIGHTS
layers = linear(w1, jnp.asarray(b1)), linear(w2, jnp.asarray(b2))
old = eqx.nn.inference_mode(Model(*layers, (nn.Dropout(P), nn.Dropout(P))))
ours = Model(*layers, (TridropDropout(0), TridropDropout(1)))


@eqx.filter_jit
@eqx.filter_grad(has_aux=True)
def slopes_of(model):
    out = model(X, KEY)
    return jnp.square(out).sum(), out


slopes, trained = slopes_of(ours)
first, second = slopes.first, slopes.second
hold(old(X, KEY), trained, [first.weight.T, first.bias, second.weight.T, second.bias])
