"""LoRA layers of PEFT: the branch of an adapter as one op, and the rest of their forward as it is.

Whatever a layer's base is quantised with, its forward in PEFT has the same few lines for an
adapter: its parts are taken by name,

    lora_A, lora_B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

the input is cast, and ``lora_B(lora_A(dropout(x)))`` is added with a factor. Exactly these
expressions are exchanged here, in the text of the forward, for calls of the functions below. So
everything else stays PEFT's: disabled, merged and mixed adapters, the casts and copies of results.
A class of any library version in whose text they are not found is not touched.
"""

from __future__ import annotations

import ast
import copy
import functools
import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import seeds
from ..spec_product import MAX_RANK
from . import source
from .lazy import free, heard
from .pending import fits

# ------------------------------------------------------------------------------------ the text


def is_lora(kind: type) -> bool:
    """Whether a class is a layer of PEFT's that may have LoRA adapters."""
    return any(c.__name__ == "LoraLayer" and c.__module__.startswith("peft.") for c in kind.__mro__)


class Rewritten(NamedTuple):
    """A forward with its adapters' branches exchanged, its text, and whether it adds them."""

    forward: FunctionType
    text: ast.FunctionDef
    adds: bool


@functools.cache
def rewritten(kind: type) -> Rewritten | None:
    """The new forward of a class; None where it has no adapters, or its text cannot be read."""
    if not is_lora(kind):
        return None
    try:
        function, rewrap = source.unwrap(kind.forward)  # type: ignore[attr-defined]
        node = source.parse(function)
    except source.Unreadable:
        return None
    exchange = _Exchange(node)
    changed: ast.FunctionDef = exchange.visit(copy.deepcopy(node))
    if not exchange.made & {"delta", "add"}:
        return None
    ast.fix_missing_locations(changed)
    built = source.build(function, changed, {"_tridrop": sys.modules[__name__]})
    return Rewritten(rewrap(built), changed, "add" in exchange.made)


class _Exchange(ast.NodeTransformer):
    """Puts the functions of this module in the place of a forward's expressions."""

    def __init__(self, node: ast.FunctionDef) -> None:
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
        scaled = False
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            held, _ = self.parts.get(ast.unparse(e.right), ("", ""))
            if held != "scaling":
                return None
            e, scaled = e.left, True
        inner = self.called(e, "lora_B")
        if inner is None:
            return None
        assert isinstance(e, ast.Call)
        adapter = self.parts[ast.unparse(e.func)][1]
        inner = self.called(inner, "lora_A", adapter)
        inner = None if inner is None else self.called(inner, "lora_dropout", adapter)
        return None if inner is None else (inner, adapter, scaled)

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
        if ast.unparse(node.func) == f"{self.owner}._cast_input_dtype" and len(node.args) == 2:
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


# ------------------------------------------------------------------------------- what it calls

_DORA = "DoraLinearVariant"


def parts(module: Any, name: str) -> tuple[str, ...]:
    """The ops of an adapter's branch that are one, for the report."""
    found = rewritten(type(module).__dict__.get("_tridrop_base", type(module)))
    adds = found is not None and found.adds and name not in module.lora_variant
    return ("dropout", "lora_A", "lora_B", *(["add"] if adds else []))


def why_not(module: Any, name: str) -> str:
    """Why the branch of an adapter is PEFT's own; empty where it is not."""
    variant = module.lora_variant.get(name)
    if variant is not None and type(variant).__name__ != _DORA:
        return f"its adapter is a {type(variant).__name__}"
    if name not in module.lora_A or name not in module.lora_B:
        return "its adapter is not of linear layers"
    A, B, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if not _plain(A) or not _plain(B) or A.bias is not None:
        return "its adapter is not of plain linear layers"
    if A.out_features > MAX_RANK:
        return f"its rank is above {MAX_RANK}"
    if free(drop, "dropout") is None and free(drop, "identity") is None:
        return "its dropout is not torch's, works in place or has hooks"
    if getattr(drop, "noise_shape", None) is not None:
        return "its dropout has a noise_shape"
    return ""


