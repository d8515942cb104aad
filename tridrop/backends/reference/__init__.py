"""The reference backend: plain torch on any device, readable enough to be the specification."""

from .attention import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask, why_not
from .masks import attention_keep_mask
from .norm import norm_backward, norm_forward
from .softmax import softmax_backward, softmax_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "attention_keep_mask",
    "backward",
    "forward",
    "keep_mask",
    "norm_backward",
    "norm_forward",
    "softmax_backward",
    "softmax_forward",
    "why_not",
]
