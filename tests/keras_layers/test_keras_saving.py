"""What is saved of a layer that drops: its configuration, and where its masks go on."""

import copy
import pickle

import numpy as np
import pytest
import torch
from keras_shared import keep, keras, masked, mlp, tridrop

layers = tridrop.keras
MADE = [
    lambda: layers.Dropout(0.5, noise_shape=(None, 1), seed=4, name="drop"),
    lambda: layers.SpatialDropout1D(0.5, seed=4),
    lambda: layers.SpatialDropout2D(0.5, data_format="channels_first", seed=4),
    lambda: layers.SpatialDropout3D(0.5, dtype="bfloat16"),
    lambda: layers.GaussianDropout(0.5, seed=4),
    lambda: layers.AlphaDropout(0.5, noise_shape=(None, 1), seed=4),
    lambda: layers.MultiHeadAttention(2, 4, dropout=0.5, seed=4, use_bias=False),
]


@pytest.mark.parametrize("make", MADE)
def test_configurations(make):
    layer = make()
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == f"tridrop>{type(layer).__name__}"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    assert keras.saving.serialize_keras_object(again) == config


def step(model, x):
    return model(x, training=True)


@pytest.mark.parametrize("way", ["keras", "weights", "pickle", "deepcopy"])
def test_a_model_that_is_loaded_goes_on_with_the_next_mask(way, tmp_path):
    x = torch.ones(8, 4)
    model = mlp(layers.Dropout(0.5, seed=4))
    first = [step(model, x) for _ in range(3)]
    if way == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    elif way == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = mlp(layers.Dropout(0.5, seed=4))
        assert torch.equal(loaded.layers[2](torch.ones(8), training=True),
                           masked(torch.ones(8), keep(4, 0, (8,), 0.5), 0.5))  # fmt: skip
        loaded.load_weights(tmp_path / "model.weights.h5")
    elif way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        loaded = copy.deepcopy(model)
    following = [step(loaded, x) for _ in range(3)]
    for out, went_on in zip(following, [step(model, x) for _ in range(3)], strict=True):
        assert torch.equal(out, went_on)
        assert not any(torch.equal(out, old) for old in first)


def test_training_that_is_interrupted_has_the_masks_of_one_that_is_not(tmp_path):
    x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")

    def trained(epochs, load=None):
        keras.utils.set_random_seed(1)
        model = mlp(layers.Dropout(0.5, seed=4))
        model.compile("sgd", "mse")
        if load is not None:
            model.load_weights(load)
        model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, shuffle=False)
        return model

    trained(2).save_weights(tmp_path / "half.weights.h5")
    whole, halves = trained(4), trained(2, tmp_path / "half.weights.h5")
    assert all(map(np.array_equal, whole.get_weights(), halves.get_weights()))


def test_files_of_keras_own_layers_and_the_other_way(tmp_path):
    path = tmp_path / "model.weights.h5"
    ours, theirs = mlp(layers.Dropout(0.5, seed=4)), mlp(keras.layers.Dropout(0.5, seed=4))
    x = torch.ones(8, 4)
    step(ours, x)
    theirs.save_weights(path)
    ours.load_weights(path)
    assert ours.layers[2].seed_state.generator.state.value.tolist() == [4, 1]  # goes on
    assert torch.equal(ours(x), theirs(x))
    ours.save_weights(path)
    theirs.load_weights(path)
    assert torch.equal(ours(x), theirs(x))


def test_attention_and_nested_models_are_saved_too(tmp_path):
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=4)
    inner = keras.Model(inputs, attention(inputs, inputs))
    outer = keras.Sequential([inner, layers.SpatialDropout1D(0.5, seed=5)])
    x = torch.randn(2, 5, 8)
    step(outer, x)
    outer.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert torch.equal(step(loaded, x), step(outer, x))


@pytest.mark.parametrize("make", MADE[:1] + MADE[4:6])
def test_a_legacy_file_warns_that_it_does_not_resume(make, tmp_path):
    path, model = tmp_path / "model.h5", mlp(make())
    x = torch.ones(8, 4)
    first, _ = step(model, x), step(model, x)
    with pytest.warns(UserWarning, match="does not carry the number of a layer's calls"):
        model.save(path)
    with pytest.warns(UserWarning, match="begins its masks again"):
        loaded = keras.saving.load_model(path)
    assert type(loaded.layers[2]) is type(model.layers[2])
    assert torch.equal(step(loaded, x), first)


def test_other_files_do_not_warn(tmp_path, recwarn):
    model = mlp(layers.Dropout(0.5, seed=4))
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    keras.models.clone_model(model)
    assert not [w for w in recwarn if "legacy" in str(w.message)]


def test_attention_in_a_legacy_file_warns(tmp_path):
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=4)
    model = keras.Model(inputs, attention(inputs, inputs))
    with pytest.warns(UserWarning, match="does not carry the number of a layer's calls"):
        model.save(tmp_path / "model.h5")


def test_a_rate_of_0_has_no_state():
    assert layers.Dropout(0.0).seed_state is None
