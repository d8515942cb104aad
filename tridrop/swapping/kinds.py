"""What a module or a function is, to the rules: a dropout, a norm, a linear layer, an activation.

torch's own are known by their types, while these have the methods of torch's files. A library's are
known by the form of their forward, see forms.py.
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
from .forms import LAYER_NORM, by_form
from .forms import Kind as Kind
from .forms import is_dropout_add as is_dropout_add
from .memory import memory_of, recall
from .present import At, holds, is_own

_DROPOUT = Kind("dropout", {"p": "p", "inplace": "inplace"})
OTHERS = ("feature dropout", "alpha dropout")  # nothing is fused with these
_FEATURE, _ALPHA = (Kind(name, {"p": "p"}) for name in OTHERS)

# Exact types, for a subclass may do anything else; and the functions of torch.nn.functional that
# are not called where such a module is computed otherwise.
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
# The same of modules that are known by their form.
_CALLED = {"layer_norm": (At(F, "layer_norm"),), "linear": (At(torch, "addmm"),)}

# Activations that are functions, as torch has them: their names and codes.
_GELU = F.gelu if is_own(F, "gelu") else None
_FUNCTIONS: dict[Any, tuple[str, Any]] = {
    getattr(owner, name): (name, getattr(getattr(owner, name), "__code__", None))
    for owner, name in ((F, "relu"), (torch, "relu"), (F, "gelu"), (F, "silu"))
    if is_own(owner, name)
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


def known(kind: type) -> Kind | None:
    """What kind_of has found: compiled code can look a type up, but cannot read source.

    What is no kind has the name "".
    """
    found = recall(kind)
    return None if found is None else found.kind


def base_of(module: nn.Module) -> type:
    """A module's class, or the one it had before the swap."""
    kind = type(module)
    base: type = kind.__dict__.get("_tridrop_base", kind)
    return base


def kind_of(module: Any) -> Kind | None:
    """What a module is, or None. One whose forward was replaced is nothing that is known."""
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return None
    return kind_of_type(type(module))


def kind_of_type(kind: type) -> Kind | None:
    """What the modules of a class are, or of the class that it was before the swap."""
    found = known(kind)
    if found is None or not found.holds():
        found = memory_of(kind).kind = _found(kind.__dict__.get("_tridrop_base", kind))
    return found if found.name else None


def stands(kind: type) -> bool:
    """Whether the modules of a class are what they were found to be; looked at in each call."""
    found = known(kind)
    return found is not None and bool(found.name) and found.holds()


def _found(kind: type) -> Kind:
    own = is_own(kind, "forward")
    calls: tuple[At, ...] = ()
    read: tuple[At, ...] = (At(kind, "forward"),)
    found: Kind | None = None
    if own and kind in TYPES:
        found, names = TYPES[kind]
        calls = tuple(At(F, name) for name in names)
    elif own and kind.__module__ == "transformers.activations":
        found = Kind("activation") if kind.__name__ in _ACTIVATIONS else None
        calls = (At(F, "silu"),) if kind.__name__ == "SiLUActivation" else ()
    else:
        found, read = by_form(kind)
        calls = _CALLED.get(found.name, ()) if found is not None else ()
    if found is None or not all(is_own(*at) for at in calls):
        found = Kind("")  # also where a function of torch's was replaced before
    return replace(found, holds=holds(*read, *calls))


def learn(modules: Iterable[nn.Module]) -> None:
    """Know the kinds of all parts of a model."""
    for module in modules:
        kind_of(module)


def activation_name(function: Any) -> str | None:
    """The name that tridrop has for an activation, a module or a function of one argument."""
    if not isinstance(function, nn.Module):
        named = _FUNCTIONS.get(function) if isinstance(function, _PLAIN) else None
        same = named is not None and getattr(function, "__code__", None) is named[1]
        return named[0] if named is not None and same else None
    kind = type(function)
    found = known(kind)
    if found is None or found.name != "activation" or "forward" in function.__dict__:
        return None
    if found.get(function, "inplace") or not found.holds():
        return None
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    name = _ACTIVATIONS[kind.__name__]
    return name if name != "gelu" or function.act is _GELU else None


for _kind in TYPES:
    kind_of_type(_kind)
