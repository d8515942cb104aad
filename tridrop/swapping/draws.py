"""What functions draw random numbers, as far as their names and code tell."""

from __future__ import annotations

import functools
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Functions of torch that drop: "rate" and "attention" have a counterpart in tridrop.
DROPPING: dict[Any, str] = {
    F.dropout: "rate",
    torch.dropout: "rate",
    F.scaled_dot_product_attention: "attention",
    F.multi_head_attention_forward: "other",
}
_OTHERS = ("alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d")
DROPPING.update(dict.fromkeys((getattr(F, name) for name in _OTHERS), "other"))
for _name in ("dropout_", "native_dropout", "feature_dropout", "feature_dropout_", "alpha_dropout",
              "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"):  # fmt: skip
    DROPPING[getattr(torch, _name)] = "other"

# What draws and is no dropout by itself, by the names of torch's functions and methods of tensors.
_FUNCTIONS = ("bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like",
              "randperm", "multinomial", "normal", "poisson", "rrelu", "rrelu_")  # fmt: skip
METHODS = ("bernoulli", "bernoulli_", "uniform_", "normal_", "random_", "exponential_",
           "geometric_", "cauchy_", "log_normal_", "multinomial")  # fmt: skip
_DRAWING: dict[Any, str] = {getattr(torch, name): "draw" for name in _FUNCTIONS}
_DRAWING.update(dict.fromkeys((F.rrelu, F.rrelu_, F.gumbel_softmax), "draw"))
_NAMES = {f.__name__: name for f, name in (*DROPPING.items(), *_DRAWING.items())}
_NAMES |= dict.fromkeys(METHODS, "draw")
for _name in ("normal", "poisson", "gumbel_softmax"):  # names of other things as well
    del _NAMES[_name]
_GRAPH = re.compile(r"aten::(\w*dropout\w*|\w*scaled_dot_product\w*|" + "|".join(
    {*_FUNCTIONS, *METHODS}) + r")\(")  # fmt: skip


def known(function: Any) -> str | None:
    """What a function of torch, NumPy or Python's random is: its kind, or None."""
    packet = getattr(function, "overloadpacket", function)
    if isinstance(packet, torch._ops.OpOverloadPacket):  # torch.ops.aten.native_dropout
        kind = _NAMES.get(packet.__name__)
        return "other" if kind in ("rate", "attention") else kind
    try:
        found = DROPPING.get(function) or _DRAWING.get(function)
    except TypeError:  # it cannot be hashed
        return None
    return found or ("draw" if generator_of(function) else None)


def generator_of(function: Any) -> str:
    """ "Python's random" or "NumPy's generator", of a method of one; else empty."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, random.Random) and not isinstance(owner, random.SystemRandom):
        return "Python's random" if not function.__name__.startswith(("get", "set", "seed")) else ""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None and isinstance(owner, (numpy.RandomState, numpy.Generator)):
        name = getattr(function, "__name__", "")
        return "NumPy's generator" if name not in ("seed", "get_state", "set_state") else ""
    return ""


def found_in(function: Any, depth: int = 2) -> frozenset[str]:
    """The kinds of what a function draws by: of itself, or of what the names in its code stand for.

    Functions of torch (but for forwards) and of tridrop are not looked into, and of functions that a function calls only to
    ``depth``.
    """
    return frozenset(_kinds(function, depth))


def _kinds(function: Any, depth: int) -> Iterator[str]:
    while isinstance(function, (functools.partial, MethodType)):
        if isinstance(function, MethodType) and generator_of(function):
            break
        function = function.func if isinstance(function, functools.partial) else function.__func__
    kind = known(function)
    if kind is not None:
        yield kind
        return
    if isinstance(function, (type, nn.Module)) or not callable(function):
        return
    try:
        function = inspect.unwrap(function)
    except ValueError:
        return
    module = getattr(function, "__module__", None) or ""
    if not isinstance(function, FunctionType) or module.startswith(("torch.", "tridrop.")):
        if not module.startswith("torch.nn.modules.") or function.__name__ != "forward":
            return
    names = set(_names(function.__code__))
    for name in names:
        if name in _NAMES and name not in function.__globals__:
            yield _NAMES[name]
        yield from _kinds_of_value(function.__globals__.get(name), names, depth)
    for cell in function.__closure__ or ():
        try:
            yield from _kinds_of_value(cell.cell_contents, names, depth)
        except ValueError:  # the cell is empty
            continue


def _kinds_of_value(value: Any, names: set[str], depth: int) -> Iterator[str]:
    """What a name in a function stands for."""
    if isinstance(value, ModuleType):
        numpy = value.__name__ == "numpy" and "random" in names
        if value.__name__ in ("random", "numpy.random") or numpy:
            if any(callable(getattr(random, n, None)) or n in _NUMPYS for n in names):
                yield "draw"
    elif depth and callable(value) and not isinstance(value, type):
        yield from _kinds(value, depth - 1)


_NUMPYS = ("rand", "randn", "random_sample", "binomial", "normal", "permutation", "integers")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def mentions_dropout(function: Any) -> bool:
    """Whether a function calls torch's dropout or attention, so that it can be caught at that."""
    return bool(found_in(function) & {"rate", "attention"})


def within(function: Any) -> str | None:
    """What a call of a function is: "within", "within:attention", "other", "draw" or nothing."""
    found = found_in(function)
    if "rate" in found:
        return "within"
    if "attention" in found:
        return "within:attention"
    return next((kind for kind in ("other", "draw") if kind in found), None)


def held(module: nn.Module, path: str) -> Any:
    """The function under a path of attributes of a module, also a method of a plain object."""
    owner: Any = module
    *parts, last = path.split(".")
    for part in parts:
        own = getattr(owner, "__dict__", {})
        owner = own.get(part, own.get("_modules", {}).get(part))
    if owner is None or isinstance(owner, (type, ModuleType)):
        return None
    own = getattr(owner, "__dict__", {})
    if last in own or owner is module or isinstance(owner, nn.Module):
        return own.get(last)
    return next((c.__dict__[last] for c in type(owner).__mro__ if last in c.__dict__), None)


def in_script(module: Any) -> bool:
    """Whether a module that TorchScript compiled draws."""
    try:
        return bool(_GRAPH.search(str(module.inlined_graph)))
    except (AttributeError, RuntimeError):  # it has no forward
        return False


def hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks of a module that draw."""
    every = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in every if found_in(hook)]
