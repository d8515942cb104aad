"""The classes that Keras layers get: with their own name, which Keras saves, and tridrop's masks.

This module imports keras, and is imported only for models that have layers of Keras.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src import api_export
from keras.src.saving import object_registration

from .. import keras as tridrop_keras
from ..keras.attention import Attends
from . import keras_graphs
from .keras_calls import sums_of
from .present import At, Holds, guarded, holds, is_original

# What layers that drop become, and the word for that in a report. Exact types only, since a
# subclass may do something else.
KINDS: dict[type, tuple[type, str]] = {
    keras.layers.Dropout: (tridrop_keras.Dropout, "dropout"),
    keras.layers.SpatialDropout1D: (tridrop_keras.SpatialDropout1D, "feature dropout"),
    keras.layers.SpatialDropout2D: (tridrop_keras.SpatialDropout2D, "feature dropout"),
    keras.layers.SpatialDropout3D: (tridrop_keras.SpatialDropout3D, "feature dropout"),
    keras.layers.GaussianDropout: (tridrop_keras.GaussianDropout, "gaussian dropout"),
    keras.layers.AlphaDropout: (tridrop_keras.AlphaDropout, "alpha dropout"),
}
MultiHeadAttention: Any = keras.layers.MultiHeadAttention
# The methods that a subclass must not have changed; the rest of its call may be its own.
_ATTENTION = ("_compute_attention", "_masked_softmax", "_build_attention")
_made: dict[type, type] = {}


def computes_attention(base: type) -> bool:
    """Whether a class computes attention as Keras' MultiHeadAttention does."""
    return issubclass(base, MultiHeadAttention) and all(
        getattr(base, name) is getattr(MultiHeadAttention, name)
        and is_original(MultiHeadAttention, name)
        for name in _ATTENTION
    )


def _places(base: type) -> tuple[At, ...]:
    if keras_graphs.runs_a_graph(base):
        return keras_graphs.place_of(base), *keras_graphs.PLACES
    names = _ATTENTION[:2] if computes_attention(base) else ("call",)
    return tuple(At(base, name) for name in names)


def holds_of(base: type) -> Holds:
    """A check that a class is still what it was when it was read."""
    return holds(*_places(base))


def stand_in(base: type) -> type:
    """The class that the layers of a class get; if that class is changed later, the change runs."""
    if base not in _made:
        first, *others = _places(base)
        bases: tuple[type, ...] = (base,)
        if base in KINDS:
            ours: Any = KINDS[base][0]
            bases, new = (ours,), ours.call
            more: dict[str, Any] = {"_tridrop_holds": staticmethod(holds_of(base))}
        elif computes_attention(base):
            bases, new = (Attends, base), Attends._compute_attention
            more = {"_adopted": stand_in(keras.layers.Dropout)}
        elif keras_graphs.runs_a_graph(base):
            new, more = keras_graphs.run_through_graph, {}
        else:
            sums = sums_of(base)
            assert sums is not None
            new, more = sums.call, {"_tridrop_text": sums.text}
        body = {
            "_tridrop_base": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": f"A {base.__name__} of Keras' that draws tridrop's mask.",
            first.name: guarded(first, new, tuple(others)),
        }
        made = type(base.__name__, bases, body | more)
        # Keras saves a layer by the name of its class: it loads as a layer of the original class.
        for names in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
            if base in names:
                names[made] = names[base]
        _made[base] = made
    return _made[base]
