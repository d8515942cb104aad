"""LoRA layers of PEFT: makes the branch of each adapter one op, and keeps the rest of the forward.

However the base of a layer is quantised, its forward in PEFT has the same few lines for an adapter.
It looks the adapter's parts up by name,

    lora_A, lora_B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

casts the input, and adds ``lora_B(lora_A(dropout(x)))`` times a factor. Exactly these expressions
in the source of the forward are replaced here by calls of branches.py. Everything else stays
PEFT's: disabled, merged and mixed adapters, and the casts and copies of results. A class whose
forward does not contain these expressions, in any version of PEFT, is left as it is.
"""

from __future__ import annotations

import ast
import copy
import sys
from types import FunctionType
from typing import Any, NamedTuple

from . import branches, source
from .class_cache import cache_of
from .kinds import base_of
from .present import At, holds, is_original


def is_lora(cls: type) -> bool:
    """Whether a class is a layer of PEFT that may have LoRA adapters."""
    return any(c.__name__ == "LoraLayer" and c.__module__.startswith("peft.") for c in cls.__mro__)


class Rewritten(NamedTuple):
    """A rewritten forward, its source, and whether one op also adds the branch to the result."""

    forward: FunctionType
    text: ast.FunctionDef
    adds: bool


def rewritten(cls: type) -> Rewritten | None:
    """The new forward of a class; None if it has no adapters, or its source cannot be read."""
    if not is_lora(cls):
        return None
    variants = sys.modules.get("peft.tuners.lora.variants")
    for name, value in vars(variants).items() if variants is not None else ():
        if name.endswith("LinearVariant"):
            _read_variant(value)
    cache = cache_of(cls)
    if cache.rewritten is None or not cache.rewritten[0]():
        casts = is_original(cls, "_cast_input_dtype")
        read = holds(At(cls, "forward"), At(cls, "_cast_input_dtype"))
        cache.rewritten = read, _rewrite(cls.forward, casts)  # type: ignore[attr-defined]
    return cache.rewritten[1]


def _read_variant(variant: Any) -> None:
    """Read the forward of a variant, unless that was done. DoRA is recognised by its class name."""
    found = branches.VARIANTS.get(variant)
    if found is not None and found.holds():
        return
    new, read = _rewrite(variant.forward), holds(At(variant, "forward"))
    if new is not None:
        branches.VARIANTS[variant] = branches.Variant(new.forward, read)
    elif variant.__name__ == branches.DORA and is_original(variant, "forward"):
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
    """Replaces the expressions of a forward by calls of the functions of branches.py.

    ``casts`` says that only branches and variants use the input after its cast, so that the cast
    may be left to the op. This holds in PEFT's own files; in others it cannot be known.
    """

    def __init__(self, node: ast.FunctionDef, casts: bool) -> None:
        self.casts = casts
        self.made: set[str] = set()  # the names of the functions of branches.py that are called
        self.owner = node.args.args[0].arg if node.args.args else ""
        # Local variables that hold a part of an adapter -> the part, and the source of the
        # adapter's name.
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
        part, owner = e.value.attr, e.value.value
        is_part = part in ("lora_A", "lora_B", "lora_dropout", "scaling")
        of_self = isinstance(owner, ast.Name) and owner.id == self.owner
        return (part, ast.unparse(e.slice)) if is_part and of_self else None

    def called(self, e: ast.expr, part: str, adapter: str | None = None) -> ast.expr | None:
        """The argument, if an expression is a call of this part, of ``adapter`` or of any."""
        if not isinstance(e, ast.Call) or len(e.args) != 1 or e.keywords:
            return None
        found, of = self.parts.get(ast.unparse(e.func), ("", ""))
        return e.args[0] if found == part and adapter in (None, of) else None

    def branch(self, e: ast.expr) -> tuple[ast.expr, str, bool] | None:
        """For lora_B(lora_A(dropout(x))): x, the adapter's name, and whether it is scaled."""
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
            part, adapter = self.parts.get(wanted, ("", ""))
            if part == "lora_A" and not node.keywords:
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
    """The ops of an adapter's branch that become one op, for the report."""
    found = rewritten(base_of(module))
    adds = found is not None and found.adds and name not in module.lora_variant
    return ("dropout", "lora_A", "lora_B", *(["add"] if adds else []))
