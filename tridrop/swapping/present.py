"""Checks whether the functions that were read are still those that run.

A class is read once, and what is made from its source is cached per class. But a method of a class
or a function of a module can be replaced at any time, and so can a function's code. So the cache
remembers the functions that were read: each as an attribute of its owner, with its code and its
defaults. Each call compares them by identity, which takes a few loads; if one has changed, the
present function is called instead.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch.compiler import is_compiling

Holds = Callable[[], bool]
_MISSING = object()


class At(NamedTuple):
    """The place of a function: an attribute of a class or module, or a key of a mapping."""

    owner: Any
    name: str

    def now(self) -> Any:
        if isinstance(self.owner, Mapping):
            return self.owner.get(self.name, _MISSING)
        return getattr(self.owner, self.name, _MISSING)

    def is_missing(self) -> bool:
        return self.now() is _MISSING


def is_function(value: Any) -> bool:
    return isinstance(value, FunctionType)


def holds(*places: At) -> Holds:
    """A function that tells later whether these places still have the functions they have now."""
    terms, names = _terms(places)
    made: Holds = _define(f"lambda: {' and '.join(terms) or True}", names)
    return made


def guarded(place: At, new: Any, also: tuple[At, ...] = ()) -> Callable[..., Any]:
    """A method that calls ``new`` as long as ``place`` has the function that ``new`` was made from.

    Otherwise it calls the present function at ``place``. Each such method has its own code object,
    since torch.compile counts compilations per code object. If all arguments are required, they are
    passed by name, which is faster than ``*args``.
    """
    terms, names = _terms((place, *also))
    code: CodeType = new.__code__
    optional = new.__defaults__ or code.co_kwonlyargcount or code.co_posonlyargcount
    if optional or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        takes = "self, *args, **kwargs"
    else:
        takes = ", ".join(code.co_varnames[: code.co_argcount])
    names |= {"_t_new": new, "_t_owner": place.owner}
    chosen = f"_t_new if {' and '.join(terms)} else _t_owner.{place.name}"
    made: Any = _define(f"lambda {takes}: ({chosen})({takes})", names)
    return functools.wraps(new)(made)


def _terms(places: tuple[At, ...]) -> tuple[list[str], dict[str, Any]]:
    """Comparisons as source, and the values of the names in it."""
    terms: list[str] = []
    names: dict[str, Any] = {}

    def name_of(value: Any) -> str:
        name = f"_t{len(names)}"
        names[name] = value
        return name

    for place in places:
        function, owner = place.now(), name_of(place.owner)
        if isinstance(place.owner, Mapping):
            left = f"{owner}.get({place.name!r})"
        elif function is _MISSING:
            terms.append(f"not hasattr({owner}, {place.name!r})")
            continue
        else:
            left = f"{owner}.{place.name}"
        function = None if function is _MISSING else function
        wanted = name_of(function)
        terms.append(f"{left} is {wanted}")
        while isinstance(function, FunctionType):
            code = name_of(function.__code__)
            terms.append(f"{wanted}.__code__ is {code}")
            if isinstance(place.owner, type):  # for a function, torch's modules pass every argument
                # While Dynamo traces, __defaults__ is another tuple each time.
                defaults, compiling = name_of(function.__defaults__), name_of(is_compiling)
                terms.append(f"({wanted}.__defaults__ is {defaults} or {compiling}())")
            function = function.__dict__.get("__wrapped__")
            if isinstance(function, FunctionType):
                inner = name_of(function)
                terms.append(f"{wanted}.__wrapped__ is {inner}")
                wanted = inner
    return terms, names


def _define(expression: str, names: dict[str, Any]) -> Any:
    """The value of an expression in which ``names`` are free variables."""
    code = compile(f"lambda {', '.join(names)}: {expression}", __file__, "eval")
    return eval(code, {"__name__": __name__})(**names)


def is_original(owner: Any, name: str) -> bool:
    """Whether an attribute of a class or module is the one that its own file defines.

    For a class it must be a function that was defined in the body of the class, or of the base
    class that it is inherited from. A builtin function of a module counts as original.
    """
    home = owner
    if isinstance(owner, type):
        home = next((c for c in owner.__mro__ if name in c.__dict__), None)
        if home is None:
            return False
    function = home.__dict__.get(name)
    if isinstance(function, staticmethod):
        function = function.__func__
    if isinstance(function, BuiltinFunctionType):
        return isinstance(home, ModuleType)
    if not isinstance(function, FunctionType):
        return False
    module = home.__name__ if isinstance(home, ModuleType) else home.__module__
    globals_ = getattr(sys.modules.get(module), "__dict__", None)
    code = function.__code__
    if function.__globals__ is not globals_ or function.__module__ != module:
        return False
    prefix = "" if isinstance(home, ModuleType) else f"{home.__qualname__}."
    stem = PurePath(code.co_filename).stem
    file = module.rpartition(".")[2]
    return function.__qualname__ == f"{prefix}{code.co_name}" and stem in (file, "__init__")
