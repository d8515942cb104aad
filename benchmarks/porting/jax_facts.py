"""Dropout on JAX: jax.random.bernoulli, and the layers of Flax, Haiku and Equinox."""

import inspect
import os
import subprocess
import sys

import equinox as eqx
import facts
import haiku as hk
import jax
import jax.export
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
    """The shares that are dropped where the rate itself is a bfloat16."""
    ones = jnp.ones(1 << 20)
    shares = (float((layer(ones, jnp.bfloat16(p)) == 0).mean()) for p in facts.RATES)
    return [float(f"{share:.3g}") for share in shares]


def weights_of_flax(**options):
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    q = jnp.zeros((2, 8, 4, 8))  # equal scores, so that each weight is 0 or not by its mask
    weights = nn.dot_product_attention_weights(
        q, q, dropout_rng=KEY, dropout_rate=0.5, deterministic=False, **options
    )
    return facts.varies(weights != 0)


def sown_by_flax():
    """What Flax's attention gives away of its weights, where it is asked to sow them."""
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    x = jax.random.normal(KEY, (1, 6, 16))
    variables = layer.init({"params": KEY, "dropout": KEY}, x)
    _, state = layer.apply(
        variables, x, rngs={"dropout": KEY}, sow_weights=True, mutable=["intermediates"]
    )
    (weights,) = state["intermediates"]["attention_weights"]
    return "after dropout" if (weights == 0).any() else "before dropout"


def returned_by_flax():
    layer = nn.MultiHeadDotProductAttention(2)
    x = jnp.ones((1, 6, 16))
    return type(layer.init_with_output(KEY, x)[0]).__name__


def attention_of_haiku():
    arguments = inspect.signature(hk.MultiHeadAttention.__init__).parameters
    layer = hk.transform(lambda x: hk.MultiHeadAttention(2, 8, w_init_scale=1.0)(x, x, x))
    x = jnp.ones((1, 6, 16))
    return {
        "arguments of dropout": [name for name in arguments if "drop" in name],
        "returns": type(layer.apply(layer.init(KEY, x), None, x)).__name__,
    }


def attention_of_equinox():
    """What it returns, and whether its heads have masks of their own."""
    layer = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.5, key=KEY)
    x = jnp.ones((6, 4))  # equal scores and values: what differs among heads is their masks
    eye = eqx.nn.Linear(4, 4, use_bias=False, key=KEY)
    eye = eqx.tree_at(lambda m: m.weight, eye, jnp.eye(4))
    layer = eqx.tree_at(lambda m: (m.value_proj, m.output_proj), layer, (eye, eye))
    out = layer(x, x, x, key=KEY)
    return {
        "returns": type(out).__name__,
        "heads share a mask": bool((out[:, 0] == out[:, 2]).all()),
    }


def under_jit(layer):
    """Whether compiling changes the mask of a key, and what a key that is not an argument does."""
    ones = jnp.ones(4096)
    by_key = jax.jit(lambda key: layer(ones, 0.5, key) != 0)
    closed = jax.jit(lambda: layer(ones, 0.5) != 0)
    return {
        "the mask of eager from the same key": bool((by_key(KEY) == (layer(ones, 0.5) != 0)).all()),
        "a key that is not an argument": facts.same(closed),
    }


def exported(layer):
    """Whether jax.export of a training call has the mask of its key."""
    ones = jnp.ones(4096)
    call = jax.jit(lambda key: layer(ones, 0.5, key) != 0)
    loaded = jax.export.deserialize(jax.export.export(call)(KEY).serialize())
    return bool((loaded.call(KEY) == call(KEY)).all())


class Training:
    """A loop that saves its step and makes the key of it."""

    def __init__(self, layer):
        self.layer, self.step = layer, 0

    def mask(self):
        self.step += 1
        return self.layer(jnp.ones(4096), 0.5, jax.random.fold_in(KEY, self.step)) != 0

    def load(self, step):
        self.step = step


def saved_by_step(layer):
    training = Training(layer)
    return facts.resumed(training.mask, lambda: training.step, training.load)


def split_from(layer):
    """Saved are the parameters alone, and the program makes its first key again."""

    class Split(Training):
        def mask(self):
            self.key, key = jax.random.split(getattr(self, "key", KEY))
            return self.layer(jnp.ones(4096), 0.5, key) != 0

        def load(self, saved):
            self.key = KEY

    training = Split(layer)
    return facts.resumed(training.mask, lambda: None, training.load)


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


def of_each(fact):
    return {name: facts.said(lambda layer=layer: fact(layer)) for name, layer in LAYERS.items()}


LAYERS = {"Flax": flax, "Haiku": haiku, "Equinox": equinox}
x = jax.random.uniform(jax.random.PRNGKey(1), (1 << 20,)).astype("bfloat16")
nan = jnp.full(64, jnp.nan)
three = jnp.ones((4, 8, 16))
by_multiplying = lambda x, keep: x * keep  # noqa: E731
keep = jax.random.bernoulli(KEY, 0.5, (64,))
facts.report(
    "jax",
    ["jax", "flax", "dm-haiku", "equinox"],
    {
        "drawn": of_each(drawn),
        "shares dropped, the rate a bfloat16": of_each(bf16_rate),
        "bfloat16, p = 0.01, uniform values gain": of_each(
            lambda layer: facts.gained(x.astype("float32"), layer(x, 0.01).astype("float32"), 0.01)
        ),
        "p = 1": of_each(lambda layer: layer(jnp.ones(2), 1.0).tolist()),
        "gradient at p = 1": of_each(lambda layer: str(gradient_at_1(layer))),
        "NaN": of_each(lambda layer: facts.of_nan(layer(nan, 0.5))),
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
            flax(three, 0.5, broadcast_dims=(1,)) != 0
        ),
        "Haiku, broadcast_dims=(1,) of three varies along": facts.varies(
            hk.dropout(KEY, 0.5, three, broadcast_dims=(1,)) != 0
        ),
        "Equinox, arguments of Dropout": list(inspect.signature(eqx.nn.Dropout).parameters),
        "Flax, attention's mask varies along": weights_of_flax(),
        "Flax, with broadcast_dropout=False": weights_of_flax(broadcast_dropout=False),
        "Flax, attention returns": returned_by_flax(),
        "Flax, attention's weights that are sown": sown_by_flax(),
        "Haiku, attention": attention_of_haiku(),
        "Equinox, attention": attention_of_equinox(),
        "saved as a step, key by fold_in": of_each(saved_by_step),
        "saved without the key": of_each(split_from),
        "jit": of_each(under_jit),
        "jax.export has the mask of its key": of_each(exported),
    },
)
