"""Sums behind dropout layers in functional models of Keras: which are one op, and what is not."""

import json

import numpy as np
import pytest
import torch
from keras_shared import keras, masked, tridrop

P = 0.25
F = tridrop.swapping.keras_calls.F


def dense(x):
    return keras.layers.Dense(8)(x)


def transformer(left=False, plus=False):
    """Two blocks with norms behind, built of Keras' layers."""
    inputs = x = keras.Input((5, 8))
    for _ in range(2):
        attended = keras.layers.MultiHeadAttention(2, 4, dropout=P)(x, x)
        for h in (lambda x, a=attended: a, dense):
            sides = [x, keras.layers.Dropout(P)(h(x))]
            sides = sides[::-1] if left else sides
            x = sides[0] + sides[1] if plus else keras.layers.Add()(sides)
            x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, x)


@pytest.fixture(params=[(False, False), (True, False), (False, True), (True, True)])
def model(request):
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    return transformer(*request.param)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_sums_are_fused_and_all_else_stays(model):
    before, config = model(X), model.get_config()
    serialized = json.dumps(keras.saving.serialize_keras_object(model))
    kind, attributes = type(model), set(vars(model))
    report = tridrop.swap(model)
    assert report.counts() == {"fused": 6, "swapped": 0, "left": 0}
    sums = [s for s in report.sites if s.kind == "Dropout"]
    assert [s.parts for s in sums] == 4 * [("dropout", "add", "norm")]
    assert torch.equal(model(X), before)
    assert model.get_config() == config
    assert json.dumps(keras.saving.serialize_keras_object(model)) == serialized
    assert report.changed() == []
    seen = report.verify(X)
    report.raise_if_unaccounted()
    assert {c.verdict for c in seen.sites} == {"drops as reported"}
    assert seen.unreported == ()
    tridrop.unswap(model)
    assert type(model) is kind
    assert set(vars(model)) == attributes


def counted(monkeypatch):
    """The names of the fused ops that are called."""
    calls = []
    for name in ("dropout_add", "dropout_add_layer_norm"):
        function = getattr(F, name)
        monkeypatch.setattr(
            F, name, lambda *a, n=name, f=function, **k: calls.append(n) or f(*a, **k)
        )
    return calls


def held_apart(model, x, calls, expected):
    """Forward and gradients of a swapped model are those without the fused sums."""
    report = tridrop.swap(model)
    weights = [v.value for v in model.trainable_variables]
    with tridrop.rng(7):
        ours = model(x, training=True)
    slopes = torch.autograd.grad(ours.square().sum(), weights)
    assert calls == expected
    plain = tridrop.swap(model, inside=False)
    assert [s.stream for s in plain.sites] == [s.stream for s in report.sites]
    with tridrop.rng(7):
        apart = model(x, training=True)
    assert calls == expected
    torch.testing.assert_close(ours, apart, rtol=1e-5, atol=1e-5)
    for a, b in zip(slopes, torch.autograd.grad(apart.square().sum(), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_forward_and_gradients_are_those_of_the_layers_one_by_one(model, monkeypatch):
    held_apart(model, X, counted(monkeypatch), 4 * ["dropout_add_layer_norm"])


def norm_first(**options):
    """A block whose residual goes around the norm, and a sum at the end without one."""
    inputs = x = keras.Input((5, 8))
    for _ in range(2):
        h = keras.layers.LayerNormalization(**options)(x)
        x = keras.layers.Add()([x, keras.layers.Dropout(P)(dense(h))])
    return keras.Model(inputs, x)


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}, {"epsilon": 0.5}])
def test_a_sum_that_goes_around_its_norm(options, monkeypatch):
    keras.utils.set_random_seed(0)
    model = norm_first(**options)
    before, calls = model(X), counted(monkeypatch)
    held_apart(model, X, calls, ["dropout_add_layer_norm", "dropout_add"])
    report = tridrop.swap(model)
    assert [s.parts for s in report.sites] == [("dropout", "add", "norm"), ("dropout", "add")]
    assert torch.equal(model(X), before)
    report.verify(X)
    report.raise_if_unaccounted()


def behind(case):
    """A norm behind a sum that is not the first to take it, or computes otherwise."""
    inputs = keras.Input((5, 8))
    norm = keras.layers.LayerNormalization(axis=(1, 2) if case == "axes" else -1)
    total = keras.layers.Add()([inputs, keras.layers.Dropout(P)(inputs)])
    if case == "an output":
        return keras.Model(inputs, [norm(total), total])
    if case == "called twice":
        return keras.Model(inputs, norm(norm(total)))
    if case == "later":
        return keras.Model(inputs, norm(dense(total) * total) + keras.layers.ReLU()(norm(total)))
    if case == "two norms":
        return keras.Model(inputs, norm(total) + keras.layers.LayerNormalization()(total))
    if case == "another":
        return keras.Model(inputs, keras.layers.UnitNormalization()(total))
    if case == "axes":
        return keras.Model(inputs, norm(total))
    return keras.Model(inputs, norm(total) + dense(total) + total)


