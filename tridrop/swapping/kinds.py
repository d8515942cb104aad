"""What sort of module or function something is: a dropout, a norm, a linear layer, an activation.

Modules of torch are recognised by their type, as long as it has the methods of torch's own files.
Modules of other libraries are recognised by the form of their forward, see forms.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..nn import Dropout
from .class_cache import cache_of, cached
from .forms import LAYER_NORM, by_form
from .forms import Kind as Kind
from .forms import is_dropout_add as is_dropout_add
from .present import At, holds, is_original

_DROPOUT = Kind("dropout", {"p": "p", "inplace": "inplace"})
OTHERS = ("feature dropout", "alpha dropout")  # nothing is fused with these
_FEATURE, _ALPHA = (Kind(name, {"p": "p"}) for name in OTHERS)

# Exact types only, since a subclass may compute something else. With each kind, the functions of
# torch.nn.functional that the module calls, and that a fused op does not call.
TYPES: dict[type, tuple[Kind, tuple[str, ...]]] = {
    nn.Dropout: (_DROPOUT, ("dropout",)),
    Dropout: (_DROPOUT, ()),
    nn.Dropout1d: (_FEATURE, ("dropout1d",)),
    nn.Dropout2d: (_FEATURE, ("dropout2d",)),
    nn.Dropout3d: (_FEATURE, ("dropout3d",)),
    nn.AlphaDropout: (_ALPHA, ("alpha_dropout",)),
    nn.FeatureAlphaDropout: (_ALPHA, ("feature_alpha_dropout",)),
    nn.LayerNorm: (LAYER_NORM, ("layer_norm",)),
    nn.RMSNorm: (Kind("rms_norm", {"weight": "weight", "eps": "eps"}), ("rms_norm",)),
    nn.Linear: (Kind("linear", {"weight": "weight", "bias": "bias"}), ("linear",)),
    nn.Identity: (Kind("identity"), ()),
    nn.ReLU: (Kind("activation", {"inplace": "inplace"}), ("relu",)),
    nn.GELU: (Kind("activation"), ("gelu",)),
    nn.SiLU: (Kind("activation", {"inplace": "inplace"}), ("silu",)),
    nn.Softmax: (Kind("softmax", {"dim": "dim"}), ("softmax",)),
    nn.MultiheadAttention: (
        Kind("attention", {"p": "dropout"}),
        ("multi_head_attention_forward", "scaled_dot_product_attention", "softmax", "dropout",
         "linear"),
    ),
}  # fmt: skip
# The same for modules that are recognised by their form.
_CALLED = {"layer_norm": (At(F, "layer_norm"),), "linear": (At(torch, "addmm"),)}

# Activations that are functions of torch, unless replaced: their names, and their code objects.
_GELU = F.gelu if is_original(F, "gelu") else None
_FUNCTIONS: dict[Any, tuple[str, Any]] = {
    getattr(owner, name): (name, getattr(getattr(owner, name), "__code__", None))
    for owner, name in ((F, "relu"), (torch, "relu"), (F, "gelu"), (F, "silu"))
    if is_original(owner, name)
}

_PLAIN = (FunctionType, BuiltinFunctionType)

# The modules of transformers.activations.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
}


def cached_kind(cls: type) -> Kind | None:
    """What :func:`kind_of_type` has found for a class; None if it was never asked.

    Compiled code can look this up, but cannot read source. A class that is of no kind has one with
    the name "".
    """
    found = cached(cls)
    return None if found is None else found.kind


def base_of(module: nn.Module) -> type:
    """A module's class, or the one it had before the swap."""
    cls = type(module)
    base: type = cls.__dict__.get("_tridrop_base", cls)
    return base


def kind_of(module: Any) -> Kind | None:
    """A module's kind, or None. A module whose forward was replaced on the instance has none."""
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return None
    return kind_of_type(type(module))


def kind_of_type(cls: type) -> Kind | None:
    """The kind of the modules of a class; for a swapped class, of the class before the swap."""
    found = cached_kind(cls)
    if found is None or not found.holds():
        found = cache_of(cls).kind = _found(cls.__dict__.get("_tridrop_base", cls))
    return found if found.name else None


def is_unchanged(cls: type) -> bool:
    """Whether the modules of a class still are of the kind that was found; checked in each call."""
    found = cached_kind(cls)
    return found is not None and bool(found.name) and found.holds()


def _found(cls: type) -> Kind:
    original = is_original(cls, "forward")
    calls: tuple[At, ...] = ()
    read: tuple[At, ...] = (At(cls, "forward"),)
    found: Kind | None = None
    if original and cls in TYPES:
        found, names = TYPES[cls]
        calls = tuple(At(F, name) for name in names)
    elif original and cls.__module__ == "transformers.activations":
        found = Kind("activation") if cls.__name__ in _ACTIVATIONS else None
        calls = (At(F, "silu"),) if cls.__name__ == "SiLUActivation" else ()
    else:
        found, read = by_form(cls)
        calls = _CALLED.get(found.name, ()) if found is not None else ()
    if found is None or not all(is_original(*at) for at in calls):
        found = Kind("")  # also if a function of torch had been replaced before this
    return replace(found, holds=holds(*read, *calls))


def read_kinds(modules: Iterable[nn.Module]) -> None:
    """Find the kinds of all modules of a model, so that compiled code can look them up."""
    for module in modules:
        kind_of(module)


def activation_name(function: Any) -> str | None:
    """tridrop's name for an activation, which is a module or a function of one argument."""
    if not isinstance(function, nn.Module):
        named = _FUNCTIONS.get(function) if isinstance(function, _PLAIN) else None
        same = named is not None and getattr(function, "__code__", None) is named[1]
        return named[0] if named is not None and same else None
    cls = type(function)
    found = cached_kind(cls)
    if found is None or found.name != "activation" or "forward" in function.__dict__:
        return None
    if found.get(function, "inplace") or not found.holds():
        return None
    if cls is nn.ReLU:
        return "relu"
    if cls is nn.SiLU:
        return "silu"
    if cls is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    name = _ACTIVATIONS[cls.__name__]
    return name if name != "gelu" or function.act is _GELU else None


for _cls in TYPES:
    kind_of_type(_cls)
