"""LoRA layers of PEFT: the branch of an adapter as one op, and the rest of their forward as it is.

Whatever a layer's base is quantised with, its forward in PEFT has the same few lines for an
adapter: its parts are taken by name,

    lora_A, lora_B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

the input is cast, and ``lora_B(lora_A(dropout(x)))`` is added with a factor. Exactly these
expressions are exchanged here, in the text of the forward, for calls of branches.py. So everything
else stays PEFT's: disabled, merged and mixed adapters, the casts and copies of results. A class of
any library version in whose text they are not found is not touched.
"""

from __future__ import annotations

import ast
import copy
import sys
from types import FunctionType
from typing import Any, NamedTuple

from . import branches, source
from .kinds import base_of
from .memory import memory_of
from .present import At, holds, is_own


def is_lora(kind: type) -> bool:
    """Whether a class is a layer of PEFT's that may have LoRA adapters."""
    return any(c.__name__ == "LoraLayer" and c.__module__.startswith("peft.") for c in kind.__mro__)


class Rewritten(NamedTuple):
    """A forward with its adapters' branches exchanged, its text, and whether it adds them."""

    forward: FunctionType
    text: ast.FunctionDef
    adds: bool


def rewritten(kind: type) -> Rewritten | None:
    """The new forward of a class; None where it has no adapters, or its text cannot be read."""
    if not is_lora(kind):
        return None
    variants = sys.modules.get("peft.tuners.lora.variants")
    for name, value in vars(variants).items() if variants is not None else ():
        if name.endswith("LinearVariant"):
            _learn(value)
    memory = memory_of(kind)
    if memory.rewritten is None or not memory.rewritten[0]():
        casts = is_own(kind, "_cast_input_dtype")
        read = holds(At(kind, "forward"), At(kind, "_cast_input_dtype"))
        memory.rewritten = read, _rewrite(kind.forward, casts)  # type: ignore[attr-defined]
    return memory.rewritten[1]


def _learn(variant: Any) -> None:
    """Read the forward of a variant, unless it is known. DoRA is known by its class's name."""
    known = branches.VARIANTS.get(variant)
    if known is not None and known.holds():
        return
    new, read = _rewrite(variant.forward), holds(At(variant, "forward"))
    if new is not None:
        branches.VARIANTS[variant] = branches.Variant(new.forward, read)
    elif variant.__name__ == branches.DORA and is_own(variant, "forward"):
        branches.VARIANTS[variant] = branches.Variant(None, read)


def _rewrite(forward: Any, casts: bool = True) -> Rewritten | None:
    try:
        function, rewrap = source.unwrap(forward)
        node = source.parse(function)
    except source.Unreadable:
        return None
    exchange = _Exchange(node, casts and function.__module__.startswith("peft."))
    changed: ast.FunctionDef = exchange.visit(copy.deepcopy(node))
    if not exchange.made & {"delta", "add"}:
        return None
    ast.fix_missing_locations(changed)
    built = source.build(function, changed, {"_tridrop": branches})
    return Rewritten(rewrap(built), changed, "add" in exchange.made)


class _Exchange(ast.NodeTransformer):
    """Puts the functions of branches.py in the place of a forward's expressions.

    ``casts`` says whether nothing but branches and variants uses the input after its cast: so it is
    in PEFT's own files, and not to be told of others.
    """

    def __init__(self, node: ast.FunctionDef, casts: bool) -> None:
        self.casts = casts
        self.made: set[str] = set()  # the functions that are called
        self.owner = node.args.args[0].arg if node.args.args else ""
        # Local names of an adapter's parts: which part, and the expression of the adapter's name.
        self.parts: dict[str, tuple[str, str]] = {}
        assigned: dict[str, int] = {}
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                assigned[n.id] = assigned.get(n.id, 0) + 1
        for n in ast.walk(node):
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
                name, part = n.targets[0].id, self.part_of(n.value)
                if part is not None and assigned[name] == 1:
                    self.parts[name] = part

    def part_of(self, e: ast.expr) -> tuple[str, str] | None:
        """("lora_A", "name") of self.lora_A[name]."""
        if not isinstance(e, ast.Subscript) or not isinstance(e.value, ast.Attribute):
            return None
        held, owner = e.value.attr, e.value.value
        known = held in ("lora_A", "lora_B", "lora_dropout", "scaling")
        mine = isinstance(owner, ast.Name) and owner.id == self.owner
        return (held, ast.unparse(e.slice)) if known and mine else None

    def called(self, e: ast.expr, part: str, adapter: str | None = None) -> ast.expr | None:
        """The argument of a call of such a part."""
        if not isinstance(e, ast.Call) or len(e.args) != 1 or e.keywords:
            return None
        held, of = self.parts.get(ast.unparse(e.func), ("", ""))
        return e.args[0] if held == part and adapter in (None, of) else None

    def branch(self, e: ast.expr) -> tuple[ast.expr, str, bool] | None:
        """Of lora_B(lora_A(dropout(x))): x, the adapter's name, and whether it is scaled."""
        scaled = None
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            scaled = self.parts.get(ast.unparse(e.right), ("", ""))
            e = e.left
        inner = self.called(e, "lora_B")
        if inner is None:
            return None
        assert isinstance(e, ast.Call)
        adapter = self.parts[ast.unparse(e.func)][1]
        if scaled not in (None, ("scaling", adapter)):
            return None
        inner = self.called(inner, "lora_A", adapter)
        inner = None if inner is None else self.called(inner, "lora_dropout", adapter)
        return None if inner is None else (inner, adapter, scaled is not None)

    def call(self, function: str, text: str) -> ast.expr:
        self.made.add(function)
        return ast.parse(f"_tridrop.{function}({self.owner}, {text})", mode="eval").body

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body.insert(0, ast.copy_location(ast.parse("_deltas = {}").body[0], node.body[0]))
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        found = self.branch(node.right) if isinstance(node.op, ast.Add) else None
        if found is not None and found[2]:
            x, adapter, _ = found
            left = ast.unparse(node.left)
            return self.call("add", f"{adapter}, _deltas, {ast.unparse(x)}, {left}")
        return self.visit_branch(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        casts = self.casts and ast.unparse(node.func) == f"{self.owner}._cast_input_dtype"
        if casts and len(node.args) == 2:
            wanted = ast.unparse(node.args[1]).partition(".")[0]  # lora_A of lora_A.weight.dtype
            held, adapter = self.parts.get(wanted, ("", ""))
            if held == "lora_A" and not node.keywords:
                x, dtype = map(ast.unparse, node.args)
                return self.call("cast", f"{adapter}, {x}, {dtype}")
        if ast.unparse(node.func).startswith(f"{self.owner}.lora_variant[") and node.args:
            node.func = ast.parse("_tridrop.variant", mode="eval").body
            return node
        return self.visit_branch(node)

    def visit_branch(self, node: ast.expr) -> ast.expr:
        found = self.branch(node)
        if found is None:
            self.generic_visit(node)
            return node
        x, adapter, scaled = found
        return self.call("delta", f"{adapter}, _deltas, {ast.unparse(x)}, {scaled}")


def parts(module: Any, name: str) -> tuple[str, ...]:
    """The ops of an adapter's branch that are one, for the report."""
    found = rewritten(base_of(module))
    adds = found is not None and found.adds and name not in module.lora_variant
    return ("dropout", "lora_A", "lora_B", *(["add"] if adds else []))
