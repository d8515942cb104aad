"""The Triton backend: importing it needs triton, running it a GPU or Triton's interpreter."""

from .attention_launch import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask
from .launch import interpreting, prepare, target, why_not
from .masks import attention_keep_mask, decision_bits
from .norm_launch import norm_backward, norm_forward
from .product_launch import product_backward, product_forward
from .softmax_launch import softmax_backward, softmax_forward

__all__ = [
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
    "prepare",
    "product_backward",
    "product_forward",
    "softmax_backward",
    "softmax_forward",
    "target",
    "why_not",
]
