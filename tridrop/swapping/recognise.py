"""Recognises the calls in a method as ops that the rewriter can fuse or must report."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import draws, kinds
from .draws import mentions_dropout
from .flow import Flow
from .originals import is_softmax
from .rewrite import CAUGHT, Op

Labels = dict[str, str]  # path of an attribute of self -> what it is

_UNARY = {"linear", "matrix", "activation", "norm", "scale", "identity", "dropout", "drop_path"}
_NAMES = {"layer_norm": "norm", "rms_norm": "norm", "layer_scale": "scale", "softmax": "softmax"}


@dataclass
class Method:
    """A method of a class, with its source and its flow of variables."""

    name: str
    function: FunctionType
    rewrap: Callable[[FunctionType], FunctionType]
    node: ast.FunctionDef
    flow: Flow
    decorated: bool  # whether a decorator may do more with its result than return it


@dataclass
class Tail:
    """What a method hands on to a caller that takes over its end."""

    carries: bool  # whether the value contains a dropout
    in_tuple: bool  # whether it is the first element of a tuple

    def label(self) -> str:
        return f"call{':tuple' if self.in_tuple else ''}{'+drop' if self.carries else ''}"


def path_of(function: ast.expr, owner: str) -> str | None:
    """ "a.b" for an expression self.a.b."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    return ".".join(parts) if isinstance(function, ast.Name) and function.id == owner else None


def self_of(node: ast.FunctionDef) -> str:
    """The name of a method's first argument."""
    return (node.args.posonlyargs + node.args.args)[0].arg


def calls(node: ast.FunctionDef, owner: str) -> list[str]:
    paths = [path_of(n.func, owner) for n in ast.walk(node) if isinstance(n, ast.Call)]
    return [p for p in dict.fromkeys(paths) if p]


def resolve(module: Any, path: str) -> Any:
    """The object at a path of attributes, without running properties."""
    for part in path.split("."):
        attributes = getattr(module, "__dict__", {})
        module = attributes.get(part, attributes.get("_modules", {}).get(part))
    return module


def called_path(op: Op) -> str:
    """ "a.b" for an op self.a.b(...)."""
    assert isinstance(op.node, ast.Call)
    return ast.unparse(op.node.func).partition(".")[2]


def called_by(module: nn.Module, op: Op) -> Any:
    """The object that an op calls, on an instance."""
    return resolve(module, called_path(op))


def label_of(found: Any, tails: Callable[[nn.Module], Tail | None]) -> str | None:
    if not isinstance(found, nn.Module):
        if not callable(found):
            return None
        return "activation" if kinds.activation_name(found) else draws.within(found)
    kind = kinds.kind_of(found)
    if kind is not None and kind.get(found, "inplace"):
        return None
    if kind is not None and kind.name == "softmax" and kind.get(found, "dim") != -1:
        return None
    if kind is not None and kind.name == "linear" and kind.get(found, "bias") is None:
        return "matrix"  # it has no bias that a later op could add
    if kind is not None:
        return _NAMES.get(kind.name, kind.name)
    tail = tails(found)
    if tail is None:
        sized = hasattr(found, "in_features") and hasattr(found, "out_features")
        return "matrix" if sized else None
    return tail.label()


