"""The Triton backend. Its import needs triton, and its kernels a GPU or Triton's interpreter."""

from ...spec.operands import Functions, keeping_options
from .attention_launch import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask
from .launch import interpreting, target, why_not
from .masks import attention_keep_mask, decision_bits
from .norm_launch import norm_backward, norm_forward
from .product_launch import product_backward, product_forward
from .softmax_launch import softmax_backward, softmax_forward

__all__ = [
    "FAMILIES", "attention_keep_mask", "decision_bits", "interpreting", "keep_mask", "prepare",
    "target", "why_not",
]  # fmt: skip

FAMILIES = {
    "elementwise": Functions(forward, backward),
    "norm": Functions(norm_forward, norm_backward),
    "softmax": Functions(softmax_forward, softmax_backward),
    "attention": Functions(attention_forward, attention_backward),
    "product": Functions(product_forward, product_backward),
}
# Launch plans are cached by shape and options; strides and alignment may differ in each call.
prepare = keeping_options(FAMILIES)
