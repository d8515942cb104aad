"""Which functions draw random numbers, as far as their names and their code tell."""

from __future__ import annotations

import dis
import functools
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.torch_private import OpOverloadPacket
from .originals import is_attention, is_dropout

# Functions of torch that drop. Those called "rate" and "attention" have a counterpart in tridrop.
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

# Names of torch's functions and of tensors' methods that draw without being a dropout.
_FUNCTIONS = ("bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like",
              "randperm", "multinomial", "normal", "poisson", "rrelu", "rrelu_")  # fmt: skip
METHODS = ("bernoulli", "bernoulli_", "uniform_", "normal_", "random_", "exponential_",
           "geometric_", "cauchy_", "log_normal_", "multinomial")  # fmt: skip
_DRAWING: dict[Any, str] = {getattr(torch, name): "draw" for name in _FUNCTIONS}
_DRAWING.update(dict.fromkeys((F.rrelu, F.rrelu_, F.gumbel_softmax), "draw"))
_NAMES = {f.__name__: name for f, name in (*DROPPING.items(), *_DRAWING.items())}
_NAMES |= dict.fromkeys(METHODS, "draw")
for _name in ("normal", "poisson", "gumbel_softmax"):  # other things have these names as well
    del _NAMES[_name]
_GRAPH = re.compile(r"aten::(\w*dropout\w*|\w*scaled_dot_product\w*|" + "|".join(
    {*_FUNCTIONS, *METHODS}) + r")\(")  # fmt: skip


def kind_of_draw(function: Any) -> str | None:
    """How a function of torch, NumPy or Python's random draws: "rate", "attention", "other" or
    "draw".

    None if it does not.
    """
    packet = getattr(function, "overloadpacket", function)
    if isinstance(packet, OpOverloadPacket):  # torch.ops.aten.native_dropout
        kind = _NAMES.get(packet.__name__)
        return "other" if kind in ("rate", "attention") else kind
    try:
        found = DROPPING.get(function) or _DRAWING.get(function)
    except TypeError:  # it cannot be hashed
        return None
    if (found == "rate" and not is_dropout(function)) or (
        found == "attention" and not is_attention(function)
    ):
        return "other"  # its code was replaced
    return found or ("draw" if generator_of(function) else None)


def generator_of(function: Any) -> str:
    """ "Python's random" or "NumPy's generator" if a function is a method of one; else empty."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, random.Random) and not isinstance(owner, random.SystemRandom):
        return "Python's random" if not function.__name__.startswith(("get", "set", "seed")) else ""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None and isinstance(owner, (numpy.RandomState, numpy.Generator)):
        name = getattr(function, "__name__", "")
        return "NumPy's generator" if name not in ("seed", "get_state", "set_state") else ""
    return ""


def found_in(function: Any, depth: int = 2) -> frozenset[str]:
    """How a function draws: by itself, or by calling what the names in its code stand for.

    The code of functions of torch (except forwards of modules) and of tridrop is not looked into;
    functions that are called are, ``depth`` calls deep.
    """
    return frozenset(_kinds(function, depth))


def _kinds(function: Any, depth: int) -> Iterator[str]:
    while isinstance(function, (functools.partial, MethodType)):
        if isinstance(function, MethodType) and generator_of(function):
            break
        function = function.func if isinstance(function, functools.partial) else function.__func__
    kind = kind_of_draw(function)
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
    if not isinstance(function, FunctionType):
        return
    forward = module.startswith("torch.nn.modules.") and function.__name__ == "forward"
    if module.startswith(("torch.", "tridrop.")) and not forward:
        return
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for root, (name, *rest), called in _chains(function.__code__):
        value: Any = None
        if root == "global":
            value = function.__globals__.get(name)
        elif root == "free":
            value = _content(cells.get(name))
        while rest and isinstance(value, ModuleType):
            value, name, rest = getattr(value, rest[0], None), rest[0], rest[1:]
        last = rest[-1] if rest else name
        if value is not None and not rest:
            if kind_of_draw(value):
                yield kind_of_draw(value) or ""
            elif depth and not isinstance(value, type):
                yield from _kinds(value, depth - 1)
        elif called and last in _NAMES:  # a method of an object that a variable holds
            yield _NAMES[last]


def _content(cell: CellType | None) -> Any:
    try:
        return None if cell is None else cell.cell_contents
    except ValueError:  # it is empty
        return None


@functools.lru_cache(4096)
def _chains(code: CodeType) -> tuple[tuple[str, list[str], bool], ...]:
    return tuple(_chains_of(code))


def _chains_of(code: CodeType) -> Iterator[tuple[str, list[str], bool]]:
    """The dotted names a.b.c in a function's code: where a is from, the names, and whether the last
    is called.

    If a is not a name but the result of an expression, the names are those after it.
    """
    chain: tuple[str, list[str]] | None = None
    called = False
    for at in dis.get_instructions(code):
        if at.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            root, names = chain or ("other", [])
            chain = root, [*names, str(at.argval)]
            bit = sys.version_info >= (3, 12) and bool((at.arg or 0) & 1)
            called = at.opname == "LOAD_METHOD" or bit
            continue
        if chain is not None and chain[1]:
            yield *chain, called
        chain, called = None, False
        if at.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = "global", [str(at.argval)]
        elif at.opname == "LOAD_DEREF":
            chain = "free", [str(at.argval)]
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _chains_of(inner)


def mentions_dropout(function: Any) -> bool:
    """Whether a function calls torch's dropout or attention, which can be intercepted."""
    return bool(found_in(function) & {"rate", "attention"})


def within(function: Any) -> str | None:
    """A call of a function in a plan: "within", "within:attention", "other", "draw" or None."""
    found = found_in(function)
    if "rate" in found:
        return "within"
    if "attention" in found:
        return "within:attention"
    return next((kind for kind in ("other", "draw") if kind in found), None)


def function_at(module: nn.Module, path: str) -> Any:
    """The function at a path of attributes of a module, or a method of a plain object."""
    owner: Any = module
    *parts, last = path.split(".")
    for part in parts:
        attributes = getattr(owner, "__dict__", {})
        owner = attributes.get(part, attributes.get("_modules", {}).get(part))
    if owner is None or isinstance(owner, (type, ModuleType)):
        return None
    attributes = getattr(owner, "__dict__", {})
    if last in attributes or owner is module or isinstance(owner, nn.Module):
        return attributes.get(last)
    return next((c.__dict__[last] for c in type(owner).__mro__ if last in c.__dict__), None)


def in_script(module: Any) -> bool:
    """Whether a module that was compiled by TorchScript draws random numbers."""
    try:
        return bool(_GRAPH.search(str(module.inlined_graph)))
    except (AttributeError, RuntimeError):  # it has no forward
        return False


def hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Those forward hooks of a module that draw random numbers."""
    every = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in every if found_in(hook)]
