"""tridrop: Triton kernels that fuse dropout into transformer blocks.

No mask is ever stored: backward draws it again from a seed. A mask is a published function of
(seed, coordinates, p), which docs/mask-contract.md defines and anyone can check.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import distributed, functional, nn
from . import integrations as _integrations  # noqa: F401  (other libraries' plugs)
from .backends import backend
from .contract.mask import Shard, fold_in, new_seed
from .contract.seeds import rng
from .functional import *  # noqa: F403  (a new function is named in functional/__init__.py alone)

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
    "backend",
    "distributed",
    "fold_in",
    "mc_dropout",
    "mc_predict",
    "new_seed",
    "nn",
    "rng",
    "schedules",
    "shims",
    "swap",
    "unswap",
]
__all__ += functional.__all__
