"""Which assignments reach which uses of a function's variables.

This is the classical analysis of reaching definitions, on Python's structured statements. Variables
that it cannot follow (read by inner functions, deleted, global) are listed in ``escaped``, and its
callers do nothing with these.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_Env = dict[str, frozenset[int]]
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Unfollowed(Exception):
    """The function has a statement that the analysis does not support."""


@dataclass(frozen=True)
class Definition:
    """One assignment to one variable."""

    name: str
    value: ast.expr | None  # None for a parameter, the variable of a loop and the like
    index: int | None = None  # the position, where a tuple is unpacked
    statement: ast.stmt | None = None


@dataclass
class Flow:
    """What :func:`analyse` found."""

    definitions: list[Definition] = field(default_factory=list)
    # for each use, its definitions
    reaching: dict[ast.Name, set[int]] = field(default_factory=dict)
    escaped: set[str] = field(default_factory=set)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    locals: set[str] = field(default_factory=set)

    def uses(self, definition: int) -> list[ast.Name]:
        """The uses that a definition reaches."""
        return [name for name, ids in self.reaching.items() if definition in ids]

    def condition(self, node: ast.AST, owner: str) -> str:
        """The tests around a node that read variables other than ``owner``, as one expression."""
        found: list[str] = []
        while node in self.parents:
            outer = self.parents[node]
            if isinstance(outer, (ast.If, ast.IfExp)) and node is not outer.test:
                names = {n.id for n in ast.walk(outer.test) if isinstance(n, ast.Name)}
                if names & (self.locals - {owner}):
                    body = outer.body if isinstance(outer.body, list) else [outer.body]
                    found.insert(0, _stated(outer.test, node in body))
            node = outer
        return " and ".join(found)


def _stated(test: ast.expr, holds: bool) -> str:
    """A test, or its negation where it does not hold, as a term of a conjunction."""
    if holds:
        return f"({ast.unparse(test)})" if isinstance(test, ast.BoolOp) else ast.unparse(test)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _stated(test.operand, True)
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
        other: ast.cmpop = ast.IsNot() if isinstance(test.ops[0], ast.Is) else ast.Is()
        if len(test.ops) == 1:
            return ast.unparse(ast.Compare(test.left, [other], test.comparators))
    return f"not ({ast.unparse(test)})"


def analyse(node: ast.FunctionDef) -> Flow:
    """The flow of a function's variables."""
    walker = _Walker()
    for parent in ast.walk(node):
        for child in ast.iter_child_nodes(parent):
            walker.flow.parents[child] = parent
    everything = node.args
    arguments = [*everything.posonlyargs, *everything.args, *everything.kwonlyargs]
    arguments += [a for a in (everything.vararg, everything.kwarg) if a is not None]
    env: _Env = {}
    for argument in arguments:
        walker.define(env, Definition(argument.arg, None))
    walker.block(node.body, env)
    return walker.flow


def _join(*envs: _Env | None) -> _Env | None:
    live = [env for env in envs if env is not None]
    if not live:
        return None
    names = set().union(*live)
    return {n: frozenset().union(*(env.get(n, frozenset()) for env in live)) for n in names}


