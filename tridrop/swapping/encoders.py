"""Keeps torch's inference path of encoder layers from bypassing adapters.

In eval mode ``nn.TransformerEncoderLayer`` passes the weights of its linear layers and attention to
one operator, without calling these modules. If an adapter replaces one of them, its result is lost.
torch reads an attribute of the layer before it takes this path, and one of a stack of layers before
it packs tensors for it. In swapped modules these attributes say no as long as there is an adapter,
whenever that was added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .kinds import base_of


def has_path(base: type) -> bool:
    """Whether modules of a class take this path, or pack tensors for it."""
    return issubclass(base, (nn.TransformerEncoderLayer, nn.TransformerEncoder))


def closing(base: type) -> dict[str, Any]:
    """The attributes of a swapped class that close this path while there is an adapter."""
    if issubclass(base, nn.TransformerEncoderLayer):
        return _closing(base, _LAYERS, 0, _adapted)
    if issubclass(base, nn.TransformerEncoder):
        return _closing(base, _STACKS, False, _any_adapted)
    return {}


_LAYERS, _STACKS = "activation_relu_or_gelu", "use_nested_tensor"
# Dynamo of torch 2.11 reads `self.__dict__[name]` as `self.name`, which is a property here and so
# has no end. It reads another entry of the dictionary, which holds the same value.
_TWIN = "_tridrop_"
TWINS = (_TWIN + _LAYERS, _TWIN + _STACKS)


def note_twins(module: nn.Module) -> None:
    """Store the value of a swapped module's attribute once more, for the compiler."""
    for name in (_LAYERS, _STACKS):
        if name in module.__dict__:
            module.__dict__[_TWIN + name] = module.__dict__[name]


def _closing(
    base: type, name: str, closed: object, adapted: Callable[[nn.Module], bool]
) -> dict[str, Any]:
    twin = _TWIN + name

    def get(self: nn.Module) -> Any:
        key = twin if is_compiling() and twin in self.__dict__ else name
        if key not in self.__dict__:
            raise AttributeError(name)
        value = self.__dict__[key]
        return closed if value and adapted(self) else value

    def set(self: nn.Module, value: object) -> None:
        self.__dict__[name] = self.__dict__[twin] = value

    unused = [*getattr(base, "__jit_unused_properties__", []), name]  # TorchScript would compile it
    return {name: property(get, set), "__jit_unused_properties__": unused}


def _any_adapted(stack: nn.Module) -> bool:
    """Whether a layer of a stack has an adapter; not checked in training, which never packs."""
    layers: Any = stack._modules["layers"]
    every = layers._modules.values()
    first = next(iter(every), None)
    return first is not None and not first.training and any(map(_adapted, every))


def _adapted(layer: nn.Module) -> bool:
    """Whether a module whose weights this path reads computes more than torch's module would."""
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
    """Whether a module has another forward than torch's class."""
    if part is None or type(part).forward is torchs.forward:  # the quick answer
        return False
    base: Any = base_of(part)
    return base.forward is not torchs.forward
