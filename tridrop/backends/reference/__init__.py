"""The reference backend: plain torch on any device, readable enough to be the specification.

On a CPU with numba, masks come from :mod:`tridrop.fast`, and ``fused.py`` takes what it can.
"""

from .attention import attention_backward, attention_forward
from .elementwise import keep_mask, why_not
from .fused import backward, forward, norm_backward, norm_forward, prepare
from .masks import attention_keep_mask, decision_bits
from .product import product_backward, product_forward
from .softmax import softmax_backward, softmax_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "attention_keep_mask",
    "backward",
    "decision_bits",
    "forward",
    "keep_mask",
    "norm_backward",
    "norm_forward",
    "prepare",
    "product_backward",
    "product_forward",
    "softmax_backward",
    "softmax_forward",
    "why_not",
]
