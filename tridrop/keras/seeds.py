"""The seeds of Keras layers: a sequence that is saved, goes on when loaded, and is recomputed.

Keras keeps a layer's seed and the number of its calls as one variable of two integers, in a
SeedGenerator. Here these are a seed tensor: call n of seed s draws the mask of ``fold_in(s, n)``,
where Keras' torch backend adds the two up, so that call n + 1 of seed s is call n of s + 1.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from keras.random import SeedGenerator
from keras.src.backend.common import global_state
from keras.src.saving.keras_saveable import KerasSaveable
from torch import Tensor

from ..contract import seeds
from ..contract.recomputation import Counter

_STATE = "__tridrop_seed_state"  # where Keras' saving does not look; tridrop.unswap knows it
_LIMIT = 1 << 31


def check_seed(seed: Any) -> None:
    """Raise for an int that Keras' SeedGenerator cannot hold; it sees to other types itself."""
    if isinstance(seed, int) and not -_LIMIT <= seed < _LIMIT:
        raise ValueError(
            f"seed = {seed} does not fit into Keras' SeedGenerator, which has 32 bits on the torch "
            "backend: give a seed in [-2^31, 2^31), or none and use tridrop.rng(seed)"
        )


class SeedState(KerasSaveable):  # type: ignore[misc]
    """What is saved of a layer's SeedGenerator, and the numbers of its calls.

    Keras' files hold a layer's weights, and no seeds: a model that is loaded would draw the masks
    of its first steps again. So this is a part of the layer to them, with an entry of its own. A
    file without that entry leaves the sequence where it is, and Keras' own layers overlook it.
    """

    def __init__(self, generator: SeedGenerator) -> None:
        self.generator = generator
        self.counter = Counter()

    def _obj_type(self) -> str:
        return "Operation"  # the plainest of the kinds that Keras' saving knows

    def save_own_variables(self, store: Any) -> None:
        """Write (seed, number of the next call)."""
        store["0"] = self.generator.state

    def load_own_variables(self, store: Any) -> None:
        """Go on where the saved sequence stood."""
        if "0" in store.keys():  # noqa: SIM118  (a store of Keras' is no mapping)
            self.generator.state.assign(np.asarray(store["0"]))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def next(self, device: torch.device) -> Tensor:
        """The seed tensor of this call, that of its forward where it is a recomputation."""
        behind = self.counter.next()
        state = self.generator.state.value if behind else self.generator.next()
        state = state.detach().to(device, torch.int64)
        return state - state.new_tensor((0, behind)) if behind else state


class Configured:
    """Warns where a layer goes into a legacy .h5 file of a whole model, and comes from one.

    Such a file holds configurations and weights, and no more: nothing tells where masks go on.
    """

    def get_config(self) -> dict[str, Any]:
        """Keras' configuration of the layer."""
        _warn_of_legacy_files("is loaded from it, its masks begin again")
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The layer of a configuration."""
        _warn_of_legacy_files("has been loaded from it begins its masks again")
        return super().from_config(config)  # type: ignore[misc]


def _warn_of_legacy_files(what: str) -> None:
    if global_state.get_global_attribute("use_legacy_config", False):  # by these files alone
        warnings.warn(
            "a legacy .h5 file of a whole model does not carry the number of a layer's calls: what "
            f"{what}. Save as .keras, or the weights as .weights.h5, to go on with the next mask",
            stacklevel=3,
        )


class Drops(Configured):
    """What each layer here has that drops: a place in a model, and a sequence of seeds.

    ``site`` is its number under :func:`tridrop.rng`, which goes before the layer's own seed, as
    :func:`tridrop.nn.number_sites` gives it.
    """

    site: int | None = None
    __dict__: dict[str, Any]

    @property
    def seed_state(self) -> SeedState | None:
        """What is saved of its seeds; None where its rate is 0."""
        generator = self.__dict__.get("seed_generator")
        if generator is None:
            return None
        found: SeedState | None = self.__dict__.get(_STATE)
        if found is None or found.generator is not generator:
            found = self.__dict__[_STATE] = SeedState(generator)
        return found

    def next_seed(self, x: Tensor) -> Tensor:
        """The seed tensor of a call on ``x`` that drops."""
        if seeds.active():
            return seeds.seed_for(x.device, None, self.site)
        state = self.seed_state
        if state is None:
            raise ValueError(
                "the layer was made with a rate of 0, and so has no seed to drop by: make it with "
                "the rate that it is to have, or use tridrop.rng(seed)"
            )
        return state.next(x.device)