@pytest.mark.parametrize(
    "case", ["an output", "called twice", "later", "two norms", "another", "axes", "beside"]
)
def test_norms_that_are_not_first(case, monkeypatch):
    keras.utils.set_random_seed(0)
    model, calls = behind(case), counted(monkeypatch)
    before = model(X)
    report = tridrop.swap(model)
    assert [s.parts for s in report.sites] == [("dropout", "add")]
    with tridrop.rng(7):
        ours = model(X, training=True)
    assert calls == ["dropout_add"]
    tridrop.swap(model, inside=False)
    with tridrop.rng(7):
        apart = model(X, training=True)
    flat = keras.tree.flatten
    assert all(map(torch.equal, flat(model(X)), flat(before)))
    for a, b in zip(flat(ours), flat(apart), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["hook", "call", "class", "regularizer", "dtype"])
def test_norms_that_cannot_be_one_op_are_called(case, monkeypatch):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    norm = keras.layers.LayerNormalization(dtype="bfloat16" if case == "dtype" else None)
    model = keras.Model(inputs, norm(inputs + keras.layers.Dropout(P)(inputs)))
    report, seen = tridrop.swap(model), []
    assert [s.parts for s in report.sites] == [("dropout", "add", "norm")]
    if case == "hook":
        norm.register_forward_hook(lambda *args: seen.append(1))
    elif case == "call":
        norm.call = lambda x: x * 2
    elif case == "class":
        monkeypatch.setattr(keras.layers.LayerNormalization, "call", lambda self, x: x * 2)
    elif case == "regularizer":
        norm.activity_regularizer = keras.regularizers.L2(0.1)
    calls = counted(monkeypatch)
    with tridrop.rng(3):
        out = model(X, training=True)
    assert calls == ([] if case == "class" else ["dropout_add"])
    assert (len(seen), len(model.losses)) == (case == "hook", case == "regularizer")
    total = X + masked(X, tridrop.keep_mask(tridrop.fold_in(3, 0), X.shape, P), P)
    plain = torch.nn.functional.layer_norm(total, (8,), eps=norm.epsilon)
    expected = total * 2 if case in ("call", "class") else plain.to(out.dtype)
    torch.testing.assert_close(out, expected)


def test_layers_go_on_counting_their_own_calls(model):
    """Without tridrop.rng each layer has its own sequence, fused or not."""
    tridrop.swap(model)
    states = {v.path: v.value.clone() for layer in model._flatten_layers()
              for v in layer._non_trainable_variables}  # fmt: skip
    model(X, training=True)
    fused = model(X, training=True)
    for layer in model._flatten_layers():
        for v in layer._non_trainable_variables:
            v.assign(states[v.path])
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            generator.state.assign(generator.state.value * torch.tensor([1, 0]))
    tridrop.swap(model, inside=False)
    model(X, training=True)
    torch.testing.assert_close(model(X, training=True), fused)


def test_it_is_trained_saved_and_goes_on(model, tmp_path):
    model.compile("sgd", "mse")
    tridrop.swap(model)
    x = X.numpy()
    model.fit(x, x, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded).__name__ == "Functional"
    assert not any("_tridrop_base" in vars(type(layer)) for layer in (loaded, *loaded.layers))
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    tridrop.swap(loaded)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert torch.equal(loaded(X, training=True), model(X, training=True))


def test_a_model_of_its_layers_runs_as_it_is(model):
    """Another model that gives out what the sum takes over drops by the layer's own call."""
    tridrop.swap(model)
    (drop, *_) = (x for x in model.layers if isinstance(x, keras.layers.Dropout))
    inner = keras.Model(model.inputs, drop.output)
    with tridrop.rng(7):
        out = inner(X, training=True)
    assert type(inner).__name__ == "Functional"
    assert 0 < (out == 0).float().mean() < 1
    outer = keras.Sequential([model, keras.layers.Dropout(P)])  # and the model as a layer of one
    with tridrop.rng(7):
        assert outer(X, training=True).shape == X.shape
    assert model(keras.Input((5, 8))).shape == (None, 5, 8)


def graph(case):
    """A graph whose sum is not one op with the dropout, or is in one of its two."""
    inputs = keras.Input((3, 8))
    drop = keras.layers.Dropout(P, noise_shape=(None, 1, None) if case == "noise" else None)
    h = drop(inputs)
    if case == "value used twice":
        return keras.Model(inputs, keras.layers.Add()([inputs, h]) * h)
    if case == "an output":
        return keras.Model(inputs, [keras.layers.Add()([inputs, h]), h])
    if case == "called twice":
        return keras.Model(inputs, keras.layers.Add()([inputs, drop(keras.layers.Add()([h, h]))]))
    if case == "with itself":
        return keras.Model(inputs, keras.layers.Add()([h, h]))
    if case == "three":
        return keras.Model(inputs, keras.layers.Add()([inputs, h, inputs]))
    if case == "a number":
        return keras.Model(inputs, h + 1.0)
    if case == "another merge":
        return keras.Model(inputs, keras.layers.Subtract()([inputs, h]))
    if case == "kind":
        return keras.Model(inputs, inputs + keras.layers.GaussianDropout(P)(inputs) + h * 2)
    assert case == "noise"
    return keras.Model(inputs, keras.layers.Add()([inputs, h]))


