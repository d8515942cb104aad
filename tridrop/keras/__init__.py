"""Keras 3 layers, on its torch backend, that draw tridrop's masks.

    import os
    os.environ["KERAS_BACKEND"] = "torch"     # before keras is imported
    import tridrop.keras

They are Keras' own layers, with its arguments, by its names and instances of its classes; what they
drop is docs/mask-contract.md's. Nothing else of tridrop imports keras, and ``import tridrop`` does
not.
"""

from .present import check_backend

check_backend()

from .attention import MultiHeadAttention  # noqa: E402  (they need Keras)
from .layers import (  # noqa: E402
    AlphaDropout,
    Dropout,
    GaussianDropout,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
)

__all__ = [
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "MultiHeadAttention",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
]
