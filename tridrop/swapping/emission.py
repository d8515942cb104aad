"""Writes the new tree of a planned method, with calls of lazy.py in place of the planned ones."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from typing import Any

from .recognise import self_of
from .rewrite import COMPUTED, DROPS, Op, Plan


def emit(made: Plan, first: int) -> ast.FunctionDef:
    """The new tree of a method; its places are numbered from ``first``."""
    node = copy.deepcopy(made.node)
    pairs = zip(ast.walk(made.node), ast.walk(node), strict=True)
    emitter = _Emitter(made, first, {new: old for old, new in pairs})
    for statement in node.body:
        emitter.visit(statement)
    return ast.fix_missing_locations(node)


class _Emitter(ast.NodeTransformer):
    """Changes a copy of the tree, and looks up the original nodes in the plan."""

    def __init__(self, made: Plan, first: int, old_of: Mapping[ast.AST, ast.AST]) -> None:
        self.made, self.old_of = made, old_of
        self.places = {place.op: first + i for i, place in enumerate(made.places)}
        self.owner = self_of(made.node)

    def runtime(self, at: ast.expr, name: str, *arguments: ast.expr) -> ast.Call:
        function = ast.Attribute(ast.Name("_tridrop", ast.Load()), name, ast.Load())
        new = ast.copy_location(ast.Call(function, list(arguments), []), at)
        for inner in (function, function.value):
            ast.copy_location(inner, at)
        return new

    def visit(self, node: ast.AST) -> ast.AST:
        old = self.old_of.get(node)
        if not isinstance(old, ast.expr) or not isinstance(node, ast.expr):
            return self.generic_visit(node)
        op = self.made.ops.get(old)
        if op is not None and op in self.made.emitted:
            if op in self.made.alone:
                return self.alone(op, node)
            new = self.exchange(op, node)
            waits = bool(self.made.out_of(op)) or (op.name == "norm" and not self.made.into(op))
            if op.name.startswith("call") or (op.name in COMPUTED and not waits):
                return new
            return new if waits else self.runtime(node, "value", new)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            return self.use(old, node)
        return self.generic_visit(node)

    def use(self, old: ast.expr, node: ast.Name) -> ast.expr:
        """A use of a variable that may hold a pending value: computed, unless the user waits."""
        assert isinstance(old, ast.Name)
        flow = self.made.flow
        if not flow.reaching.get(old, set()) & self.made.waiting:
            return node
        parent = flow.parents[old]
        user = self.made.ops.get(parent) if isinstance(parent, ast.expr) else None
        takes = user is not None and user in self.made.emitted and old in user.operands
        is_copy = any(flow.definitions[i].value is old for i in self.made.waiting)
        return node if takes or is_copy else self.runtime(node, "value", node)

    def alone(self, op: Op, node: Any) -> ast.expr:
        """The call that replaces an op without a dropout near."""
        new_of = {self.old_of[n]: n for n in ast.walk(node) if n in self.old_of}
        operands: list[Any] = [self.visit(new_of[x]) for x in op.operands]
        called = [] if op.name == "product" else [node.func]
        kind = "remade" if self.made.memory else "one"
        return self.runtime(node, f"{kind}_{op.name}", *called, *operands)

    def exchange(self, op: Op, node: Any) -> ast.expr:
        """The call of lazy.py that replaces an op."""
        new_of = {self.old_of[n]: n for n in ast.walk(node) if n in self.old_of}
        operands: list[Any] = [self.visit(new_of[x]) for x in op.operands]
        # Arguments that the call omits are in op.rest as new nodes, and used as they are.
        rest: list[Any] = [self.visit(new_of[x]) if x in new_of else x for x in op.rest]
        name = op.name.partition(":")[0]
        if name == "add":
            return self.runtime(node, name, *operands)
        if name == "call":
            self.generic_visit(node)
            module = node.func
            if op.method != "forward":
                assert isinstance(module, ast.Attribute)
                module = module.value
            new = self.runtime(node, name, module, ast.Constant(op.method), *node.args)
            new.keywords = node.keywords
            return new
        place = [ast.Name(self.owner, ast.Load()), ast.Constant(self.places.get(op, -1))]
        if name in ("attention", "within"):
            self.generic_visit(node)
            new = self.runtime(node, name, *place, node.func, *node.args)
            new.keywords = node.keywords
            return new
        # The function is passed by its name in the source: it may be replaced by the time it runs.
        if name in ("rate", "dropout_add"):
            return self.runtime(node, name, *place, node.func, *operands, *rest)
        if name == "softmax":
            called: Any = op.node
            method = getattr(called.func, "value", None) is op.rest[0]
            function = ast.Constant(None) if method else node.func
            return self.runtime(node, name, function, *rest)
        if name == "softmax_of":
            return self.runtime(node, name, node.func, *rest)
        if name == "cast":
            return self.runtime(node, name, *operands, *rest)
        arguments = [node.func, *operands]
        if name in DROPS:
            return self.runtime(node, name, *place, *arguments)
        if name == "norm":
            into = self.made.into(op)
            if not into:
                return self.runtime(node, "norm_first", *arguments)
            arguments.append(ast.Constant(not any(e.shared for e in into)))
        if name in ("norm", "activation") and self.made.memory:
            arguments.append(ast.Constant(True))
        return self.runtime(node, name, *arguments)
