"""The Triton backend: importing it needs triton, running it a GPU or Triton's interpreter."""

from typing import Any

from .attention_launch import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask
from .launch import interpreting, target, why_not
from .masks import attention_keep_mask, decision_bits
from .norm_launch import norm_backward, norm_forward
from .product_launch import product_backward, product_forward
from .softmax_launch import softmax_backward, softmax_forward

# Launch plans are kept anyway, and strides and alignment are those of a call.
PREPARES: dict[str, Any] = {}

__all__ = [
    "PREPARES",
    "attention_backward",
    "attention_forward",
    "attention_keep_mask",
    "backward",
    "decision_bits",
    "forward",
    "interpreting",
    "keep_mask",
    "norm_backward",
    "norm_forward",
    "product_backward",
    "product_forward",
    "softmax_backward",
    "softmax_forward",
    "target",
    "why_not",
]
