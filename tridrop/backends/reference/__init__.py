"""The reference backend: plain torch on any device, readable enough to be the specification.

Other backends are held to it, and hand it what they do not serve.
"""

from typing import Any

from .attention import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask, why_not
from .masks import attention_keep_mask, decision_bits
from .norm import norm_backward, norm_forward
from .product import product_backward, product_forward
from .softmax import softmax_backward, softmax_forward

PREPARES: dict[str, Any] = {}  # nothing but options

__all__ = [
    "PREPARES",
    "attention_backward",
    "attention_forward",
    "attention_keep_mask",
    "backward",
    "decision_bits",
    "forward",
    "keep_mask",
    "norm_backward",
    "norm_forward",
    "product_backward",
    "product_forward",
    "softmax_backward",
    "softmax_forward",
    "why_not",
]
