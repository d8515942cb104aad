"""tridrop: Triton kernels that fuse dropout into transformer blocks.

No mask is ever stored: backward draws it again from a seed. A mask is a published function of
(seed, coordinates, p), which docs/mask-contract.md defines and anyone can check.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import distributed, nn
from . import integrations as _integrations  # noqa: F401  (other libraries' plugs)
from .backends import backend
from .contract.mask import Shard, fold_in, new_seed
from .contract.seeds import rng
from .functional import (
    activation_dropout,
    activation_dropout_linear,
    alpha_dropout,
    attention_keep_mask,
    drop_block2d,
    drop_block3d,
    drop_path_subset,
    dropconnect_linear,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    embedding_dropout,
    feature_alpha_dropout,
    gaussian_dropout,
    head_dropout,
    keep_mask,
    kept_indices,
    layer_drop,
    layer_norm_dropout,
    locked_dropout,
    lora_delta,
    lora_deltas,
    lora_linear,
    norm_linear,
    normal_noise,
    patch_dropout,
    rms_norm_dropout,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
    softmax_dropout,
    stochastic_depth,
    word_dropout,
)

if TYPE_CHECKING:
    from . import keras as keras
    from . import schedules, shims
    from .monte_carlo import Prediction, mc_dropout, mc_predict
    from .schedules import DropoutSchedule
    from .swapping import swap, unswap

__version__ = "0.1.0"

# These are imported when they are first used. The code that reads and rewrites models is half of
# the package, and a script that only calls ops does not need it.
_LATER = {
    "DropoutSchedule": "schedules",
    "Prediction": "monte_carlo",
    "mc_dropout": "monte_carlo",
    "mc_predict": "monte_carlo",
    "swap": "swapping",
    "unswap": "swapping",
}
_LATER_MODULES = ("commands", "keras", "monte_carlo", "schedules", "shims", "swapping")


def __getattr__(name: str) -> Any:
    if name in _LATER_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = found  # later uses find it without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "DropoutSchedule",
    "Prediction",
    "Shard",
    "activation_dropout",
    "activation_dropout_linear",
    "alpha_dropout",
    "attention_keep_mask",
    "backend",
    "distributed",
    "drop_block2d",
    "drop_block3d",
    "drop_path_subset",
    "dropconnect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "embedding_dropout",
    "feature_alpha_dropout",
    "fold_in",
    "gaussian_dropout",
    "head_dropout",
    "keep_mask",
    "kept_indices",
    "layer_drop",
    "layer_norm_dropout",
    "locked_dropout",
    "lora_delta",
    "lora_deltas",
    "lora_linear",
    "mc_dropout",
    "mc_predict",
    "new_seed",
    "nn",
    "norm_linear",
    "normal_noise",
    "patch_dropout",
    "rms_norm_dropout",
    "rng",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "schedules",
    "shims",
    "softmax_dropout",
    "stochastic_depth",
    "swap",
    "unswap",
    "word_dropout",
]
