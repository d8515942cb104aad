"""A method's text as a syntax tree, and a changed tree as a function again.

Only what is needed to put other calls in the place of some: the rest of the method, its line
numbers, globals, closure, defaults and decorators stay what they were.
"""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
from collections.abc import Callable, Mapping, Set
from itertools import pairwise
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any


class Unreadable(Exception):
    """The text of a function cannot be had, or is not what runs; the message says why."""


def unwrap(function: Any) -> tuple[FunctionType, Callable[[FunctionType], FunctionType]]:
    """The innermost function under decorators, and what puts the same decorators around another.

    A decorator is not run again, since it may register things: its wrapper is copied, with the
    closure's cell that holds the wrapped function exchanged.
    """
    wrappers: list[FunctionType] = []
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise Unreadable("it is not a Python function")
    for wrapper, inner in pairwise([*wrappers, function]):
        if not any(_holds(cell, inner) for cell in wrapper.__closure__ or ()):
            raise Unreadable("its decorator cannot be put around another function")

    def rewrap(new: FunctionType) -> FunctionType:
        inner = function
        for wrapper in reversed(wrappers):
            cells = tuple(
                CellType(new) if _holds(cell, inner) else cell for cell in wrapper.__closure__ or ()
            )
            new = _like(wrapper, wrapper.__code__, cells, wrapped=new)
            inner = wrapper
        return new

    return function, rewrap


def hands_on(function: Any) -> bool:
    """Whether the decorators of a function return what it returns, as it is and where it is.

    Such a decorator changes arguments or warns, as transformers' ``deprecate_kwarg`` does: what the
    function hands to its caller is then the function's own. Whatever else is done with the result,
    a ``with`` or a ``try`` around the call, or a text that cannot be read: no.
    """
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        wrapper, function = function, function.__wrapped__
        try:
            node = parse(wrapper)
        except Unreadable:
            return False
        cells = zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
        names = {name for name, cell in cells if _holds(cell, function)}
        if not all(_is_returned(statement, names) for statement in node.body):
            return False
    return isinstance(function, FunctionType)


# Statements in which a call runs otherwise than behind them.
_AROUND = (ast.With, ast.AsyncWith, ast.Try, getattr(ast, "TryStar", ast.Try))


def _is_returned(node: ast.AST, names: Set[str]) -> bool:
    """Whether a statement does nothing with functions of these names but return their results and
    read what they are called."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        called = node.value
        if isinstance(called.func, ast.Name) and called.func.id in names:
            inner = [*called.args, *(keyword.value for keyword in called.keywords)]
            return all(_is_returned(argument, names) for argument in inner)
    if isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__"):
        return True
    if isinstance(node, ast.Name):
        return node.id not in names
    if isinstance(node, (*_AROUND, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return not any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))
    if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await)):
        return False
    return all(_is_returned(child, names) for child in ast.iter_child_nodes(node))


def _holds(cell: CellType, content: Any) -> bool:
    try:
        return cell.cell_contents is content
    except ValueError:  # the cell is empty
        return False


def _like(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...], wrapped: Any = None
) -> FunctionType:
    new = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__doc__, new.__module__ = function.__doc__, function.__module__
    new.__qualname__, new.__annotations__ = function.__qualname__, function.__annotations__
    new.__dict__.update(function.__dict__)
    if wrapped is not None:
        new.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return new


def parse(function: FunctionType) -> ast.FunctionDef:
    """The tree of a function, with the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(function.__code__)  # a wrapper's own, too
        # Under an "if" indented text parses as it stands, and keeps its columns.
        tree = ast.parse("if 1:\n" + "".join(lines) if lines[0][0].isspace() else "".join(lines))
        indented = isinstance(tree.body[0], ast.If)
    except (OSError, TypeError, SyntaxError, IndexError):
        raise Unreadable("its source cannot be read") from None
    node = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(node, ast.FunctionDef) or node.name != function.__code__.co_name:
        raise Unreadable("its source is not that of a method")
    ast.increment_lineno(node, first - (2 if indented else 1))
    # A patched or generated function may point at a text that is not its own.
    if _content(_compile(function, node, ())) != _content(function.__code__):
        raise Unreadable("its source is not what runs")
    return node


def _content(code: CodeType) -> tuple[Any, ...]:
    """What a code says, apart from how a method is called, which depends on its file's imports."""
    constants = [
        _content(c) if isinstance(c, CodeType) else (type(c), repr(c)) for c in code.co_consts
    ]
    steps = [step for i in dis.get_instructions(code) if (step := _step(i)) is not None]
    return code.co_names, code.co_varnames, code.co_freevars, constants, steps


_JUMPS = {*dis.hasjrel, *dis.hasjabs}


def _step(at: dis.Instruction) -> tuple[str, Any] | None:
    """An instruction, without where it jumps to."""
    name = "LOAD_ATTR" if at.opname == "LOAD_METHOD" else at.opname
    if name.startswith("CALL") or name in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG"):
        return None
    if at.opcode in _JUMPS:
        return name, None
    return name, at.argval if isinstance(at.argval, str) else at.arg


def build(function: FunctionType, node: ast.FunctionDef, names: Mapping[str, Any]) -> FunctionType:
    """``function`` with the tree ``node``, in which ``names`` can be used as well."""
    code = _compile(function, node, tuple(names))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update((name, CellType(value)) for name, value in names.items())
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def _compile(function: FunctionType, node: ast.FunctionDef, names: tuple[str, ...]) -> CodeType:
    """The code of ``node``, with ``names`` and what was free in ``function`` as free variables."""
    # The class gives private names their prefix, the function around it makes the names free.
    module = ast.parse("def outer():\n class Owner:\n  def inner(): pass")
    outer: Any = module.body[0]
    owner: Any = outer.body[0]
    inner: Any = owner.body[0]
    outer.args.args = [ast.arg(arg=name) for name in (*function.__code__.co_freevars, *names)]
    owner.name = (function.__qualname__.split(".")[-2:-1] or ["_"])[0].strip("<>")
    inner.name, inner.body = node.name, node.body
    old = node.args  # defaults and annotations are the function's, not the code's
    inner.args = ast.arguments(
        posonlyargs=[_bare(a) for a in old.posonlyargs],
        args=[_bare(a) for a in old.args],
        vararg=_bare(old.vararg) if old.vararg else None,
        kwonlyargs=[_bare(a) for a in old.kwonlyargs],
        kw_defaults=[None] * len(old.kwonlyargs),
        kwarg=_bare(old.kwarg) if old.kwarg else None,
        defaults=[],
    )
    for new in (inner, owner, outer):
        ast.copy_location(new, node)
    # A call of what a file has imported is compiled otherwise, where it has many arguments.
    known = function.__globals__
    modules = [
        name for name in _names(function.__code__) if isinstance(known.get(name), ModuleType)
    ]
    module.body[:0] = [ast.Import(names=[ast.alias(name=name)]) for name in modules]
    ast.fix_missing_locations(module)
    # Without dont_inherit this file's own future statements would hold there.
    flags = function.__code__.co_flags & _FUTURES
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(3):
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


def _names(code: CodeType) -> set[str]:
    """The global names of a code and of those inside it."""
    inside = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inside)


# Flags of "from __future__ import annotations" and its like, in co_flags as in compile().
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


def _bare(argument: ast.arg) -> ast.arg:
    return ast.copy_location(ast.arg(arg=argument.arg), argument)
