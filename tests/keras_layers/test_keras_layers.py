"""Dropout layers of Keras with tridrop's masks: values, seeds, modes, dtypes and models."""

import doctest
import importlib

import numpy as np
import pytest
import torch
from apart import printed
from keras_shared import keep, keras, masked, mlp, tridrop

from tridrop.keras.present import check_backend

layers = tridrop.keras
KINDS = {
    "Dropout": (8, 16),
    "SpatialDropout1D": (3, 5, 16),
    "SpatialDropout2D": (2, 3, 4, 16),
    "SpatialDropout3D": (2, 2, 3, 4, 16),
    "AlphaDropout": (8, 16),
    "GaussianDropout": (8, 16),
}


@pytest.mark.parametrize("module", ["layers", "attention"])
def test_examples(module):
    found = doctest.testmod(importlib.import_module(f"tridrop.keras.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_call_draws_the_published_mask_of_its_number(name):
    x = torch.rand(KINDS[name]) + 1
    layer = getattr(layers, name)(0.25, seed=11)
    space = (1,) * (x.dim() - 2)
    shared = (None, *space, None) if name.startswith("Spatial") else None
    for call in range(3):
        out = layer(x, training=True)
        seed = tridrop.fold_in(11, call)
        if name == "AlphaDropout":
            expected = tridrop.alpha_dropout(x, 0.25, True, seed=seed)
        elif name == "GaussianDropout":
            expected = x * (1 + (0.25 / 0.75) ** 0.5 * tridrop.normal_noise(seed, x.shape))
        else:
            expected = masked(x, keep(11, call, x.shape, 0.25, noise_shape=shared), 0.25)
        torch.testing.assert_close(out, expected)
        assert layer(x) is x  # which is no call of the sequence
        assert layer(x, training=False) is x


def test_no_call_of_one_seed_is_a_call_of_another():
    x = torch.ones(64)
    masks = set()
    for seed in range(4):
        layer = layers.Dropout(0.5, seed=seed)
        masks |= {tuple(layer(x, training=True).tolist()) for _ in range(4)}
    assert len(masks) == 16


def test_channels_first():
    x = torch.ones(2, 8, 3, 3)
    out = layers.SpatialDropout2D(0.5, data_format="channels_first", seed=1)(x, training=True)
    assert torch.equal(
        out, masked(x, keep(1, 0, x.shape, 0.5, noise_shape=(None, None, 1, 1)), 0.5)
    )


@pytest.mark.parametrize("noise_shape", [(6, 1, 4), (None, 1, None), (1, 4), (4,)])
def test_noise_shapes_are_keras(noise_shape):
    x = torch.ones(6, 5, 4)
    ours = layers.Dropout(0.5, noise_shape=noise_shape, seed=1)(x, training=True)
    theirs = keras.layers.Dropout(0.5, noise_shape=noise_shape, seed=1)(x, training=True)
    for out in (ours, theirs):  # constant along the same dimensions
        shared = [bool((out == out.narrow(dim, 0, 1)).all()) for dim in range(3)]
        assert shared == [len(noise_shape) < 3, True, noise_shape == (None, 1, 4)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_dtype_policies(name, dtype):
    layer = getattr(layers, name)(0.25, seed=1, dtype=dtype)
    out = layer(np.ones(KINDS[name], "float32"), training=True)
    assert keras.backend.standardize_dtype(out.dtype) == layer.compute_dtype
    spec = layer.compute_output_spec(keras.KerasTensor(KINDS[name], layer.compute_dtype))
    assert (spec.shape, spec.dtype) == (KINDS[name], layer.compute_dtype)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rates_at_the_ends(rate):
    x = torch.rand(4, 4, requires_grad=True)
    out = layers.Dropout(rate)(x, training=True)
    assert torch.equal(out, x if rate == 0 else torch.zeros(4, 4))


def test_masks_of_keras_pass_through():
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(np.array([[1, 2, 0]]))
    out = layers.Dropout(0.5)(embedded, training=True)
    assert out._keras_mask.tolist() == [[True, True, False]]


def test_rng_goes_before_the_own_seed_which_stands_still():
    x = torch.ones(64)
    model = keras.Sequential([layers.Dropout(0.5, seed=1), layers.Dropout(0.5)])
    assert tridrop.nn.number_sites(model) == 2
    for _ in range(2):
        with tridrop.rng(7):
            first, second = (layer(x, training=True) for layer in model.layers)
        for site, out in enumerate((first, second)):
            mask = tridrop.keep_mask(tridrop.fold_in(7, site), x.shape, 0.5)
            assert torch.equal(out, masked(x, mask, 0.5))
    assert torch.equal(model.layers[0](x, training=True), masked(x, keep(1, 0, (64,), 0.5), 0.5))


def test_a_layer_without_a_seed_is_under_keras_set_random_seed():
    outs = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        outs.append(layers.Dropout(0.5)(torch.ones(64), training=True))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("kind", ["functional", "sequential", "own"])
def test_fit_drops_and_predict_does_not(kind):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.drop = keras.layers.Dense(1), layers.Dropout(0.5, seed=3)

        def call(self, x, training=False):
            return self.dense(self.drop(x, training=training))

    keras.utils.set_random_seed(0)
    drop = layers.Dropout(0.5, seed=3)
    if kind == "functional":
        model = mlp(drop)
    elif kind == "sequential":
        model = keras.Sequential([keras.layers.Dense(8), drop, keras.layers.Dense(1)])
    else:
        model = Own()
        drop = model.drop
    x, y = np.ones((16, 4), "float32"), np.ones((16, 1), "float32")
    model.compile("sgd", "mse")
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert drop.seed_state.generator.state.value.tolist() == [3, 12]  # batches
    assert np.array_equal(model.predict(x, verbose=0), model.predict(x, verbose=0))
    assert drop.seed_state.generator.state.value.tolist() == [3, 12]


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_the_same_mask(name):
    layer = getattr(layers, name)(0.25, seed=5)
    x = torch.rand(KINDS[name], requires_grad=True)
    out = layer(x, training=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    if name == "AlphaDropout":
        assert ((grad != 0) == keep(5, 0, x.shape, 0.25)).all()
    else:
        torch.testing.assert_close(grad * x, out)


def test_what_is_recomputed_in_backward_has_the_mask_of_its_forward():
    with keras.RematScope(mode="full"):
        recomputed = layers.Dropout(0.5, seed=2)
    outs, grads = [], []
    for layer in (layers.Dropout(0.5, seed=2), recomputed):
        x = torch.linspace(1, 2, 64, requires_grad=True)
        each = [layer(x * x, training=True) for _ in range(3)]
        sum(out.sum() * 10**i for i, out in enumerate(each)).backward()
        assert layer.seed_state.generator.state.value.tolist() == [2, 3]
        outs.append(torch.stack(each))
        grads.append(x.grad)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_what_is_recomputed_inside_of_what_is_recomputed():
    layer = layers.Dropout(0.5, seed=2)

    def inner(x):
        return layer(x, training=True)

    def outer(x):
        once = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        return inner(once * once)

    x = torch.linspace(1, 2, 64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(outer, x, use_reentrant=False).sum().backward()
    first, second = (keep(2, call, (64,), 0.5) for call in range(2))
    torch.testing.assert_close(x.grad, torch.where(first & second, 16 * x, 0))


def test_other_recomputations_in_backward_are_refused():
    layer = layers.Dropout(0.5, seed=2)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return layer(x, training=True)

        @staticmethod
        def backward(ctx, grad):
            return layer(grad, training=True)

    out = Again.apply(torch.ones(4, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"Use tridrop\.rng\(seed\)"):
        out.sum().backward()


def test_compiled_training_steps():
    model = mlp(layers.Dropout(0.5, seed=3))
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 1), "float32"), batch_size=4, verbose=0)
    assert model.layers[2].seed_state.generator.state.value.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Dropout(1.5), ValueError, "between 0 and 1"),
        (lambda: layers.Dropout(0.5, seed=2**31), ValueError, "32 bits on the torch backend"),
        (lambda: layers.AlphaDropout(0.5, seed=2**31), ValueError, "32 bits"),
        (lambda: layers.MultiHeadAttention(1, 4, seed=2**40), ValueError, "32 bits"),
        (lambda: layers.Dropout(0.5, seed="1"), ValueError, "must be an integer"),
        (lambda: layers.GaussianDropout(1.0), ValueError, r"give a rate in \[0, 1\)"),
        (lambda: layers.Dropout(0.5, noise_shape=(0, 1)), ValueError, "positive"),
        (lambda: layers.SpatialDropout1D(0.5)(torch.ones(2, 2), training=True), ValueError, "ndim"),
        (
            lambda: layers.Dropout(0.5)(torch.ones(2, dtype=torch.int32), training=True),
            TypeError,
            "float",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tridrop.nn.Dropout(rate=0.5, seed=1), "tridrop.keras.Dropout"),
        (lambda: tridrop.nn.Dropout(0.5, seed=1), "tridrop.keras.Dropout"),
        (lambda: tridrop.nn.Dropout(0.5)(torch.ones(2), training=True), "tridrop.keras.Dropout"),
        (lambda: tridrop.nn.AlphaDropout(rate=0.5), "tridrop.keras.AlphaDropout"),
        (lambda: tridrop.nn.AlphaDropout()(torch.ones(2), training=True), "keras.AlphaDropout"),
        (lambda: tridrop.nn.Dropout2d(rate=0.5), "tridrop.keras.SpatialDropout2D"),
        (lambda: tridrop.nn.Dropout(q=0.5), "unexpected keyword argument 'q'"),
    ],
)
def test_modules_of_torch_name_the_layer_of_keras(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_keras_that_asks_for_a_missing_backend_says_how_to_choose_torch():
    program = """
try:
    import tridrop.keras
except ImportError as error:
    assert "imported for want of tensorflow: set os.environ" in str(error), error
    print("refused")
"""
    assert printed("-c", program, KERAS_BACKEND="tensorflow") == "refused\n"


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ImportError, match=r"and this is jax: set os\.environ"):
        check_backend()


def test_a_model_of_another_backend_is_no_module(monkeypatch):
    class Layer:  # on another backend it is no module of torch
        pass

    monkeypatch.setattr(keras, "Layer", Layer)
    with pytest.raises(TypeError, match="model is a Layer of Keras on another backend"):
        tridrop.swap(Layer())


def test_an_ensemble_of_a_keras_model_is_made_by_rng():
    model = mlp(layers.Dropout(0.5))
    with (
        pytest.raises(ValueError, match=r"model\(x, training=True\) inside tridrop\.rng"),
        tridrop.mc_dropout(model),
    ):
        pass


def test_keras_is_imported_by_its_own_module_alone():
    program = """
import sys, torch, tridrop
report = tridrop.swap(torch.nn.Sequential(torch.nn.Dropout(0.1)))
assert not any(name.split(".")[0] == "keras" for name in sys.modules)
tridrop.keras
assert "keras" in sys.modules
"""
    printed("-c", program, KERAS_BACKEND="torch")
