"""The public functions: validate, draw the seed, call autograd."""

from .attention import scaled_dot_product_attention
from .elementwise import activation_dropout, dropout, dropout_add
from .masks import attention_keep_mask, keep_mask
from .norm import (
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm_dropout,
    rms_norm_dropout,
)
from .softmax import softmax_dropout

__all__ = [
    "activation_dropout",
    "attention_keep_mask",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "keep_mask",
    "layer_norm_dropout",
    "rms_norm_dropout",
    "scaled_dot_product_attention",
    "softmax_dropout",
]
