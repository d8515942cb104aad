"""The public functions: they check their arguments, draw the seed and call the op."""

from .attention import scaled_dot_product_attention, scaled_dot_product_attention_backward
from .depth import drop_path_subset, layer_drop, stochastic_depth
from .drop_block import drop_block2d, drop_block3d
from .dropconnect import dropconnect_linear
from .elementwise import activation_dropout, dropout, dropout_add
from .embedding import embedding_dropout, word_dropout
from .family import (
    alpha_dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
    gaussian_dropout,
    normal_noise,
)
from .linear import activation_dropout_linear, norm_linear
from .lora import lora_delta, lora_deltas, lora_linear
from .masks import attention_keep_mask, keep_mask, kept_indices
from .norm import (
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm_dropout,
    rms_norm_dropout,
)
from .recurrent import locked_dropout
from .softmax import softmax_dropout
from .structured import head_dropout, patch_dropout

__all__ = [
    "activation_dropout",
    "activation_dropout_linear",
    "alpha_dropout",
    "attention_keep_mask",
    "drop_block2d",
    "drop_block3d",
    "drop_path_subset",
    "dropconnect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "head_dropout",
    "keep_mask",
    "kept_indices",
    "layer_drop",
    "layer_norm_dropout",
    "locked_dropout",
    "lora_delta",
    "lora_deltas",
    "lora_linear",
    "norm_linear",
    "normal_noise",
    "patch_dropout",
    "rms_norm_dropout",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "softmax_dropout",
    "stochastic_depth",
    "word_dropout",
]
