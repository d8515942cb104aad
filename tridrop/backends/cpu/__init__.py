"""The cpu backend: loops that numba compiles, in blocks and by several threads.

It makes the numbers of the reference, to rounding, with the same masks. What the loops do not take
(fp64, a ``p`` in a tensor, alpha and Gaussian noise, gates, sinks) is handed to the reference
whole, with the masks from the loops.
"""

from functools import partial

import torch

from ..reference import decision_bits
from ..reference import elementwise as _reference
from ..reference import masks as _reference_masks
from ..reference import product as _product
from . import elementwise, masks, norm
from .attention import attention_backward, attention_forward
from .elementwise import backward, forward
from .norm import norm_backward, norm_forward
from .softmax import softmax_backward, softmax_forward

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

keep_mask = partial(_reference.keep_mask, draw=masks)
attention_keep_mask = partial(_reference_masks.attention_keep_mask, draw=masks)
product_forward = partial(_product.product_forward, draw=masks)
product_backward = partial(_product.product_backward, draw=masks)

PREPARES = {"elementwise": elementwise.prepare, "norm": norm.prepare}


def why_not(device: torch.device, dtypes: list[torch.dtype]) -> str | None:
    """Any floating-point dtype, on the CPU."""
    if device.type == "cpu":
        return None
    return (
        f"the cpu backend cannot run on {device}: its loops are for the CPU's memory. Use "
        "tridrop.backend('triton') or tridrop.backend('reference')"
    )
