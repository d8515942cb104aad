"""The public functions: validate, draw the seed, call autograd."""

from .attention import scaled_dot_product_attention
from .elementwise import activation_dropout, dropout, dropout_add
from .family import (
    alpha_dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
    gaussian_dropout,
    normal_noise,
)
from .lora import lora_delta, lora_deltas, lora_linear
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
    "alpha_dropout",
    "attention_keep_mask",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "keep_mask",
    "layer_norm_dropout",
    "lora_delta",
    "lora_deltas",
    "lora_linear",
    "normal_noise",
    "rms_norm_dropout",
    "scaled_dot_product_attention",
    "softmax_dropout",
]
