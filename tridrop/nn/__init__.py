"""Modules with torch.nn's names, arguments and state_dict keys."""

from ..seeds import number_sites
from .attention import MultiheadAttention
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .modules import ActivationDropout, Dropout, DropoutAdd, DropPath
from .norm import DropoutAddLayerNorm, DropoutAddRMSNorm
from .transformer import TransformerBlock

__all__ = [
    "ActivationDropout",
    "DropPath",
    "Dropout",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "MultiheadAttention",
    "TransformerBlock",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "number_sites",
]
