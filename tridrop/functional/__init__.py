"""The public functions: validate, draw the seed, call autograd."""

from .elementwise import activation_dropout, dropout, dropout_add, keep_mask
from .norm import (
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm_dropout,
    rms_norm_dropout,
)

__all__ = [
    "activation_dropout",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "keep_mask",
    "layer_norm_dropout",
    "rms_norm_dropout",
]
