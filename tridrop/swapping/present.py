"""Whether the functions that were read are still those that run.

A class is read once, and what was made of its text, or instead of calling it, is kept by class. But
a class can be given another method at any time, a module another function, and a function another
code. So whatever is kept knows the functions it was read from: each as an attribute of its owner,
with its code and defaults. At a call they are compared by identity, a few loads; where one is not
what it was, the present one is called.
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
    """A function as an attribute of a class or module, or under a name in a mapping."""

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
    """A function that says whether what stands at these places now still stands there."""
    terms, names = _terms(places)
    made: Holds = _define(f"lambda: {' and '.join(terms) or True}", names)
    return made


def guarded(place: At, new: Any, also: tuple[At, ...] = ()) -> Callable[..., Any]:
    """A method that is ``new`` while what it was made of stands at ``place``, else the present one.

    Every one has a code of its own, by which torch.compile counts how often it compiled a function.
    Where all arguments must be given they are handed on by name, which is quicker.
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
    """Comparisons as text, and the values of the names in it."""
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
            if isinstance(place.owner, type):  # torch's modules give its functions every argument
                # To Dynamo defaults are another tuple each time.
                defaults, compiling = name_of(function.__defaults__), name_of(is_compiling)
                terms.append(f"({wanted}.__defaults__ is {defaults} or {compiling}())")
            function = function.__dict__.get("__wrapped__")
            if isinstance(function, FunctionType):
                inner = name_of(function)
                terms.append(f"{wanted}.__wrapped__ is {inner}")
                wanted = inner
    return terms, names


def _define(expression: str, names: dict[str, Any]) -> Any:
    """The value of an expression in which ``names`` are variables of a function around it."""
    code = compile(f"lambda {', '.join(names)}: {expression}", __file__, "eval")
    return eval(code, {"__name__": __name__})(**names)


def is_own(owner: Any, name: str) -> bool:
    """Whether a class or module has under a name what its own file puts there.

    Of a class that is a function which was defined in its text, or in that of the base class which
    it comes from; a builtin function of a module is taken for its own.
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
