"""tridrop: Triton kernels that fuse dropout into transformer blocks.

No mask is ever stored: backward regenerates it from a seed, and the mask is a published function of
(seed, coordinates, p) that anyone can check. docs/mask-contract.md defines it.
"""

from . import nn
from .backends import backend
from .functional import activation_dropout, dropout, dropout_add, keep_mask
from .mask import Shard, fold_in, new_seed
from .seeds import rng

__version__ = "0.1.0"

__all__ = [
    "Shard",
    "activation_dropout",
    "backend",
    "dropout",
    "dropout_add",
    "fold_in",
    "keep_mask",
    "new_seed",
    "nn",
    "rng",
]
