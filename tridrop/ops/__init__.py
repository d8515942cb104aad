"""The opaque operators that torch sees: one module per family, each with its schemas and shapes."""

from . import masks, softmax
from .attention import PackedAttention, pack_attention, unpack_attention
from .elementwise import Packed, pack, unpack
from .norm import is_after, laid_norm, pack_norm, unpack_norm

__all__ = [
    "Packed",
    "PackedAttention",
    "is_after",
    "laid_norm",
    "masks",
    "pack",
    "pack_attention",
    "pack_norm",
    "softmax",
    "unpack",
    "unpack_attention",
    "unpack_norm",
]
