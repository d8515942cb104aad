"""The functions that rewritten forwards call for memory=True where no dropout is near.

Norms, activations and gated products give tensors that backward can recompute; linear layers, of
any library and with any adapter, keep the recipe for that instead of the tensor. remade_plan.py
says which calls of a method are exchanged for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..base.modules import heard
from ..functional.linear import (
    of_remade,
    remade_layer_norm,
    remade_rms_norm,
)
from ..functional.linear import (
    remade_product as product_of,
)
from ..ops.remade import recipe_of
from .kinds import Kind, activation_name, cached_kind
from .pending import activated, autocasts, eps_of, fits, normalises_last, value


def unhooked_kind(module: Any, name: str) -> Kind | None:
    """The kind of a module if it is ``name`` and a fused op may replace its call; else None.

    It may not if the module has hooks or works in place, or if its forward, or a function of torch
    that this calls, was replaced since it was read.
    """
    kind = cached_kind(type(module))
    if kind is None or kind.name != name or "forward" in module.__dict__:
        return None
    for flag in kind.flags:
        if getattr(module, flag):
            return None
    return None if heard(module) or not kind.holds() else kind


def remade_linear(module: nn.Module, x: Any) -> Any:
    """A call of a linear layer of torch or of any other library, with or without adapters.

    The layer is called as it is. Only of torch's own is it certain that autocast's copy of x is all
    that the layer uses x for.
    """
    x = value(x)
    if recipe_of(x) is None:
        return module(x)
    return of_remade(module, x, casts=unhooked_kind(module, "linear") is not None)


def remade_norm(module: nn.Module, x: Any) -> Any:
    """A call of a norm."""
    x = value(x)
    kind = unhooked_kind(module, "layer_norm") or unhooked_kind(module, "rms_norm")
    if kind is None or is_compiling() or not module.training or not fits(x):
        return module(x)
    weight, bias = kind.get(module, "weight"), kind.get(module, "bias")
    if not normalises_last(kind, module, x):
        return module(x)
    if kind.name == "layer_norm":
        return remade_layer_norm(x, weight, bias, eps_of(kind, module, x))
    if autocasts(x) and type(module) is nn.RMSNorm:
        return module(x)
    return remade_rms_norm(x, weight, eps_of(kind, module, x), kind.zero_centered)


def remade_activation(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """A call of an activation."""
    return one_activation(function, x, memory=True)


def one_activation(function: Callable[[Tensor], Tensor], x: Any, memory: bool = False) -> Any:
    """A call of an activation: one op computes what is written out in Python as several."""
    x = value(x)
    hooked = isinstance(function, nn.Module) and heard(function)
    if activation_name(function) is None or hooked or is_compiling() or not fits(x):
        return function(x)
    return activated(function, x, memory)


def remade_product(first: Any, second: Any) -> Any:
    """A product with an activation: a gate."""
    first, second = value(first), value(second)
    if recipe_of(first) is not None and isinstance(second, Tensor):
        return product_of(first, second)
    if recipe_of(second) is not None and isinstance(first, Tensor):
        return product_of(second, first)
    return first * second
