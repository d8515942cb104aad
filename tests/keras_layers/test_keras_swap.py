"""tridrop.swap of Keras models: what becomes of their layers, and that nothing else changes."""

import json

import numpy as np
import pytest
import torch
from keras_shared import keras, masked, tridrop

keras_hub = pytest.importorskip("keras_hub", reason="run.py installs it from Python 3.11 on")
P = 0.25
TOKENS = {
    "token_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]),
    "padding_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}
SIZES = {
    "vocabulary_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 8,
    "intermediate_dim": 16, "max_sequence_length": 8, "dropout": P,
}  # fmt: skip


def cnn():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.SpatialDropout2D(P)(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(P, seed=3)(x)
    x = keras.layers.AlphaDropout(P)(keras.layers.GaussianDropout(P)(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x)), torch.randn(2, 8, 8, 3)


def encoder():
    layer = keras_hub.layers.TransformerEncoder(16, 2, dropout=P)
    x = torch.randn(2, 5, 8)
    layer(x)
    return layer, x


def bert():
    inputs = TOKENS | {"segment_ids": torch.zeros(2, 6, dtype=torch.int64)}
    return keras_hub.models.BertBackbone(**SIZES), inputs


def gpt2():
    return keras_hub.models.GPT2Backbone(**SIZES), TOKENS


MODELS = {"cnn": cnn, "encoder": encoder, "bert": bert, "gpt2": gpt2}
# Sites that are fused and swapped.
FOUND = {"cnn": (0, 4), "encoder": (3, 0), "bert": (6, 1), "gpt2": (6, 1)}
ATTENTIONS = {"cnn": 0, "encoder": 1, "bert": 2, "gpt2": 2}


def flat(out):
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.fixture(params=MODELS)
def name(request):
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    return request.param


def test_everything_is_accounted_for_and_evaluation_is_identical(name):
    model, x = MODELS[name]()
    config, before = model.get_config(), flat(model(x))
    serialized = json.dumps(keras.saving.serialize_keras_object(model))
    kinds = [type(layer).__name__ for layer in model._flatten_layers()]
    keys = list(model.state_dict())
    report = tridrop.swap(model)
    fused, swapped = FOUND[name]
    assert report.counts() == {"fused": fused, "swapped": swapped, "left": 0}
    assert all(map(torch.equal, flat(model(x)), before))
    assert model.get_config() == config
    assert json.dumps(keras.saving.serialize_keras_object(model)) == serialized
    assert list(model.state_dict()) == keys
    assert [type(layer).__name__ for layer in model._flatten_layers()] == kinds
    assert all(isinstance(layer, keras.Layer) for layer in model._flatten_layers())
    assert report.changed() == []
    json.dumps(report.to_dict())
    str(report)


def test_verify_sees_every_draw_and_leaves_all_as_it_was(name):
    model, x = MODELS[name]()
    report = tridrop.swap(model)
    state = [v.value.clone() for v in model.variables]
    seen = report.verify(x)
    report.raise_if_unaccounted()
    assert {c.verdict for c in seen.sites} == {"drops as reported"}
    assert seen.unreported == ()
    assert seen.cost.after.dropouts == len(report.sites)
    assert all(map(torch.equal, state, [v.value for v in model.variables]))
    dry = tridrop.swap(model, dry_run=True)
    assert [s.parts for s in dry.sites] == [s.parts for s in report.sites]
    tridrop.unswap(model)
    assert {c.verdict for c in dry.verify(x).sites} == {"drops as reported"}


def test_unswap_gives_everything_back(name):
    model, x = MODELS[name]()
    layers = model._flatten_layers()
    before = [(type(layer), set(vars(layer))) for layer in layers]
    tridrop.swap(model)
    model(x, training=True)
    tridrop.unswap(model)
    assert [(type(layer), set(vars(layer))) for layer in layers] == before
    model(x, training=True)


def test_switches_do_not_change_the_numbers(name):
    model, _ = MODELS[name]()
    whole = {s.module: s.stream for s in tridrop.swap(model).sites}
    assert sorted(whole.values()) == list(range(len(whole)))
    attentions, sites = ATTENTIONS[name], sum(FOUND[name])
    plain = tridrop.swap(model, attention=False, inside=False)
    assert plain.counts() == {"fused": 0, "swapped": sites, "left": 0}
    alone = tridrop.swap(model, inside=False)
    assert alone.counts() == {"fused": attentions, "swapped": sites - attentions, "left": 0}
    assert sorted(s.stream for s in plain.sites) == sorted(whole.values())
    attention = tridrop.swap(model, dropout=False)
    assert attention.counts() == {"fused": attentions, "swapped": 0, "left": sites - attentions}
    for site in attention.sites:
        assert site.stream == (whole[site.module] if site.parts else None)
    none = tridrop.swap(model, dropout=False, attention=False)
    assert {s.reason for s in none.sites} == {"its switch is off"}
    assert none.counts()["left"] == sum(FOUND[name])


def slopes_of(model, outs):
    weights = [v.value for v in model.trainable_variables]
    total = sum(out.square().sum() for out in outs)
    return torch.autograd.grad(total, weights, allow_unused=True)


def test_the_masks_are_the_exported_ones(name):
    """Keras' own layers, with each dropout's mask from outside, give the same values and slopes."""
    model, x = MODELS[name]()
    report = tridrop.swap(model)
    with tridrop.rng(7):
        ours = flat(model(x, training=True))
    slopes = slopes_of(model, ours)
    streams = {site.module: site.stream for site in report.sites}
    named = dict(tridrop.base.modules.named_parts(model))
    tridrop.unswap(model)
    for path, stream in streams.items():
        layer = named[path]
        attends = isinstance(layer, keras.layers.MultiHeadAttention)
        drawing = layer._dropout_layer if attends else layer
        drawing.call = by_mask(drawing, attends, tridrop.fold_in(7, stream))
    theirs = flat(model(x, training=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(slopes, slopes_of(model, theirs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def by_mask(layer, attends, seed):
    def call(inputs, training=False):
        if isinstance(layer, keras.layers.GaussianDropout):
            return tridrop.gaussian_dropout(inputs, P, seed=seed)
        if isinstance(layer, keras.layers.AlphaDropout):
            return tridrop.alpha_dropout(inputs, P, True, seed=seed)
        if attends:
            return masked(inputs, tridrop.attention_keep_mask(seed, inputs.shape, P), P)
        shape = (None, 1, 1, None) if isinstance(layer, keras.layers.SpatialDropout2D) else None
        return masked(inputs, tridrop.keep_mask(seed, inputs.shape, P, noise_shape=shape), P)

    return call


def test_a_swapped_model_is_trained_saved_and_goes_on(tmp_path):
    model, x = cnn()
    x, y = x.numpy(), np.ones((2, 2), "float32")
    model.compile("sgd", "mse")
    tridrop.swap(model)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")  # Keras' own classes, unswapped
    assert not any("_tridrop_base" in vars(type(layer)) for layer in loaded.layers)
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    tridrop.swap(loaded)
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert torch.equal(loaded(x, training=True), model(x, training=True))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_swapped_model_of_kerashub_is_saved_and_goes_on(name, tmp_path):
    model, x = MODELS[name]()
    tridrop.swap(model)
    first = flat(model(x, training=True))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(MODELS[name]()[0])
    assert all(map(torch.equal, flat(loaded(x)), flat(model(x))))
    tridrop.swap(loaded)
    loaded.load_weights(tmp_path / "model.weights.h5")
    following = flat(loaded(x, training=True))
    assert all(map(torch.equal, following, flat(model(x, training=True))))
    assert not all(map(torch.equal, following, first))


class Own(keras.layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        return super()._compute_attention(*args, **kwargs)


class Doubled(keras.layers.Dropout):
    pass


class Drawing(keras.layers.Layer):
    def call(self, x, training=False):
        return keras.random.dropout(x, 0.5) if training else x


LEFT = [
    (lambda: keras.layers.GaussianNoise(0.5), "it draws random numbers, and drops nothing"),
    (lambda: keras.layers.RandomFlip(), "it draws random numbers, and drops nothing"),
    (lambda: keras.layers.LSTM(4, dropout=P), "it drops in its own code, not by a dropout layer"),
    (lambda: Doubled(P), "it is a subclass of Dropout that may compute something else"),
    (lambda: Drawing(), "its own code draws random numbers"),
    (lambda: keras.layers.Lambda(lambda x: keras.random.dropout(x, P)), "its own code draws"),
    (lambda: tridrop.keras.Dropout(P), "it is tridrop's own"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), LEFT)
def test_what_is_left_and_why(make, reason):
    model = keras.Sequential([make()])
    x = (
        torch.randn(2, 4, 4, 3)
        if "Flip" in type(model.layers[0]).__name__
        else torch.randn(2, 3, 4)
    )
    model(x)
    report = tridrop.swap(model)
    (site,) = report.sites
    assert site.status == "left"
    assert site.reason.startswith(reason)
    seen = report.verify(x)
    report.raise_if_unaccounted()
    assert [c.verdict for c in seen.sites] == ["drops as reported"]


def attention(kind=keras.layers.MultiHeadAttention, **options):
    inputs = keras.Input((5, 8))
    return keras.Model(inputs, kind(2, 4, **options)(inputs, inputs)), torch.randn(2, 5, 8)


def test_attention_that_computes_otherwise_keeps_its_computation():
    model, x = attention(Own, dropout=P)
    report = tridrop.swap(model)
    assert [(s.kind, s.parts) for s in report.sites] == [("Dropout", ("dropout",))]
    report.verify(x)
    report.raise_if_unaccounted()


def test_attention_without_dropout_and_tridrops_own():
    model, x = attention(dropout=0.0)
    (site,) = tridrop.swap(model).sites
    assert (site.reason, site.p) == ("its dropout is 0", 0.0)
    own, x = attention(tridrop.keras.MultiHeadAttention, dropout=P)
    report = tridrop.swap(own)
    assert [s.reason for s in report.sites] == ["it is tridrop's own"]
    report.verify(x)
    report.raise_if_unaccounted()


def test_grouped_attention_has_its_dropout_layer_swapped():
    inputs = keras.Input((5, 8))
    out = keras.layers.GroupQueryAttention(4, 4, 2, dropout=P)(inputs, inputs)
    model = keras.Model(inputs, out)
    report = tridrop.swap(model)
    assert [(s.kind, s.parts) for s in report.sites] == [("Dropout", ("dropout",))]
    report.verify(torch.randn(2, 5, 8))
    report.raise_if_unaccounted()


def test_a_layer_that_is_not_built_yet_is_named():
    layer = keras_hub.layers.TransformerEncoder(16, 2, dropout=P)
    (site,) = tridrop.swap(layer).sites
    assert site.reason.startswith("it is not built yet")
    mha = keras.layers.MultiHeadAttention(2, 4, dropout=P)
    report = tridrop.swap(mha)  # whose layers are made later, by the class that it has now
    x = torch.randn(2, 5, 8)
    mha(x, x)
    report.verify(x, x)
    report.raise_if_unaccounted()


def test_replaced_methods_run(monkeypatch):
    model = keras.Sequential([keras.layers.Dropout(P), keras.layers.Dropout(P)])
    model.layers[1].call = lambda x, training=False: x * 3
    report = tridrop.swap(model)
    assert [s.reason for s in report.sites] == ["", "its call was replaced on the instance"]
    monkeypatch.setattr(keras.layers.Dropout, "call", lambda self, x, training=False: x * 2)
    assert report.changed() == ["Dropout"]
    assert torch.equal(model(torch.ones(3), training=True), torch.full((3,), 6.0))
    assert tridrop.swap(model).sites[0].reason == "Dropout.call was replaced"


def test_nothing_that_drops():
    model = keras.Sequential([keras.layers.Dense(3)])
    model(torch.ones(1, 3))
    assert "Nothing in this model drops" in str(tridrop.swap(model))


def test_modules_of_torch_in_keras_and_the_other_way():
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Dropout(P))
    wrapped = keras.Sequential([keras.layers.TorchModuleWrapper(inner), keras.layers.Dropout(P)])
    wrapped(torch.ones(2, 4))
    report = tridrop.swap(wrapped)
    assert [s.parts for s in report.sites] == [("linear", "activation", "dropout"), ("dropout",)]
    assert len({s.stream for s in report.sites}) == 2
    report.verify(torch.ones(2, 4))
    report.raise_if_unaccounted()
    tridrop.unswap(wrapped)
    assert type(inner[2]) is torch.nn.Dropout
    mixed = torch.nn.Sequential(torch.nn.Dropout(P), cnn()[0], torch.nn.Dropout(P))
    report = tridrop.swap(mixed)
    (site,) = (s for s in report.sites if s.kind == "SpatialDropout2D")
    assert site.module.startswith("1.spatial_dropout2d")
    assert report.counts() == {"fused": 0, "swapped": 6, "left": 0}
    assert len({s.stream for s in report.sites}) == 6
    seen = report.verify(
        torch.randn(2, 8, 8, 3)
    )  # torch's mode is not Keras': its layers do not drop
    assert [c.verdict for c in seen.sites if c.site.module.startswith("1.")] == 4 * [
        "draws nothing"
    ]


def test_shared_layers_and_layers_of_one_name_are_one_site_each():
    drop = keras.layers.Dropout(P)

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dropout(P, name="d"), keras.layers.Dropout(
                P, name="d")  # fmt: skip
            self.third = self.fourth = drop

        def call(self, x, training=False):
            for layer in (self.first, self.second, self.third, self.fourth):
                x = layer(x, training=training)
            return x

    model = Twice()
    report = tridrop.swap(model)
    names = [s.module for s in report.sites]
    assert names == ["d", "d_1", drop.name]
    report.verify(torch.ones(4))
    report.raise_if_unaccounted()


class Block(keras.layers.Layer):
    def __init__(self, **options):
        super().__init__()
        self.first = keras.layers.Dropout(P, **options)
        self.second = keras.layers.Dropout(P)
        self.third = keras.layers.Dropout(P)

    def call(self, x, y, training=False):
        """Each line of it is one of the cases."""
        x = self.first(x, training=training)
        x = y + x
        z = self.second(x, training=training)  # its value has another user
        x = z + x
        if training:
            x = self.third(x * z, training=training)
            x = x + y
        return x


def test_sums_in_a_layer_of_ones_own(recwarn):
    layer, x = Block(), torch.rand(3, 8) + 1
    report = tridrop.swap(layer)
    assert [s.parts for s in report.sites] == [("dropout", "add"), ("dropout",), ("dropout", "add")]
    assert report.source("").count("_tridrop.dropout_add") == 2
    with tridrop.rng(3):
        out = layer(x, x, training=True)
    masks = [tridrop.keep_mask(tridrop.fold_in(3, s.stream), x.shape, P) for s in report.sites]
    first = x + masked(x, masks[0], P)
    second = masked(first, masks[1], P)
    third = masked((second + first) * second, masks[2], P) + x
    torch.testing.assert_close(out, third)
    assert torch.equal(layer(x, x), Block()(x, x))
    report.verify(x, x)
    report.raise_if_unaccounted()
    assert not [w for w in recwarn if "site" in str(w.message)]


CASES = ["hook", "dtype", "shape", "rate", "call", "keras", "noise", "remat"]


@pytest.mark.parametrize("case", CASES)
def test_sums_that_are_not_one_op_are_computed_as_they_stand(case, monkeypatch):
    x, y = torch.rand(3, 8) + 1, torch.rand(8) if case == "shape" else torch.rand(3, 8)
    options = {"noise": {"noise_shape": (None, 1)}, "dtype": {"dtype": "bfloat16"}}.get(case, {})
    with keras.RematScope(mode="full" if case == "remat" else None):
        layer = Block(**options)
    seen = []
    tridrop.swap(layer)
    if case == "hook":
        layer.first.register_forward_hook(lambda *args: seen.append(args[2]))
    elif case == "rate":
        layer.first.rate = 0.0
    elif case == "call":
        layer.first.call = lambda x, training=False: x * 2
    elif case == "keras":
        monkeypatch.setattr(keras.layers.Dropout, "call", lambda self, x, training=False: x * 2)
    monkeypatch.setattr(tridrop.swapping.keras_calls.F, "dropout_add", None)  # not called
    layer.third.rate = 0.0
    with tridrop.rng(3):
        out = layer(x, y, training=True)
    assert len(seen) == (case == "hook")
    shared = {"noise_shape": (None, 1)} if case == "noise" else {}
    keep = tridrop.keep_mask(tridrop.fold_in(3, 0), x.shape, P, **shared)
    given = x.bfloat16() if case == "dtype" else x
    first = y + {"rate": x, "call": x * 2, "keras": x * 2}.get(case, masked(given, keep, P))
    keep = tridrop.keep_mask(tridrop.fold_in(3, 1), x.shape, P)
    second = first * 2 if case == "keras" else masked(first, keep, P)
    third = (second + first) * second * (2 if case == "keras" else 1)
    torch.testing.assert_close(out, third + y)
