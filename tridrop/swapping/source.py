"""Turns a method's source into a syntax tree, and a changed tree into a function.

It does only what is needed to replace some calls: the rest of the method, its line numbers,
globals, closure, defaults and decorators stay what they were.
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
    """A function has no source, or runs something else; the message says why."""


def unwrap(function: Any) -> tuple[FunctionType, Callable[[FunctionType], FunctionType]]:
    """The innermost function under decorators, and a function that decorates another one alike.

    Decorators are not run again, since they may register things. Instead, the wrapper that each
    returned is copied, with another function in the closure cell that holds the wrapped one.
    """
    wrappers: list[FunctionType] = []
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise Unreadable("it is not a Python function")
    for wrapper, inner in pairwise([*wrappers, function]):
        if not any(_holds(cell, inner) for cell in wrapper.__closure__ or ()):
            raise Unreadable("its decorator cannot be applied to the rewritten function")

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
    """Whether the decorators of a function return its result directly and unchanged.

    This holds for a decorator that changes arguments or warns, such as transformers'
    ``deprecate_kwarg``. It does not hold if a wrapper does anything else with the result, if a
    ``with`` or ``try`` is around the call, or if a wrapper's source cannot be read.
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


# Statements inside which a call runs under other conditions than after them.
_AROUND = (ast.With, ast.AsyncWith, ast.Try, getattr(ast, "TryStar", ast.Try))


def _is_returned(node: ast.AST, names: Set[str]) -> bool:
    """Whether a statement uses functions of these names only to return their results directly and
    to read their ``__name__``."""
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

    A file may have changed since it was imported, its relative path may now find another file, and
    a patched or generated function may point at source that is not its own. So the source is
    compiled again, within its file, and used only if this gives the code that runs, except for line
    numbers.
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
    # Private names contain the name of the class, which may have been changed.
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
    """The source of a file, and the code objects that it is compiled to."""

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
        """A copy of the tree of the function that has this code; the nearest of several."""
        content = _content(code)
        nodes = self._functions.get(code.co_name, [])
        for i, node in sorted(nodes, key=lambda n: abs(_first_line(n[1]) - code.co_firstlineno)):
            # A file is compiled as a whole, but a notebook cell statement by statement. Calls of
            # imported names compile differently in the two cases.
            for imports in (True, False):
                made = self._compiled(i, code.co_flags & _FUTURES, imports)
                compiled = made.get((node.name, _first_line(node)))
                if compiled is not None and _content(compiled) == content:
                    # With the line numbers of the code, in case the source has moved in its file.
                    found: ast.FunctionDef = pickle.loads(pickle.dumps(node))  # a fast deep copy
                    return ast.increment_lineno(found, code.co_firstlineno - _first_line(node))
        return None

    def _compiled(self, i: int, flags: int, imports: bool) -> dict[tuple[str, int], CodeType]:
        """The code objects in a statement, by name and first line."""
        key = i, flags, imports
        if key not in self._codes:
            body = [*(self.imports if imports else ()), self.statements[i]]
            # Without dont_inherit the future statements of this file would apply there.
            whole = compile(ast.Module(body, []), "<source>", "exec", flags, dont_inherit=True)
            codes = {(c.co_name, c.co_firstlineno): c for c in _inside(whole)}
            self._codes[key] = codes
        return self._codes[key]


# The classes of a model come from up to some 20 files. With 4 in the cache, a swap of Wav2Vec2
# parsed them again each time: it took 120 to 460 ms, and takes 60 to 80 for 9 MiB more.
_file = functools.lru_cache(32)(_File)


def _statements(statements: list[Any], inside: bool) -> Iterator[ast.stmt]:
    """All statements, nested ones too; with ``inside``, also those in functions and classes."""
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
    """All that determines what a code object does: everything but its file and line numbers."""
    return (
        code.co_code,
        code.co_names,
        (code.co_varnames, code.co_cellvars, code.co_freevars),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        getattr(code, "co_exceptiontable", b""),  # since Python 3.11
        tuple(map(_constant, code.co_consts)),
    )


def _constant(value: Any) -> Any:
    """A constant in a form in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, CodeType):
        return _content(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return frozenset(map(_constant, value))
    return type(value), repr(value)


def _names(code: CodeType) -> tuple[Any, ...]:
    """The names in a code object and in those inside it."""
    inside = tuple(_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return code.co_names, code.co_varnames, code.co_freevars, inside


def _literal(value: Any) -> ast.expr:
    """A default value as a tree; a name that nothing has, if it is no literal."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return ast.Constant(value) if plain else ast.Name("<default>", ast.Load())


def build(function: FunctionType, node: ast.FunctionDef, names: Mapping[str, Any]) -> FunctionType:
    """A copy of ``function`` with the body of ``node``, which may also use ``names``."""
    code = _compile(function, node, tuple(names))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update((name, CellType(value)) for name, value in names.items())
    return _like(function, code, tuple(cells[name] for name in code.co_freevars))


def _compile(function: FunctionType, node: ast.FunctionDef, names: tuple[str, ...]) -> CodeType:
    """The code of ``node``. Its free variables are ``names`` and those of ``function``."""
    # Compiled inside a class, private names get their prefix; inside a function, names are free.
    module = ast.parse("def outer():\n class Owner:\n  def inner(): pass")
    outer: Any = module.body[0]
    owner: Any = outer.body[0]
    inner: Any = owner.body[0]
    outer.args.args = [ast.arg(arg=name) for name in (*function.__code__.co_freevars, *names)]
    owner.name = (function.__qualname__.split(".")[-2:-1] or ["_"])[0].strip("<>")
    if owner.name not in (*function.__code__.co_freevars, *names):
        outer.body.insert(
            0, ast.Global([owner.name])
        )  # for a method that uses the name of its class
    inner.name, inner.body = node.name, node.body
    old = node.args  # defaults and annotations belong to the function, not to its code
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
    # Without dont_inherit the future statements of this file would apply there.
    flags = function.__code__.co_flags & _FUTURES
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(3):
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code


# The flags of future statements, such as annotations; the same in co_flags and for compile().
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


def _bare(argument: ast.arg) -> ast.arg:
    return ast.copy_location(ast.arg(arg=argument.arg), argument)