class Classifier:
    """Tells which expressions of a method are ops."""

    def __init__(self, method: Method, labels: Labels, tails: dict[str, Tail]) -> None:
        self.owner = self_of(method.node)
        imports = [n for n in ast.walk(method.node) if isinstance(n, (ast.Import, ast.ImportFrom))]
        self.imported = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}
        self.function, self.flow = method.function, method.flow
        self.labels, self.tails = labels, tails
        self.named: dict[
            str, tuple[ast.expr, Any, Any]
        ] = {}  # source -> global name, its value, the code of that

    def holds(self) -> bool:
        """Whether all names that were looked up still refer to the same functions and code."""
        return all(
            _is(self.look_up(e), value) and getattr(value, "__code__", None) is code
            for e, value, code in self.named.values()
        )

    def __call__(self, e: ast.expr) -> Op | None:
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            return Op("add", e, (e.left, e.right))
        if not isinstance(e, ast.Call):
            return None
        starred = any(isinstance(a, ast.Starred) for a in e.args)
        if starred or None in {k.arg for k in e.keywords}:
            kind = draws.kind_of_draw(self.global_of(e.func))
            if kind in ("rate", "attention"):  # its arguments are unknown: intercept the call
                return self.caught(e, _WITHIN[kind])
            if kind == "other":
                return Op("other", e, (), reason="its arguments are passed with * or **")
        if starred:  # only calls that are intercepted as they run, or reported
            op = self.of_callee(e)
            return op if op is not None and op.name in (*CAUGHT, "draw") else None
        return self.of_callee(e)

    def of_callee(self, e: ast.Call) -> Op | None:
        """The op that a call is, by what it calls."""
        path = path_of(e.func, self.owner)
        if path is not None:
            return self.of_self(e, path)
        if isinstance(e.func, ast.Name) and e.func.id in self.flow.locals:
            return self.of_local(e)
        if isinstance(e.func, ast.Subscript):
            return self.of_table(e, e.func)
        if isinstance(e.func, ast.Call):
            return self.of_made(e, e.func)
        if isinstance(e.func, ast.Attribute) and not self.is_global(e.func):
            return self.of_tensor(e, e.func)
        return self.of_function(e)

    def of_self(self, e: ast.Call, path: str) -> Op | None:
        label = self.labels.get(path, "")
        if path in self.tails:
            tail = self.tails[path]
            name = "call:tuple" if tail.in_tuple else "call"
            return Op(name, e, (), carries=tail.carries, method=path)
        if label.startswith("call"):
            name, _, drop = label.partition("+")
            return Op(name, e, (), carries=drop == "drop")
        if label in (*CAUGHT, "other", "draw"):
            return self.inside(e, label)
        if "." in path and path.rpartition(".")[2] in draws.METHODS:
            return _drawing(e)
        if label == "softmax" and len(e.args) == 1 and not e.keywords:
            return Op("softmax_of", e, (), (e.args[0],))
        if label in _UNARY and len(e.args) == 1 and not e.keywords:
            return Op(label, e, (e.args[0],))
        return None

    @staticmethod
    def caught(e: ast.Call, name: str) -> Op:
        """A call that is made as it is and intercepted as it runs; with its rate, if given."""
        rates = [k.value for k in e.keywords if k.arg in ("dropout_p", "p", "dropout")]
        return Op(name, e, (), tuple(rates[:1]))

    def inside(self, e: ast.Call, name: str | None) -> Op | None:
        """A call of a function that draws inside, by what :func:`draws.within` says of it."""
        if name in CAUGHT:
            return self.caught(e, name)
        if name == "other":
            return Op(name, e, (), reason="it calls a function that tridrop has no counterpart of")
        return _drawing(e) if name == "draw" else None

    def of_local(self, e: ast.Call) -> Op | None:
        """A call of a local variable that holds a function, an argument or a lookup."""
        assert isinstance(e.func, ast.Name)
        named = {k.arg: k.value for k in e.keywords}
        functions = [self.defined(e.func, i) for i in self.flow.reaching.get(e.func, ())]
        # An attention function that was looked up as transformers does it. Where that finds
        # nothing, the eager function, a global name, may be the default.
        if "dropout" in named and (not functions or None in functions):
            return Op("interface", e, (), (named["dropout"],))
        for function in functions:
            op = None if function is None else self.inside(e, draws.within(function))
            if op is not None:
                return op
        if "dropout_p" in named:  # as in the signature of torch's attention
            return self.caught(e, "within:attention")
        return Op("interface", e, (), (named["dropout"],)) if "dropout" in named else None

    def defined(self, name: ast.Name, definition: int) -> Any:
        """The function that one definition gives to a variable; None if it cannot be seen."""
        value = self.flow.definitions[definition].value
        if value is None:
            return self.default_of(name.id)
        if isinstance(value, ast.Call) and self.global_of(value.func) is functools.partial:
            value = value.args[0] if value.args else value
        return self.global_of(value)

    def default_of(self, name: str) -> Any:
        """The default value of a parameter."""
        code, defaults = self.function.__code__, self.function.__defaults__ or ()
        names = code.co_varnames[: code.co_argcount]
        found = dict(zip(names[::-1], defaults[::-1], strict=False))
        return {**found, **(self.function.__kwdefaults__ or {})}.get(name)

    def of_table(self, e: ast.Call, function: ast.Subscript) -> Op | None:
        """FUNCTIONS[name](x), self.functions[name](x)"""
        path = path_of(function.value, self.owner)
        label = self.labels.get(f"{path}[]")
        if label is not None:
            return self.inside(e, label)
        table = self.global_of(function.value)
        if not isinstance(table, dict) or not any(map(mentions_dropout, table.values())):
            return None
        return Op("other", e, (), reason="its function is looked up in a table")

    def of_made(self, e: ast.Call, made: ast.Call) -> Op | None:
        """nn.Softmax(dim=-1)(x)"""
        dim = _argument(made, 0, "dim")
        if self.global_of(made.func) is not nn.Softmax or not _is_last(dim) or len(e.args) != 1:
            return None
        return Op("softmax_of", e, (), (e.args[0],))

    def of_tensor(self, e: ast.Call, function: ast.Attribute) -> Op | None:
        base = function.value.id if isinstance(function.value, ast.Name) else None
        if function.attr == "dropout" and base in self.imported:
            return Op("other", e, (), reason="its module is imported in the method")
        if ast.unparse(function.value) == "super()":
            return self.inside(e, draws.within(self.above(function.attr)))
        if function.attr in draws.METHODS:
            return _drawing(e)
        if function.attr == "softmax":
            dim = _argument(e, 0, "dim")
            if _is_last(dim) and len(e.args) + len(e.keywords) == 1:
                return Op("softmax", e, (), (function.value,))
        if function.attr == "to" and len(e.args) == 1 and not e.keywords:
            wanted = e.args[0]
            if isinstance(wanted, ast.Attribute) and wanted.attr == "dtype":
                return Op("cast", e, (function.value,), (wanted,))
        return None

    def above(self, name: str) -> Any:
        """A method of a base class."""
        kind = self.global_of(ast.Name("__class__"))
        above = kind.__mro__[1:] if isinstance(kind, type) else ()
        return next((c.__dict__[name] for c in above if name in c.__dict__), None)

    def of_function(self, e: ast.Call) -> Op | None:
        called = self.global_of(e.func)
        name, keywords = draws.kind_of_draw(called), {k.arg for k in e.keywords}
        if name == "other":
            return Op(
                name,
                e,
                (),
                _rate_of(e, called),
                reason="tridrop has no counterpart of this function",
            )
        if name == "draw":
            return _drawing(e, draws.generator_of(called))
        x = _argument(e, 0, "input")
        if name == "rate" and x is not None:
            in_place = _argument(e, 3, "inplace")
            if in_place is not None and _is_constant(in_place, True):
                return Op("other", e, (), _rate_of(e, called), reason="it works in place")
            p = _argument(e, 1, "p") or ast.copy_location(ast.Constant(0.5), e)
            training = _argument(e, 2, "train" if called is torch.dropout else "training")
            training = training or ast.copy_location(ast.Constant(True), e)
            if in_place is None or _is_constant(in_place, False):
                return Op(name, e, (x,), (p, training))
            return Op(name, e, (x,), (p, training, in_place))
        softmax = name is None and called is not None and is_softmax(called)
        if softmax and x is not None and keywords <= {"input", "dim", "dtype"}:
            dim, dtype = _argument(e, 1, "dim"), _argument(e, 3, "dtype")
            if _is_last(dim) and len(e.args) <= 2:
                return Op("softmax", e, (), (x, *([dtype] if dtype is not None else [])))
        if name == "attention":
            rate = _argument(e, 4, "dropout_p")
            never = rate is None or (isinstance(rate, ast.Constant) and not rate.value)
            return None if rate is None or never else Op(name, e, (), (rate,))
        if name is None and kinds.is_dropout_add(called) and len(e.args) == 4 and not e.keywords:
            return Op("dropout_add", e, (e.args[0],), tuple(e.args[1:]))
        if name is None and kinds.activation_name(called) and len(e.args) == 1 and not e.keywords:
            return Op("activation", e, (e.args[0],))
        if name is None and isinstance(called, (FunctionType, functools.partial)):
            return self.inside(e, draws.within(called))
        return None

    def is_global(self, e: ast.expr) -> bool:
        while isinstance(e, ast.Attribute):
            e = e.value
        return isinstance(e, ast.Name) and e.id not in self.flow.locals

    def global_of(self, e: ast.expr) -> Any:
        """The object that a dotted name refers to, in the function's module or closure."""
        found = self.look_up(e)
        if callable(found):
            self.named[ast.unparse(e)] = e, found, getattr(found, "__code__", None)
        return found

    def look_up(self, e: ast.expr) -> Any:
        if isinstance(e, ast.Attribute):
            base = self.look_up(e.value)
            return getattr(base, e.attr, None) if base is not None else None
        if not isinstance(e, ast.Name) or e.id in self.flow.locals:
            return None
        free = dict(
            zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True)
        )
        if e.id in free:
            return free[e.id].cell_contents
        return self.function.__globals__.get(e.id)


