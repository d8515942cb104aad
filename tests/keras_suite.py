"""A plug-in of pytest under which Keras' own tests of its layers run with tridrop's.

    KERAS_BACKEND=torch python -m pytest -p keras_suite SITE_PACKAGES/keras/src/layers/.../X_test.py

Their files name the layers as ``layers.Dropout``: what stands there is exchanged before they are
collected. Keras' own code, that of its MultiHeadAttention for instance, keeps its classes.
"""

import importlib

import tridrop.keras

LAYERS = importlib.import_module("keras.src.layers")


def pytest_configure() -> None:
    for name in tridrop.keras.__all__:
        setattr(LAYERS, name, getattr(tridrop.keras, name))
