"""The autograd functions: what is saved, what is returned. No math, no launches.

Forward and backward are opaque operators (``ops``). Backward saves the seed, and inputs only where
the derivative needs them; the mask is drawn again. The derivative of backward is a composition of
plain torch operations, so it can be differentiated any number of times.
"""

from .attention import Attention, torchs_attention
from .common import Function, apply, apply_unbound
from .elementwise import Fused
from .masked import Masked
from .norm import FusedNorm
from .product import Product
from .rows import DropRows
from .softmax import SoftmaxDropout

__all__ = [
    "Attention",
    "DropRows",
    "Function",
    "Fused",
    "FusedNorm",
    "Masked",
    "Product",
    "SoftmaxDropout",
    "apply",
    "apply_unbound",
    "torchs_attention",
]
