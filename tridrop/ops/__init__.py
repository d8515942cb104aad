"""The ops that torch sees, one file per family: operators, their shapes, and autograd functions."""

from . import masks
from .attention import Attention, pack_attention, torchs_attention
from .common import Function, apply, unbound
from .elementwise import Fused, pack
from .masked import Masked
from .norm import FusedNorm, pack_norm
from .product import DroppedProduct, pack_product
from .rows import DropRows
from .softmax import SoftmaxDropout, pack_softmax

__all__ = [
    "Attention",
    "DropRows",
    "DroppedProduct",
    "Function",
    "Fused",
    "FusedNorm",
    "Masked",
    "SoftmaxDropout",
    "apply",
    "masks",
    "pack",
    "pack_attention",
    "pack_norm",
    "pack_product",
    "pack_softmax",
    "torchs_attention",
    "unbound",
]
