"""Swaps layers of Keras on its torch backend: which drop, what they become, and which are left.

Keras wraps each call of a layer in its own handling of masks, dtypes and losses. So a layer gets
another class with the same name, and in a ``call`` only sums that follow a dropout layer are
rewritten (keras_calls.py); those of a functional model are fused as it runs its graph
(keras_graphs.py). Models of Keras, whether Sequential, functional or subclassed, keep
their graphs, weights and configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

from torch import nn

from ..base.modules import is_keras, named_parts
from . import draws
from .keras_calls import GRAPH, MARK, sums_of
from .kinds import base_of
from .present import Holds, is_original
from .report import Site
from .rewrite import ATTENTION_PARTS, Levels

_UNBUILT = (
    "it is not built yet, and the layers it will create are unknown: call it on a batch, or call "
    "its build(), and swap again"
)


class Layers:
    """The Keras layers of a model. Without any, it imports nothing and does nothing."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        self.levels = levels
        named: list[tuple[str, Any]] = [(n, m) for n, m in named_parts(model) if is_keras(m)]
        self.names = {layer: name for name, layer in named}
        # The dropout layers inside attention layers, which call them -> the attention layer.
        self.inner = {
            layer.__dict__["_modules"]["_dropout_layer"]: layer
            for layer in self.names
            if layer.__dict__["_modules"].get("_dropout_layer") is not None
            and (self.attends(layer) or _is_tridrops(layer))
        }
        # Dropout layers that are fused with a sum -> the layer whose call contains the sum.
        self.added = dict(self._sums()) if levels.inside and levels.dropout else {}

    # ----------------------------------------------------------------------- what the layers are

    @staticmethod
    def attends(layer: nn.Module) -> bool:
        """Whether a layer is Keras' attention, or a subclass that computes attention as it does."""
        from .keras_classes import computes_attention

        return computes_attention(base_of(layer))

    def part(self, layer: nn.Module) -> str:
        """The word for a layer that drops, if tridrop has a counterpart; else empty."""
        from .keras_classes import KINDS

        return KINDS[base_of(layer)][1] if base_of(layer) in KINDS else ""

    def why_left(self, layer: Any) -> str:
        """Why a layer with a counterpart in tridrop is left as it is; empty if it is not."""
        from .keras_classes import KINDS

        base = base_of(layer)
        if "call" in layer.__dict__:
            return "its call was replaced on the instance"
        if base in KINDS:
            if not is_original(base, "call"):
                return f"{base.__name__}.call was replaced"
            if KINDS[base][1] == "gaussian dropout" and layer.rate == 1:
                return "its rate is 1, at which its noise is infinite: Keras' layer divides by zero"
            return "" if self.levels.dropout or self._serves(layer) else "its switch is off"
        if "_compute_attention" in layer.__dict__:
            return "its _compute_attention was replaced on the instance"
        if not layer.dropout:
            return "its dropout is 0"
        return "" if self.levels.attention else "its switch is off"

    def _serves(self, layer: nn.Module) -> bool:
        """Whether a layer is the dropout layer that a swapped attention takes its seeds from."""
        owner = self.inner.get(layer)
        return owner is not None and not _is_tridrops(owner) and not self.why_left(owner)

    def _sums(self) -> Iterator[tuple[nn.Module, tuple[nn.Module, Any]]]:
        """Dropout layers whose sum is taken over, by which layer, and what was read of a graph."""
        users: dict[Any, int] = {}
        for layer in self.names:
            parts = {id(part): part for part in layer.__dict__["_modules"].values()}
            parts |= {id(part): part for part in layer._layers}
            for part in parts.values():
                users[part] = users.get(part, 0) + 1
        taken: set[Any] = set()  # of a sum of two, one is taken
        for layer in self.names:
            for child, read in self._dropped_into_sums(layer):
                if (
                    child in self.names
                    and self.part(child) == "dropout"
                    and users[child] == 1
                    and child.noise_shape is None
                    and not self.why_left(child)
                    and (read is None or read.sum not in taken)
                ):
                    taken |= set() if read is None else {read.sum}
                    yield child, (layer, read)

    @staticmethod
    def _dropped_into_sums(layer: Any) -> Iterator[tuple[Any, Any]]:
        from . import keras_graphs

        base = base_of(layer)
        if "call" in layer.__dict__ or not is_original(base, "call"):
            return
        if keras_graphs.runs_a_graph(base):
            yield from ((read.layer, read) for read in keras_graphs.sums(layer))
        else:
            sums = sums_of(base)
            for name in () if sums is None else sums.attributes:
                yield layer.__dict__["_modules"].get(name), None

    # ---------------------------------------------------------------------------- what is changed

    def apply(self) -> None:
        """Give the layers their new classes."""
        if not self.names:
            return
        from . import keras_graphs
        from .keras_classes import stand_in

        for layer in self.names:
            if (self.part(layer) or self.attends(layer)) and not self.why_left(layer):
                layer.__class__ = stand_in(base_of(layer))
        for child, (owner, read) in self.added.items():
            child.__dict__[MARK] = True
            owner.__class__ = stand_in(base_of(owner))
            if read is not None:
                owner.__dict__.setdefault(GRAPH, keras_graphs.Taken()).add(read)

    def number(self) -> None:
        """Reserve a number for each layer that could drop, whatever the switches."""
        for layer in self.names:
            if self.part(layer) and not hasattr(layer, "site"):
                layer.__dict__["_tridrop_count"] = 1

    def read(self) -> dict[str, list[Holds]]:
        """For each class name, checks that the class still is what was read."""
        found: dict[str, dict[type, Holds]] = {}
        owners = {owner for owner, _ in self.added.values()}
        for layer in self.names:
            if self.part(layer) or self.attends(layer) or layer in owners:
                from .keras_classes import holds_of

                base = base_of(layer)
                found.setdefault(base.__name__, {})[base] = holds_of(base)
        return {name: list(each.values()) for name, each in found.items()}

    # ---------------------------------------------------------------------------- what is reported

    def sites(self) -> Iterator[Site]:
        """The sites of the layers, in the order of the model's layers."""
        unbuilt: list[str] = []
        for layer, name in self.names.items():
            parts: tuple[str, ...]
            for hook in draws.hooks(layer):
                code = str(getattr(hook, "__qualname__", repr(hook)))
                yield self._site(layer, (), "it is a hook that draws", code)
            if self.attends(layer):
                if not self.why_left(layer) or not layer.dropout:
                    parts = () if self.why_left(layer) else ATTENTION_PARTS
                    yield self._site(layer, parts, self.why_left(layer))
            elif self.part(layer):
                if layer not in self.inner or not (
                    _is_tridrops(self.inner[layer])
                    or self._serves(layer)
                    or not self.inner[layer].dropout
                ):
                    why = self.why_left(layer)
                    parts = (self.part(layer), *self._added_parts(layer))
                    yield self._site(layer, () if why else parts, why)
            elif not (_is_tridrops(layer) and layer in self.inner):
                reason = _reason(layer)
                inside = any(name.startswith(f"{outer}.") for outer in unbuilt if outer != name)
                if not reason and not layer.built and _makes_later(layer) and not inside:
                    reason = _UNBUILT
                    unbuilt.append(name)
                if reason:
                    yield self._site(layer, (), reason)

    def _added_parts(self, layer: Any) -> tuple[str, ...]:
        """What became one op with a dropout layer."""
        if layer not in self.added:
            return ()
        read = self.added[layer][1]
        return ("add",) if read is None else read.parts

    def _site(self, layer: Any, parts: tuple[str, ...], reason: str, code: str = "") -> Site:
        base = base_of(layer)
        found = getattr(layer, "rate", getattr(layer, "dropout", None))
        p = float(found) if isinstance(found, Real) else None
        drawn = layer.__dict__["_modules"].get("_dropout_layer") if self.attends(layer) else layer
        rate = "" if p is None else f"{'dropout=' if drawn is not layer else ''}{p:g}"
        stream = getattr(drawn, "site", None) if parts else None
        text = code or f"{base.__name__}({rate})"
        return Site(self.names[layer], base.__name__, text, None, p, parts, reason, stream)