def _plain(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer, with its own forward, and nobody listens."""
    own = type(module) is nn.Linear and "forward" not in module.__dict__
    return own and not heard(module) and fits(module.weight)


def _drops(drop: Any) -> bool:
    p = getattr(drop, "p", 0.0)
    return drop.training and (isinstance(p, Tensor) or p > 0)


def _fuses(module: Any, name: str, x: Tensor) -> bool:
    """Whether tridrop computes the branch of an adapter.

    It does where something drops, or where x would be copied in another dtype. In every other case
    PEFT's own calls keep nothing more, and stay what they are bit for bit.
    """
    if not fits(x) or why_not(module, name):
        return False
    weight = module.lora_A[name].weight
    if weight.dtype != module.lora_B[name].weight.dtype or weight.device != x.device:
        return False
    if x.dtype != weight.dtype and not _autocast(x):
        return getattr(module, "cast_input_dtype_enabled", True)
    return x.dtype != weight.dtype or _drops(module.lora_dropout[name])


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _arguments(module: Any, name: str, x: Tensor, scaled: bool) -> dict[str, Any]:
    """What the op takes for an adapter."""
    return {
        "A": module.lora_A[name].weight,
        "B": module.lora_B[name].weight,
        "p": _rate(module.lora_dropout[name]),
        "scaling": module.scaling[name] if scaled else 1.0,
        "bias": module.lora_B[name].bias,
        "seed": _seed(module.lora_dropout[name], x),
    }


def _rate(drop: Any) -> Any:
    return drop.p if _drops(drop) else 0.0


def _seed(drop: Any, x: Tensor) -> Tensor | None:
    """The seed of an adapter's dropout under tridrop.rng; None leaves it to the op."""
    if not _drops(drop) or not seeds.active():
        return None
    return seeds.seed_for(x.device, None, getattr(drop, "site", None))


def cast(module: Any, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``module._cast_input_dtype(x, dtype)``, which the op does while it loads x."""
    if name not in module.lora_variant and _fuses(module, name, x):
        return x
    out: Tensor = module._cast_input_dtype(x, dtype)
    return out


def delta(module: Any, name: str, deltas: dict[str, Tensor], x: Tensor, scaled: bool) -> Tensor:
    """``lora_B(lora_A(dropout(x)))`` of an adapter, times its scaling where that is asked for.

    The first of several active adapters reads x for all that can go with it, and leaves theirs in
    ``deltas``.
    """
    if name in deltas:
        return deltas.pop(name)
    if _fuses(module, name, x):
        names = [name, *_companions(module, name, x)]
        if len(names) == 1:
            return F.lora_delta(x, **_arguments(module, name, x, scaled))
        each = [_arguments(module, n, x, scaled) for n in names]
        made = F.lora_deltas(
            x,
            [a["A"] for a in each],
            [a["B"] for a in each],
            each[0]["p"],
            scaling=[a["scaling"] for a in each],
            biases=[a["bias"] for a in each],
            seed=[a["seed"] for a in each],
        )
        deltas.update(zip(names, made, strict=True))
        return deltas.pop(name)
    out: Tensor = module.lora_B[name](module.lora_A[name](module.lora_dropout[name](x)))
    return out * module.scaling[name] if scaled else out


def _companions(module: Any, name: str, x: Tensor) -> list[str]:
    """The later active adapters that can be computed together with one."""
    later = module.active_adapters[module.active_adapters.index(name) + 1 :]
    return [other for other in later if _joins(module, other, name, x)]


def _joins(module: Any, name: str, first: str, x: Tensor) -> bool:
    """Whether an adapter is computed together with the first."""
    if name not in module.lora_A or name in module.lora_variant or not _fuses(module, name, x):
        return False
    a, b = (_rate(module.lora_dropout[n]) for n in (name, first))
    same = a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
    return same and module.lora_A[name].weight.dtype == module.lora_A[first].weight.dtype


def add(module: Any, name: str, deltas: dict[str, Tensor], x: Tensor, result: Tensor) -> Tensor:
    """``result + lora_B(lora_A(dropout(x))) * scaling``.

    Of several adapters the sum is kept in the wider dtype until all are added, as PEFT does it.
    """
    wide = torch.promote_types(result.dtype, module.lora_A[name].weight.dtype) == result.dtype
    last = len(module.active_adapters) == 1 and not _autocast(x)
    alone = name not in deltas and (wide or last) and fits(result) and _fuses(module, name, x)
    if alone and not _companions(module, name, x):
        return F.lora_linear(x, result, **_arguments(module, name, x, True))
    return result + delta(module, name, deltas, x, True)


def variant(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
    """``module.lora_variant[name].forward(module, ...)``; of DoRA without a stored dropout(x).

    DoRA (Liu et al. 2024, arXiv 2402.09353) needs base(dropout(x)) as well, which does not follow
    from base(x) where something drops: it stays a product by itself. That product keeps no input,
    for its weight is frozen, and lora_A was all that kept one.
    """
    found = module.lora_variant[active_adapter]
    is_dora = type(found).__name__ == _DORA and module.training
    if not is_dora or not _drops(module.lora_dropout[active_adapter]):
        return found.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
    if not _fuses(module, active_adapter, x):
        return found.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
    branch = _Branch(module, active_adapter, x)
    extra = module.lora_magnitude_vector[active_adapter](
        branch.dropped,
        lora_A=branch,
        lora_B=branch.end,
        scaling=module.scaling[active_adapter],
        base_layer=module.get_base_layer(),
        base_result=None,
        adapter_name=active_adapter,
    )
    out: Tensor = result + extra
    return out


class _Branch:
    """Stands in for DoRA's lora_A: given dropout(x), it leaves the work to the op, which has x."""

    def __init__(self, module: Any, name: str, x: Tensor) -> None:
        self.A, self.B, self.x = module.lora_A[name], module.lora_B[name], x
        self.weight = self.A.weight
        self.arguments = _arguments(module, name, x, False)
        if self.arguments["seed"] is None:
            self.arguments["seed"] = seeds.seed_for(x.device, None)
        self.dropped = F.dropout(x, self.arguments["p"], seed=self.arguments["seed"])

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = x if x is self.dropped else self.A(x)
        return out

    def end(self, x: Tensor) -> Tensor:
        """lora_B."""
        if x is self.dropped:
            return F.lora_delta(self.x, **self.arguments)
        out: Tensor = self.B(x)
        return out