def _is(value: Any, other: Any) -> bool:
    """Whether two values are the same object, or the same method of one object."""
    return value is other or (isinstance(value, MethodType) and bool(value == other))


_WITHIN = {"rate": "within", "attention": "within:attention"}


def _drawing(e: ast.Call, of: str = "") -> Op:
    """A call that draws random numbers and is no dropout."""
    return Op("draw", e, (), reason=f"it draws random numbers from {of or 'a generator'}")


def _rate_of(e: ast.Call, called: Any) -> tuple[ast.expr, ...]:
    """The rate that is passed to a function of torch, if the source shows it."""
    p = next((k.value for k in e.keywords if k.arg in ("dropout_p", "p")), None)
    if p is None and not any(isinstance(a, ast.Starred) for a in e.args):
        at = 10 if called is F.multi_head_attention_forward else 1
        p = e.args[at] if len(e.args) > at else None
    return () if p is None else (p,)


def _is_constant(e: ast.expr, value: Any) -> bool:
    return isinstance(e, ast.Constant) and e.value is value


def _is_last(dim: ast.expr | None) -> bool:
    """Whether a dimension is written as -1: only then does tridrop compute softmax and dropout."""
    return dim is not None and ast.unparse(dim) == "-1"


def _argument(e: ast.Call, position: int, name: str) -> ast.expr | None:
    if len(e.args) > position:
        return e.args[position]
    return next((k.value for k in e.keywords if k.arg == name), None)