CASES = [
    "value used twice", "an output", "called twice", "with itself", "three", "a number",
    "another merge", "kind", "noise",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sums_that_are_not_read_as_one(case):
    model, x = graph(case), torch.randn(2, 3, 8)
    before = model(x)
    report = tridrop.swap(model)
    assert {s.parts for s in report.sites} <= {("dropout",), ("gaussian dropout",)}
    flat = keras.tree.flatten
    assert all(map(torch.equal, flat(model(x)), flat(before)))
    model(x, training=True)
    report.verify(x)
    report.raise_if_unaccounted()


def test_two_dropouts_in_one_sum_are_fused_once():
    inputs = keras.Input((8,))
    sides = [keras.layers.Dropout(P)(inputs) for _ in range(2)]
    model, x = keras.Model(inputs, keras.layers.Add()(sides)), torch.randn(4, 8)
    report = tridrop.swap(model)
    assert sorted(s.parts for s in report.sites) == [("dropout",), ("dropout", "add")]
    with tridrop.rng(7):
        out = model(x, training=True)
    masks = [tridrop.keep_mask(tridrop.fold_in(7, s.stream), x.shape, P) for s in report.sites]
    torch.testing.assert_close(out, masked(x, masks[0], P) + masked(x, masks[1], P))
    report.verify(x)
    report.raise_if_unaccounted()


def test_a_layer_of_two_models_in_a_model_is_not_taken():
    drop, inputs = keras.layers.Dropout(P), keras.Input((8,))
    models = [keras.Model(inputs, inputs + drop(inputs)) for _ in range(2)]
    outer = keras.Model(inputs, models[1](models[0](inputs)))
    (site,) = tridrop.swap(outer).sites
    assert site.parts == ("dropout",)


def residual_model(**options):
    inputs = keras.Input((3, 8))
    drop, add = keras.layers.Dropout(P, **options), keras.layers.Add()
    return keras.Model(inputs, add([inputs, drop(inputs)])), drop, add


NOT_ONE = ["hook", "hook of the sum", "rate", "call", "call of the sum", "Add", "mask", "dtype",
           "regularizer"]  # fmt: skip


@pytest.mark.parametrize("case", NOT_ONE)
def test_sums_that_cannot_be_one_op_are_computed_as_they_stand(case, monkeypatch):
    x, seen = torch.rand(2, 3, 8) + 1, []
    if case == "dtype":
        model, drop, add = residual_model(dtype="bfloat16")
    elif case == "mask":
        inputs = keras.Input((3, 8))
        given = keras.layers.Masking()(inputs)
        drop = keras.layers.Dropout(P)
        model = keras.Model(inputs, keras.layers.Add()([given, drop(given)]))
    else:
        model, drop, add = residual_model()
    report = tridrop.swap(model)
    assert [s.parts for s in report.sites] == [("dropout", "add")]
    if case == "hook":
        drop.register_forward_hook(lambda *args: seen.append(1))
    elif case == "hook of the sum":
        add.register_forward_hook(lambda *args: seen.append(1))
    elif case == "rate":
        drop.rate = 0.0
    elif case == "call":
        drop.call = lambda x, training=False: x * 2
    elif case == "call of the sum":
        add.call = lambda sides: sides[0] - sides[1]
    elif case == "Add":
        monkeypatch.setattr(keras.layers.Add, "call", lambda self, sides: sides[0] * sides[1])
        assert report.changed() == ["Functional"]
    elif case == "regularizer":
        add.activity_regularizer = keras.regularizers.L2(0.1)
    monkeypatch.setattr(F, "dropout_add", None)  # not called
    with tridrop.rng(3):
        out = model(x, training=True)
    assert len(seen) == case.startswith("hook")
    assert len(model.losses) == (case == "regularizer")
    keep = tridrop.keep_mask(tridrop.fold_in(3, 0), x.shape, P)
    dropped = masked(x.bfloat16() if case == "dtype" else x, keep, P)
    expected = {
        "rate": x + x, "call": x + 2 * x, "call of the sum": x - dropped, "Add": x * dropped
    }.get(case, x + dropped)  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_a_gaussian_rate_of_1_is_left_with_its_reason():
    model = keras.Sequential([keras.layers.GaussianDropout(1.0)])
    model(torch.ones(2, 3))
    (site,) = tridrop.swap(model).sites
    assert (site.status, site.p) == ("left", 1.0)
    assert site.reason.startswith("its rate is 1, at which its noise is infinite")
    assert type(model.layers[0]) is keras.layers.GaussianDropout
