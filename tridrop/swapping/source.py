"""A method's text as a syntax tree, and a changed tree as a function again.

Only what is needed to put other calls in the place of some: the rest of the method, its line
numbers, globals, closure, defaults and decorators stay what they were.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
import pickle
from collections.abc import Callable, Iterator, Mapping, Set
from itertools import pairwise
from types import CellType, CodeType, FunctionType
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
    """The tree of a function, with the code's line numbers and the function's own defaults.

    A file may have changed since it was imported, a relative name may find another file of that
    name in the working folder, and a patched or generated function may point at a text that is not
    its own. So the text is compiled again, in its place in the file, and taken only where that
    gives the code that runs, but for line numbers.
    """
    code = function.__code__
    if not code.co_name.isidentifier() or code.co_flags & inspect.CO_COROUTINE:
        raise Unreadable("its source is not that of a method")
    try:
        file = _file(_text(function))
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        raise Unreadable("its source cannot be read") from None
    node = file.tree_of(code)
    if node is None:
        raise Unreadable("its source is not what runs")
    node.args.defaults = [_literal(value) for value in function.__defaults__ or ()]
    given = function.__kwdefaults__ or {}
    node.args.kw_defaults = [
        _literal(given[a.arg]) if a.arg in given else None for a in node.args.kwonlyargs
    ]
    # By the name of its class, which may have been changed, private names are made.
    if _names(_compile(function, node, ())) != _names(code):
        raise Unreadable("its source is not what runs")
    return node


def _text(function: FunctionType) -> str:
    name = inspect.getsourcefile(function) or inspect.getfile(function)
    linecache.checkcache(name)
    lines = linecache.getlines(name, function.__globals__)
    if not lines:
        raise OSError(name)
    return "".join(lines)


class _File:
    """A text, and the codes that it is compiled to."""

    def __init__(self, text: str) -> None:
        self.statements = ast.parse(text).body
        self.imports = [n for n in _statements(self.statements, inside=False) if _is_import(n)]
        self._functions: dict[str, list[tuple[int, ast.FunctionDef]]] = {}
        for i, statement in enumerate(self.statements):
            for n in _statements([statement], inside=True):
                if isinstance(n, ast.FunctionDef):
                    self._functions.setdefault(n.name, []).append((i, n))
        self._codes: dict[tuple[int, int, bool], dict[tuple[str, int], CodeType]] = {}

    def tree_of(self, code: CodeType) -> ast.FunctionDef | None:
        """A copy of the tree of the function that has this code; of several the nearest."""
        content = _content(code)
        nodes = self._functions.get(code.co_name, [])
        for i, node in sorted(nodes, key=lambda n: abs(_first_line(n[1]) - code.co_firstlineno)):
            # A file is compiled as a whole, a cell of a notebook statement by statement: calls of
            # what is imported there are not the same.
            for imports in (True, False):
                made = self._compiled(i, code.co_flags & _FUTURES, imports)
                own = made.get((node.name, _first_line(node)))
                if own is not None and _content(own) == content:
                    # To the lines that frames of this code name, if the text has moved since.
                    found: ast.FunctionDef = pickle.loads(pickle.dumps(node))  # a copy, quickly
                    return ast.increment_lineno(found, code.co_firstlineno - _first_line(node))
        return None

    def _compiled(self, i: int, flags: int, imports: bool) -> dict[tuple[str, int], CodeType]:
        """The codes in a statement, by name and first line."""
        key = i, flags, imports
        if key not in self._codes:
            body = [*(self.imports if imports else ()), self.statements[i]]
            # Without dont_inherit this file's own future statements would hold there.
            whole = compile(ast.Module(body, []), "<source>", "exec", flags, dont_inherit=True)
            codes = {(c.co_name, c.co_firstlineno): c for c in _inside(whole)}
            self._codes[key] = codes
        return self._codes[key]


_file = functools.lru_cache(4)(_File)  # a model's classes are mostly of a few files


def _statements(statements: list[Any], inside: bool) -> Iterator[ast.stmt]:
    """The statements and those in them; ``inside`` functions and classes as well, or not."""
    for statement in statements:
        yield statement
        if inside or not isinstance(
            statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):
            for part in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from _statements(getattr(statement, part, []), inside)


def _is_import(statement: ast.stmt) -> bool:
    future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
    return isinstance(statement, (ast.Import, ast.ImportFrom)) and not future


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _inside(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inside(constant)


def _content(code: CodeType) -> tuple[Any, ...]:
    """All that a code does: everything but its place, and the lines of its instructions."""
    return (
        code.co_code,
        code.co_names,
        (code.co_varnames, code.co_cellvars, code.co_freevars),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        getattr(code, "co_exceptiontable", b""),  # since Python 3.11
        tuple(map(_constant, code.co_consts)),
    )


def _constant(value: Any) -> Any:
    """A constant, so that 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, CodeType):
        return _content(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return frozenset(map(_constant, value))
    return type(value), repr(value)


def _names(code: CodeType) -> tuple[Any, ...]:
    """The names in a code and in those inside it."""
    inside = tuple(_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return code.co_names, code.co_varnames, code.co_freevars, inside


def _literal(value: Any) -> ast.expr:
    """A default as a tree; of what is no literal, a name that nothing has."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return ast.Constant(value) if plain else ast.Name("<default>", ast.Load())


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
    if owner.name not in (*function.__code__.co_freevars, *names):
        outer.body.insert(0, ast.Global([owner.name]))  # as for a method that names its class
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
    ast.fix_missing_locations(module)
    # Without dont_inherit this file's own future statements would hold there.
    flags = function.__code__.co_flags & _FUTURES
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(3):
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


# Flags of "from __future__ import annotations" and its like, in co_flags as in compile().
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


def _bare(argument: ast.arg) -> ast.arg:
    return ast.copy_location(ast.arg(arg=argument.arg), argument)
