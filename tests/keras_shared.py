"""What the tests of Keras layers share. It chooses Keras' torch backend."""

import os

import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="the test extra has it from Python 3.11 on")

import tridrop  # noqa: E402
import tridrop.keras  # noqa: E402


def masked(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout by an exported mask."""
    return torch.where(keep, x / (1 - p), 0)


def keep(seed: int, call: int, shape: tuple[int, ...], p: float, **options: object) -> torch.Tensor:
    """The mask of a call of a layer with a seed, as docs/keras.md says."""
    return tridrop.keep_mask(tridrop.fold_in(seed, call), shape, p, **options)


def mlp(layer: object) -> "keras.Model":
    """A functional model around a layer that drops."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(16, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(layer(x)))