class _Walker:
    """Walks the statements with an environment: the definitions of each variable that reach here.

    None instead of an environment means that a place is never reached.
    """

    def __init__(self) -> None:
        self.flow = Flow()
        self.numbers: dict[tuple[ast.AST | None, str], int] = {}
        self.loops: list[tuple[list[_Env], list[_Env]]] = []  # environments of break, of continue

    def define(self, env: _Env, definition: Definition, key: ast.AST | None = None) -> None:
        number = self.numbers.get((key, definition.name))
        if number is None:  # a loop's body is walked more than once
            number = self.numbers[key, definition.name] = len(self.flow.definitions)
            self.flow.definitions.append(definition)
        self.flow.locals.add(definition.name)
        env[definition.name] = frozenset([number])

    def read(self, expression: ast.expr | None, env: _Env) -> None:
        if expression is None:
            return
        if isinstance(expression, _SCOPES):
            self.escape(expression)
            return
        if isinstance(expression, ast.NamedExpr):
            self.read(expression.value, env)
            self.define(env, Definition(expression.target.id, None), expression)
            self.flow.escaped.add(expression.target.id)
            return
        if isinstance(expression, ast.Name) and isinstance(expression.ctx, ast.Load):
            reached = self.flow.reaching.setdefault(expression, set())
            reached |= env.get(expression.id, frozenset())
            if expression.id in ("locals", "vars", "eval", "exec"):
                raise Unfollowed
            return
        for child in ast.iter_child_nodes(expression):
            if isinstance(child, ast.expr):
                self.read(child, env)
            elif isinstance(child, ast.keyword):
                self.read(child.value, env)
            elif not isinstance(child, (ast.expr_context, ast.operator, ast.unaryop, ast.boolop)):
                for inner in ast.walk(child):
                    if isinstance(inner, ast.Name):
                        self.read(inner, env)

    def escape(self, node: ast.AST) -> None:
        """Note the variables of this scope that an inner scope uses."""
        bound = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        if not isinstance(node, ast.Delete):
            bound |= _assigned([node])
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        self.flow.escaped |= names - bound

    def store(self, target: ast.expr, env: _Env, value: ast.expr | None, at: ast.stmt) -> None:
        if isinstance(target, ast.Name):
            self.define(env, Definition(target.id, value, None, at), target)
        elif isinstance(target, (ast.Tuple, ast.List)):
            starred = any(isinstance(t, ast.Starred) for t in target.elts)
            for i, element in enumerate(target.elts):
                inner = element.value if isinstance(element, ast.Starred) else element
                if isinstance(inner, ast.Name):
                    source = None if starred else value
                    self.define(env, Definition(inner.id, source, i, at), inner)
                else:
                    self.store(inner, env, None, at)
        else:
            self.read(target, env)  # an attribute or an element of something

    def block(self, body: Sequence[ast.stmt], env: _Env | None) -> _Env | None:
        for statement in body:
            if env is None:
                return None
            env = self.statement(statement, dict(env))
        return env

    def statement(self, s: ast.stmt, env: _Env) -> _Env | None:
        if isinstance(s, ast.Assign):
            self.read(s.value, env)
            for target in s.targets:
                self.store(target, env, s.value if len(s.targets) == 1 else None, s)
        elif isinstance(s, ast.AnnAssign):
            self.read(s.value, env)
            if s.value is not None:
                self.store(s.target, env, s.value, s)
        elif isinstance(s, ast.AugAssign):
            self.read(s.value, env)
            if isinstance(s.target, ast.Name):
                reached = self.flow.reaching.setdefault(s.target, set())
                reached |= env.get(s.target.id, frozenset())
                self.define(env, Definition(s.target.id, None, None, s), s)
            else:
                self.read(s.target, env)
        elif isinstance(s, (ast.Return, ast.Expr)):
            self.read(s.value, env)
            return None if isinstance(s, ast.Return) else env
        elif isinstance(s, ast.Raise):
            self.read(s.exc, env)
            self.read(s.cause, env)
            return None
        elif isinstance(s, ast.Assert):
            self.read(s.test, env)
            self.read(s.msg, env)
        elif isinstance(s, ast.If):
            self.read(s.test, env)
            return _join(self.block(s.body, env), self.block(s.orelse, env))
        elif isinstance(s, (ast.For, ast.While)):
            return self.loop(s, env)
        elif isinstance(s, ast.With):
            for item in s.items:
                self.read(item.context_expr, env)
                if item.optional_vars is not None:
                    self.store(item.optional_vars, env, None, s)
            return self.block(s.body, env)
        elif isinstance(s, ast.Try):
            return self.attempt(s, env)
        elif isinstance(s, (ast.Break, ast.Continue)):
            self.loops[-1][isinstance(s, ast.Continue)].append(env)
            return None
        elif isinstance(s, (ast.Import, ast.ImportFrom)):
            for alias in s.names:
                self.define(env, Definition((alias.asname or alias.name).split(".")[0], None), s)
        elif isinstance(s, (ast.FunctionDef, ast.ClassDef, ast.Delete, ast.Global, ast.Nonlocal)):
            self.escape(s)
            if isinstance(s, (ast.Global, ast.Nonlocal)):
                self.flow.escaped |= set(s.names)
            elif not isinstance(s, ast.Delete):
                self.define(env, Definition(s.name, None), s)
        elif not isinstance(s, ast.Pass):
            raise Unfollowed
        return env

    def loop(self, s: ast.For | ast.While, env: _Env) -> _Env | None:
        if isinstance(s, ast.For):
            self.read(s.iter, env)
        head: _Env = env
        while True:
            self.loops.append(([], []))
            if isinstance(s, ast.While):
                self.read(s.test, head)
            inside = dict(head)
            if isinstance(s, ast.For):
                self.store(s.target, inside, None, s)
            end = self.block(s.body, inside)
            breaks, continues = self.loops.pop()
            after = _join(head, end, *continues)
            assert after is not None
            if after == head:
                return _join(self.block(s.orelse, head), *breaks)
            head = after

    def attempt(self, s: ast.Try, env: _Env) -> _Env | None:
        """In a handler, each assignment of the body may or may not have happened."""
        start = len(self.flow.definitions)
        end = self.block(s.body, env)
        assigned = _assigned(s.body)
        raised = dict(env)
        for i, definition in enumerate(self.flow.definitions):
            if definition.name in assigned and (i >= start or env.get(definition.name)):
                raised[definition.name] = raised.get(definition.name, frozenset()) | {i}
        if end is not None:
            end = self.block(s.orelse, end)
        ends = [end]
        for handler in s.handlers:
            inside = dict(raised)
            self.read(handler.type, inside)
            if handler.name:
                self.define(inside, Definition(handler.name, None), handler)
            ends.append(self.block(handler.body, inside))
        after = _join(*ends)
        if not s.finalbody:
            return after
        final = self.block(s.finalbody, _join(after, raised))
        return None if after is None else final


def _assigned(body: Iterable[ast.AST]) -> set[str]:
    return {
        n.id
        for s in body
        for n in ast.walk(s)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
