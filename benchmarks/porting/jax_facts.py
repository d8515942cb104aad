"""Dropout on JAX: jax.random.bernoulli, and the layers of Flax, Haiku and Equinox."""

import os
import subprocess
import sys

import equinox as eqx
import facts
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

KEY = jax.random.PRNGKey(0)


def flax(x, p, key=KEY, **where):
    return nn.Dropout(p, deterministic=False, **where).apply({}, x, rngs={"dropout": key})


def haiku(x, p, key=KEY):
    return hk.dropout(key, p, x)


def equinox(x, p, key=KEY):
    return eqx.nn.Dropout(p)(x, key=key)


def drawn(layer):
    return facts.drawn(lambda n, p, dtype: layer(jnp.ones(n, dtype), p).astype("float32"))


def gradient_at_1(layer):
    return np.asarray(jax.grad(lambda x: layer(x, 1.0).sum())(jnp.ones(2))).tolist()


def bf16_rate(layer):
    """The share that is dropped where the rate itself is bfloat16(0.001)."""
    return float((layer(jnp.ones(1 << 20), jnp.bfloat16(0.001)) == 0).mean())


def weights_of_flax():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    q = jnp.zeros((2, 8, 4, 8))  # equal scores, so that each weight is 0 or not by its mask
    weights = nn.dot_product_attention_weights(
        q, q, dropout_rng=KEY, dropout_rate=0.5, deterministic=False
    )
    return facts.varies(weights != 0)


def with_64_bits():
    """Whether the same key and Python rate draw the same mask under jax_enable_x64."""
    code = "import jax; print(jax.random.bernoulli(jax.random.PRNGKey(0), 0.1, (4096,)).tolist())"
    seen = {
        subprocess.check_output(
            [sys.executable, "-c", code], env=os.environ | {"JAX_ENABLE_X64": x}
        )
        for x in "01"
    }
    return len(seen) == 1


x = jax.random.uniform(jax.random.PRNGKey(1), (1 << 20,)).astype("bfloat16")
nan = jnp.full(64, jnp.nan)
by_multiplying = lambda x, keep: x * keep  # noqa: E731
keep = jax.random.bernoulli(KEY, 0.5, (64,))
facts.report(
    "jax",
    ["jax", "flax", "dm-haiku", "equinox"],
    {
        "Flax, drawn": drawn(flax),
        "Haiku, drawn": drawn(haiku),
        "Equinox, drawn": drawn(equinox),
        "Haiku, share dropped at a bf16 rate of 0.001": facts.said(lambda: bf16_rate(haiku)),
        "Equinox, share dropped at a bf16 rate of 0.001": facts.said(lambda: bf16_rate(equinox)),
        "Flax, bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.astype("float32"), flax(x, 0.01).astype("float32"), 0.01
        ),
        "Flax, p = 1": facts.said(lambda: flax(jnp.ones(2), 1.0).tolist()),
        "Haiku, p = 1": facts.said(lambda: haiku(jnp.ones(2), 1.0).tolist()),
        "Equinox, p = 1": facts.said(lambda: equinox(jnp.ones(2), 1.0).tolist()),
        "Flax, gradient at p = 1": facts.said(lambda: str(gradient_at_1(flax))),
        "Equinox, gradient at p = 1": facts.said(lambda: str(gradient_at_1(equinox))),
        "Flax, NaN": facts.of_nan(flax(nan, 0.5)),
        "Haiku, NaN": facts.of_nan(haiku(nan, 0.5)),
        "Equinox, NaN": facts.of_nan(equinox(nan, 0.5)),
        "NaN times a bool mask, by jnp's product": facts.of_nan(by_multiplying(nan, keep)),
        "NaN times a bool mask, under jit": facts.of_nan(jax.jit(by_multiplying)(nan, keep)),
        "a Python rate and a float32 one draw the same": bool(
            (
                jax.random.bernoulli(KEY, 0.1, (4096,))
                == jax.random.bernoulli(KEY, jnp.float32(0.1), (4096,))
            ).all()
        ),
        "the mask is the same with jax_enable_x64": with_64_bits(),
        "Flax, broadcast_dims=(1,) of three varies along": facts.varies(
            flax(jnp.ones((4, 8, 16)), 0.5, broadcast_dims=(1,)) != 0
        ),
        "Flax, attention's mask varies along": weights_of_flax(),
    },
)
