"""Functions with the names, arguments and results of other libraries, on top of tridrop's ops.

The functions of Megatron-LM are in ``tridrop/integrations/megatron.py``, and those of
flash-attention in ``tridrop/integrations/flash_attention.py``.
"""

from .integrations.flash_attention import layer_norm_fn, rms_norm_fn
from .integrations.megatron import (
    bias_dropout_add_fused_inference,
    bias_dropout_add_fused_train,
    bias_dropout_add_unfused,
    get_bias_dropout_add,
)

__all__ = [
    "bias_dropout_add_fused_inference",
    "bias_dropout_add_fused_train",
    "bias_dropout_add_unfused",
    "get_bias_dropout_add",
    "layer_norm_fn",
    "rms_norm_fn",
]
