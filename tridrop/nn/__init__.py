"""Modules with torch.nn's names, arguments and state_dict keys."""

from ..contract.seeds import number_sites
from .attention import MultiheadAttention
from .dropconnect import DropConnectLinear, remove_weight_drop, weight_drop
from .embedding import EmbeddingDropout, WordDropout
from .family import (
    AlphaDropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
    GaussianDropout,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
)
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .lora import LoRALinear
from .modules import ActivationDropout, Dropout, DropoutAdd, DropPath
from .norm import DropoutAddLayerNorm, DropoutAddRMSNorm
from .recurrent import LockedDropout, VariationalRNN
from .structured import (
    DropBlock2d,
    DropBlock3d,
    DropPathSubset,
    HeadDropout,
    LayerDrop,
    PatchDropout,
    StochasticDepth,
)
from .transformer import TransformerBlock
from .variational_cell import VariationalCell

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnectLinear",
    "DropPath",
    "DropPathSubset",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "HeadDropout",
    "LayerDrop",
    "LoRALinear",
    "LockedDropout",
    "MultiheadAttention",
    "PatchDropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "StochasticDepth",
    "TransformerBlock",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "VariationalCell",
    "VariationalRNN",
    "WordDropout",
    "number_sites",
    "remove_weight_drop",
    "weight_drop",
]
