"""Layers of Keras, on its torch backend: which drop, what they become, and what is left of them.

Keras calls layers one by one, each with its own masks, dtypes and losses around the call: a layer
gets another class, of its own name, and of a ``call`` only sums behind dropout layers are rewritten
(keras_calls.py). Models of Keras, Sequential, functional or one's own, keep their graphs, weights
and configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

from torch import nn

from ..base.modules import is_keras, named_parts
from . import draws
from .keras_calls import MARK, sums_of
from .kinds import base_of
from .present import Holds, is_own
from .report import Site
from .rewrite import ATTENTION_PARTS, Levels

_UNBUILT = (
    "it is not built yet, and what it makes then is not known: call it on a batch, or its build(), "
    "and swap again"
)


class Layers:
    """The Keras layers of a model, by name. Without any it imports nothing and does nothing."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        self.levels = levels
        named: list[tuple[str, Any]] = [(n, m) for n, m in named_parts(model) if is_keras(m)]
        self.names = {layer: name for name, layer in named}
        # The dropout layers within attention, which is what calls them.
        self.inner = {
            layer.__dict__["_modules"]["_dropout_layer"]: layer
            for layer in self.names
            if layer.__dict__["_modules"].get("_dropout_layer") is not None
            and (self.attends(layer) or _is_tridrops(layer))
        }
        # Dropout layers whose sum the layer around them takes over, and that layer.
        self.added = dict(self._sums()) if levels.inside and levels.dropout else {}

    # -------------------------------------------------------------------------------- what they are

    @staticmethod
    def attends(layer: nn.Module) -> bool:
        """Whether it is an attention of Keras, or a subclass that attends as it does."""
        from .keras_classes import computes_attention

        return computes_attention(base_of(layer))

    def part(self, layer: nn.Module) -> str:
        """The word for a layer that drops, and that tridrop has; else empty."""
        from .keras_classes import KINDS

        return KINDS[base_of(layer)][1] if base_of(layer) in KINDS else ""

    def why_left(self, layer: Any) -> str:
        """Why a layer that tridrop has stays what it is; empty where it does not."""
        from .keras_classes import KINDS

        base = base_of(layer)
        if "call" in layer.__dict__:
            return "its call was replaced on the instance"
        if base in KINDS:
            if not is_own(base, "call"):
                return f"{base.__name__}.call was replaced"
            return "" if self.levels.dropout or self._serves(layer) else "its level is off"
        if "_compute_attention" in layer.__dict__:
            return "its _compute_attention was replaced on the instance"
        if not layer.dropout:
            return "its dropout is 0"
        return "" if self.levels.attention else "its level is off"

    def _serves(self, layer: nn.Module) -> bool:
        """Whether it is the dropout layer of an attention that takes its seeds from it."""
        owner = self.inner.get(layer)
        return owner is not None and not _is_tridrops(owner) and not self.why_left(owner)

    def _sums(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        users: dict[nn.Module, int] = {}
        for layer in self.names:
            for part in layer.__dict__["_modules"].values():
                users[part] = users.get(part, 0) + 1
        for layer in self.names:
            own = "call" in layer.__dict__
            sums = None if own or not is_own(base_of(layer), "call") else sums_of(base_of(layer))
            for name in () if sums is None else sums.attributes:
                child: Any = layer.__dict__["_modules"].get(name)
                if (
                    child in self.names
                    and self.part(child) == "dropout"
                    and users[child] == 1
                    and child.noise_shape is None
                    and not self.why_left(child)
                ):
                    yield child, layer

    # --------------------------------------------------------------------------------- what is done

    def apply(self) -> None:
        """Give the layers their classes."""
        if not self.names:
            return
        from .keras_classes import stand_in

        for layer in self.names:
            if (self.part(layer) or self.attends(layer)) and not self.why_left(layer):
                layer.__class__ = stand_in(base_of(layer))
        for child, owner in self.added.items():
            child.__dict__[MARK] = True
            owner.__class__ = stand_in(base_of(owner))

    def number(self) -> None:
        """Keep a number for each layer that could drop, so that numbers do not depend on levels."""
        for layer in self.names:
            if self.part(layer) and not hasattr(layer, "site"):
                layer.__dict__["_tridrop_count"] = 1

    def read(self) -> dict[str, list[Holds]]:
        """By the names of classes: whether each is what was read."""
        found: dict[str, dict[type, Holds]] = {}
        owners = set(self.added.values())
        for layer in self.names:
            if self.part(layer) or self.attends(layer) or layer in owners:
                from .keras_classes import holds_of

                base = base_of(layer)
                found.setdefault(base.__name__, {})[base] = holds_of(base)
        return {name: list(each.values()) for name, each in found.items()}

    # ---------------------------------------------------------------------------- what is reported

    def sites(self) -> Iterator[Site]:
        """All that is to be reported of them, in the order of the model's layers."""
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
                    parts = (self.part(layer), *(("add",) if layer in self.added else ()))
                    yield self._site(layer, () if why else parts, why)
            elif not (_is_tridrops(layer) and layer in self.inner):
                reason = _reason(layer)
                inside = any(name.startswith(f"{outer}.") for outer in unbuilt if outer != name)
                if not reason and not layer.built and _makes_later(layer) and not inside:
                    reason = _UNBUILT
                    unbuilt.append(name)
                if reason:
                    yield self._site(layer, (), reason)

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
    """Whether a Keras layer is one of Keras' own that cannot drop."""
    base = base_of(layer)
    own = base.__module__.startswith("keras.src.") and "call" not in layer.__dict__
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return own and not hooked and not _reason(layer) and not _makes_later(layer)


def _is_tridrops(layer: nn.Module) -> bool:
    return base_of(layer).__module__.startswith("tridrop.keras.")


def _makes_later(layer: Any) -> bool:
    """Whether a layer makes layers when it is built, which may drop."""
    base = base_of(layer)
    if not base.__module__.startswith("keras.src."):
        return not getattr(layer.build, "_is_default", False)
    return bool(getattr(layer, "dropout", 0)) and not hasattr(layer, "_dropout_layer")


def _reason(layer: Any) -> str:
    """Why a layer that draws random numbers, as far as reading tells, is left; else empty."""
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
            return "it drops in its own code, with a rate and not a layer"
        return "it draws random numbers" + (", and drops nothing" if own else " in its own code")
    function = layer.function if base.__name__ == "Lambda" and own else base.call
    if (not own or function is not base.call) and draws.found_in(function, depth=3):
        return "its own code draws random numbers"
    return ""