def is_certain(layer: Any) -> bool:
    """Whether a layer is one of Keras' own that certainly does not drop."""
    base = base_of(layer)
    own = base.__module__.startswith("keras.src.") and "call" not in layer.__dict__
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return own and not hooked and not _reason(layer) and not _makes_later(layer)


def _is_tridrops(layer: nn.Module) -> bool:
    return base_of(layer).__module__.startswith("tridrop.keras.")


def _makes_later(layer: Any) -> bool:
    """Whether a layer creates layers when it is built, which may drop."""
    base = base_of(layer)
    if not base.__module__.startswith("keras.src."):
        return not getattr(layer.build, "_is_default", False)
    return bool(getattr(layer, "dropout", 0)) and not hasattr(layer, "_dropout_layer")


def _reason(layer: Any) -> str:
    """Why a layer is left that seems to draw random numbers by its source; empty for others."""
    from .keras_classes import KINDS

    base: Any = base_of(layer)
    if _is_tridrops(layer):
        return "it is tridrop's own"
    subclass = [kind.__name__ for kind in base.__mro__[1:] if kind in KINDS]
    if subclass:
        return f"it is a subclass of {subclass[0]} that may compute something else"
    own = base.__module__.startswith("keras.src.")
    if layer._seed_generators:
        drops = any(getattr(layer, name, 0) for name in ("dropout", "recurrent_dropout"))
        if drops:
            return "it drops in its own code, not by a dropout layer"
        return "it draws random numbers" + (", and drops nothing" if own else " in its own code")
    function = layer.function if base.__name__ == "Lambda" and own else base.call
    if (not own or function is not base.call) and draws.found_in(function, depth=3):
        return "its own code draws random numbers"
    return ""
