"""Keras 3 layers that draw tridrop's masks, on Keras' torch backend.

    import os
    os.environ["KERAS_BACKEND"] = "torch"     # before keras is imported
    import tridrop.keras

They have the names and arguments of Keras' own layers, and are instances of their classes; their
masks are those of docs/mask-contract.md. Only this package imports keras; ``import tridrop`` does
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
