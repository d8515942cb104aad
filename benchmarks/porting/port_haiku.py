"""A port from Haiku: see port.py."""

import haiku as hk
import jax
import jax.numpy as jnp
from port import WEIGHTS, Masks, P, X, hold

masks = Masks("jax")


def old_dropout(site, x):
    return hk.dropout(hk.next_rng_key(), P, x)


def our_dropout(site, x):
    """hk.dropout's place, with the mask of tridrop."""
    return jnp.where(masks.keep(site, x.shape), x, 0) * masks.scale


def model(x, training, dropout):
    hidden = jax.nn.relu(hk.Linear(16, name="first")(x))
    hidden = dropout(0, hidden) if training else hidden
    out = hk.Linear(4, name="second")(hidden)
    return dropout(1, out) if training else out


apply = hk.transform(model).apply
w1, b1, w2, b2 = map(jnp.asarray, WEIGHTS)
params = {"first": {"w": w1, "b": b1}, "second": {"w": w2, "b": b2}}


def loss(params):
    out = apply(params, None, X, True, our_dropout)
    return jnp.square(out).sum(), out


evaluated = apply(params, None, X, False, old_dropout)
slopes, trained = jax.jit(jax.grad(loss, has_aux=True))(params)
first, second = slopes["first"], slopes["second"]
hold(evaluated, trained, [first["w"], first["b"], second["w"], second["b"]])
