"""The opaque operators that torch sees: a module a family, each with its schemas and shapes."""

from . import masks
from .elementwise import Packed, pack, unpack
from .norm import pack_norm, unpack_norm

__all__ = ["Packed", "masks", "pack", "pack_norm", "unpack", "unpack_norm"]
