"""Torch's inference path of encoder layers, which reads weights past the modules that hold them.

In evaluation ``nn.TransformerEncoderLayer`` gives the weights of its linear layers and attention to
one operator. What sits in their place, such as an adapter, is not called then: its result is lost.
torch reads an attribute before it takes the path, and one before a stack of layers packs tensors
for it. Of swapped ones they say no while there is an adapter, whenever it was put there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .kinds import base_of


def has_path(base: type) -> bool:
    """Whether modules of a class take that path, or pack tensors for it."""
    return issubclass(base, (nn.TransformerEncoderLayer, nn.TransformerEncoder))


def closing(base: type) -> dict[str, Any]:
    """What a swapped class needs so that the path is closed to adapters."""
    if issubclass(base, nn.TransformerEncoderLayer):
        return _closing(base, "activation_relu_or_gelu", 0, _adapted)
    if issubclass(base, nn.TransformerEncoder):
        return _closing(base, "use_nested_tensor", False, _any_adapted)
    return {}


def _closing(
    base: type, name: str, closed: object, adapted: Callable[[nn.Module], bool]
) -> dict[str, Any]:
    def get(self: nn.Module) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)
        value = self.__dict__[name]
        return closed if value and adapted(self) else value

    def set(self: nn.Module, value: object) -> None:
        self.__dict__[name] = value

    unused = [*getattr(base, "__jit_unused_properties__", []), name]  # TorchScript would compile it
    return {name: property(get, set), "__jit_unused_properties__": unused}


def _any_adapted(stack: nn.Module) -> bool:
    """Whether a layer of a stack has such a part; of a first layer in training nothing is asked."""
    layers: Any = stack._modules["layers"]
    every = layers._modules.values()
    first = next(iter(every), None)
    return first is not None and not first.training and any(map(_adapted, every))


def _adapted(layer: nn.Module) -> bool:
    """Whether a part whose weights the path reads does more with them than torch's module."""
    modules: Any = layer._modules
    for name in ("linear1", "linear2"):
        part = modules.get(name)
        if type(part) is not nn.Linear and _is_other(part, nn.Linear):
            return True
    attention = modules.get("self_attn")
    if attention is None:
        return False
    if _is_other(attention, nn.MultiheadAttention):
        return True
    return _is_other(attention._modules.get("out_proj"), nn.Linear)


def _is_other(part: nn.Module | None, torchs: type[nn.Module]) -> bool:
    """Whether a module's forward is not that of torch's class."""
    if part is None or type(part).forward is torchs.forward:  # the quick answer
        return False
    base: Any = base_of(part)
    return base.forward is not torchs.forward
