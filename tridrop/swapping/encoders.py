"""Torch's inference path of encoder layers, which reads weights past the modules that hold them.

In evaluation ``nn.TransformerEncoderLayer`` gives the weights of its linear layers and attention to
one operator. What sits in their place, such as an adapter, is not called then: its result is lost.
torch reads an attribute before it takes the path, and one before a stack of layers packs tensors
for it. Of swapped ones they say no while there is an adapter, whenever it was put there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn

from .kinds import base_of


def has_path(base: type) -> bool:
    """Whether modules of a class take that path, or pack tensors for it."""
    return issubclass(base, (nn.TransformerEncoderLayer, nn.TransformerEncoder))


def closing(base: type) -> dict[str, Any]:
    """What a swapped class needs so that the path is closed to adapters."""
    if issubclass(base, nn.TransformerEncoderLayer):
        return _closing(base, "activation_relu_or_gelu", 0, lambda layer: [layer])
    if issubclass(base, nn.TransformerEncoder):
        return _closing(base, "use_nested_tensor", False, lambda stack: stack.layers)
    return {}


def _closing(
    base: type, name: str, closed: object, layers: Callable[[Any], Iterable[nn.Module]]
) -> dict[str, Any]:
    def get(self: nn.Module) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)
        value = self.__dict__[name]
        return closed if value and any(map(_adapted, layers(self))) else value

    def set(self: nn.Module, value: object) -> None:
        self.__dict__[name] = value

    unused = [*getattr(base, "__jit_unused_properties__", []), name]  # TorchScript would compile it
    return {name: property(get, set), "__jit_unused_properties__": unused}


def _adapted(layer: nn.Module) -> bool:
    """Whether a part whose weights the path reads does more with them than torch's module."""
    attention = getattr(layer, "self_attn", None)
    parts: list[tuple[Any, Any]] = [(attention, nn.MultiheadAttention)]
    for owner, name in ((attention, "out_proj"), (layer, "linear1"), (layer, "linear2")):
        parts.append((getattr(owner, name, None), nn.Linear))
    classes = [(cast(Any, base_of(part)), torchs) for part, torchs in parts if part is not None]
    return any(own.forward is not torchs.forward for own, torchs in classes)
