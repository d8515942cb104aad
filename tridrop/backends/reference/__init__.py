"""The reference backend: plain torch on any device, readable enough to be the specification.

Tests compare the other backends with it, and the cpu backend hands it the calls that its loops do
not take.
"""

from ...spec.operands import Functions, keeping_options
from .attention import attention_backward, attention_forward
from .elementwise import backward, forward, keep_mask, why_not
from .masks import attention_keep_mask, decision_bits
from .norm import norm_backward, norm_forward
from .product import product_backward, product_forward
from .softmax import softmax_backward, softmax_forward

__all__ = [
    "FAMILIES", "attention_keep_mask", "decision_bits", "keep_mask", "prepare", "why_not",
]  # fmt: skip

FAMILIES = {
    "elementwise": Functions(forward, backward),
    "norm": Functions(norm_forward, norm_backward),
    "softmax": Functions(softmax_forward, softmax_backward),
    "attention": Functions(attention_forward, attention_backward),
    "product": Functions(product_forward, product_backward),
}
prepare = keeping_options(FAMILIES)
