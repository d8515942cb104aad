"""Surveys a model: its modules, and what a swap makes of each."""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..base.modules import is_keras, named_parts
from . import adapters, branches, classes, kinds
from .classes import Recipe
from .kinds import base_of
from .present import Holds, is_original
from .recognise import Method, Tail, called_by, resolve, self_of
from .remade_plan import REMADE
from .rewrite import ATTENTION_PARTS, Levels, Op


class Survey:
    """The modules of a model, and the recipe or the reason for each."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        self.levels = levels
        # Layers of Keras are handled in keras_models.py.
        named: Iterable[tuple[str, Any]] = named_parts(model)
        self.names = {module: name for name, module in named if not is_keras(module)}
        self.modules = {name: module for module, name in self.names.items()}
        self.recipes: dict[nn.Module, Recipe] = {}
        self.tails: dict[nn.Module, Tail | None] = {}
        self.left: dict[nn.Module, str] = {}  # why a module is left as it is
        self._works: dict[tuple[type, Recipe], classes.Work] = {}
        # For each dropout module, the places that call it or pass its rate to attention.
        self.places: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        kinds.read_kinds(self.names)
        # The dropouts of LoRA adapters, each with its layer and the name of the adapter in it.
        self.adapters: dict[nn.Module, tuple[nn.Module, str]] = {
            drop: (module, name)
            for module in self.names
            if adapters.is_lora(base_of(module))
            for name, drop in module.lora_dropout.items()
        }
        for module in self.names:
            self.recipe(module)
        for module in self.recipes:
            for i, (_, place) in enumerate(self.work(module).places):
                for child in dropped_by(module, place.op):
                    self.places.setdefault(child, []).append((module, i))
        todo = list(self.recipes)
        while todo:
            for child in self.bare_children(todo.pop()):
                if not self.recipes[child].bare:
                    self.recipes[child] = replace(self.recipes[child], bare=True)
                    todo.append(child)

    def recipe(self, module: nn.Module) -> Recipe | None:
        """The recipe for a module whose forward can be read, not knowing its callers yet."""
        if module in self.recipes or module in self.left:
            return self.recipes.get(module)
        base = base_of(module)
        if isinstance(module, torch.jit.ScriptModule):
            self.left[module] = "it is compiled by TorchScript"
        elif "forward" in module.__dict__:
            self.left[module] = "its forward was replaced on the instance"
        elif is_torchs(base):
            self.left[module] = "it is torch's own"
        if module in self.left:
            return None
        labels = classes.labels_of(module, base, self.tail)
        children = classes.children_of(module, base)
        self.recipes[module] = Recipe(self.levels, tuple(sorted(labels.items())), children=children)
        return self.recipes[module]

    def tail(self, module: nn.Module) -> Tail | None:
        """What a module would hand to a caller that takes over its end; None if it cannot."""
        if module not in self.tails:
            self.tails[module] = None  # ends the recursion for a module that contains itself
            recipe = self.recipe(module)
            if recipe is not None and not _records_first(self.names, base_of(module)):
                self.tails[module] = classes.tail_of(base_of(module), recipe)
        return self.tails[module]

    def read(self) -> dict[str, list[Holds]]:
        """For each class name, checks that it is unchanged. They keep no module alive."""
        found: dict[str, dict[int, Holds]] = {}
        for module in self.names:
            base = base_of(module)
            each = found.setdefault(base.__name__, {})
            kind = kinds.cached_kind(base)
            every = [] if kind is None else [kind.holds]
            if module in self.recipes:
                text = classes.text_of(base, self.recipes[module].children)
                every += [text.holds, self.work(module).holds]
            each.update((id(getattr(holds, "__self__", holds)), holds) for holds in every)
        for layer, _ in self.adapters.values():
            variants: Any = layer.lora_variant
            for variant in map(type, variants.values()):
                if variant in branches.VARIANTS:
                    holds = branches.VARIANTS[variant].holds
                    found.setdefault(variant.__name__, {})[id(holds)] = holds
        return {name: list(each.values()) for name, each in found.items()}

    def work(self, module: nn.Module) -> classes.Work:
        """The plans for a module."""
        key = base_of(module), self.recipes[module]
        if key not in self._works:
            self._works[key] = classes.work_of(*key)
        return self._works[key]

    def remade(self) -> dict[str, int]:
        """How many calls of each sort give or take a tensor that backward recomputes."""
        found = Counter(
            "linear" if op.name == "matrix" else op.name
            for module in self.recipes
            for made in self.work(module).plans.values()
            for op in made.emitted
            if op.name in REMADE
        )
        return {name: found[name] for name in REMADE if found[name]}

    def bare_children(self, module: nn.Module) -> list[nn.Module]:
        """The called modules whose ends a module takes over."""
        found = []
        work = self.work(module)
        for made in (*work.plans.values(), *work.bare.values()):
            for op in made.emitted:
                if op.name.startswith("call") and op.method == "forward":
                    found.append(called_by(module, op))
        return found

    def drops(self, module: nn.Module) -> bool:
        """Whether a module is itself a dropout that tridrop has a counterpart for."""
        kind = kinds.kind_of(module)
        return kind is not None and kind.name in _DROPPING

    def could_drop(self, module: nn.Module) -> bool:
        """Whether a module is one of torch's dropouts, even if its forward was replaced."""
        kind, _ = kinds.TYPES.get(base_of(module), (None, ()))
        return kind is not None and kind.name in _DROPPING

    def replaces(self, module: nn.Module) -> bool:
        """Whether a module of torch is replaced by tridrop's."""
        return not self.why_left(module)

    def why_left(self, module: nn.Module) -> str:
        """Why a module that drops is left as it is; empty if it is replaced."""
        if self.left.get(module, "it is torch's own") != "it is torch's own":
            return self.left[module]
        if not self.drops(module):
            return _why_unknown(module)
        if base_of(module) is nn.MultiheadAttention:
            if not module.dropout:
                return "its dropout is 0"
            if self.why_uncalled(module):
                return self.why_uncalled(module)
            return "" if self.levels.attention else "its switch is off"
        return "" if self.levels.dropout else "its switch is off"

    def why_uncalled(self, module: nn.Module) -> str:
        """Why it is unknown whether a module is called; empty if its parent's source may call it.

        The parent is the innermost module around it that is no container. Its source may call the
        module if it uses the module's name for anything but reading its parts, or if it reaches
        modules in another way, such as ``self.children()``.
        """
        path, name = self.names[module], ""
        while path:
            path, _, name = path.rpartition(".")
            owner = self.modules.get(path)
            if owner is None:  # a wrapper of Keras for modules of torch, which calls it
                return ""
            if not isinstance(owner, _CONTAINERS):
                break
        else:
            return ""
        if owner not in self.recipes or is_torchs(base_of(owner)):
            return ""
        base = base_of(owner)
        text = classes.text_of(base, classes.children_of(owner, base))
        if text.unread or "forward" not in text.methods:
            return ""
        uses = {use for m in text.methods.values() for use in _uses(m, name, base)}
        if True in uses:
            return ""
        what = f"{base.__name__}.forward does not name it"
        if uses:
            what = f"{base.__name__}.forward reads its parts and does not call it"
        return f"unknown: {what}; run report.verify(batch) to see whether it is called"

    def in_place(self, module: nn.Module, op: Op) -> bool:
        """Whether a call of F.dropout works in place now, where its ``inplace`` is an attribute."""
        if op.name != "rate" or len(op.rest) < 3:
            return False
        found = resolve(module, ast.unparse(op.rest[2]).partition(".")[2])
        return bool(found)

    def parts(self, module: nn.Module) -> tuple[str, ...]:
        """The ops that a module that drops becomes."""
        kind = kinds.kind_of(module)
        if module in self.adapters and not self.why_not_fused(module):
            return adapters.parts(*self.adapters[module])
        return ATTENTION_PARTS if kind is None or kind.name == "attention" else (kind.name,)

    def why_not_fused(self, module: nn.Module) -> str:
        """Why the dropout of an adapter is not fused; empty if it is, and for other modules."""
        if module not in self.adapters:
            return ""
        layer, name = self.adapters[module]
        if layer not in self.recipes:
            return self.left[layer]
        if not self.levels.inside:
            return "its switch is off"
        if self.work(layer).lora is None:
            return f"the forward of {base_of(layer).__name__} is not one that tridrop recognises"
        return branches.why_not(layer, name)

    def rate_of_module(self, module: nn.Module) -> float | None:
        """The p of a module that drops."""
        kind = kinds.kind_of(module)
        p = kind.get(module, "p") if kind is not None else getattr(module, "dropout", None)
        return float(p) if isinstance(p, Real) else None

    def rate(self, module: nn.Module, op: Op) -> float | None:
        """The p of an op in a method of ``module``, if it can be read without running it."""
        if op.name in ("dropout", "drop_path"):
            return self.rate_of_module(called_by(module, op))
        if not op.rest:
            return None
        where = op.rest[op.name == "dropout_add"]
        if isinstance(where, ast.Constant):
            return float(where.value) if isinstance(where.value, (int, float)) else None
        if any(isinstance(node, ast.BinOp) for node in ast.walk(where)):
            return None  # it is computed
        for node in ast.walk(where):
            if isinstance(node, ast.Attribute) and node.attr != "training":
                p: Any = module
                for part in ast.unparse(node).split(".")[1:]:
                    p = getattr(p, part, None)
                if isinstance(p, Real):
                    return float(p)
        return None


NO_SUCH_MODULE = "tridrop has no counterpart of this module"
_DROPPING = ("dropout", "drop_path", "attention", *kinds.OTHERS)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Names by which code reaches modules without naming them.
_REACHES = {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule",
            "apply", "super", "__dict__"}  # fmt: skip


def _uses(method: Method, name: str, base: type) -> set[bool]:
    """For each use of a name in a method, whether it may be a call; False if it only reads a part.

    A function to which the method passes ``self`` may also make the call, and so may a property of
    the class, if their code contains the name; and a private method (``__name``) may, since its
    source is not read here.
    """
    owner, found = self_of(method.node), set()
    parents = {child: n for n in ast.walk(method.node) for child in ast.iter_child_nodes(n)}
    for node in ast.walk(method.node):
        outer = parents.get(node)
        if isinstance(node, ast.Attribute):
            named = node.attr
            if named == name or (_is_private(named) and name.endswith(named)):
                part = isinstance(outer, ast.Attribute) and outer.attr not in _REACHES
                grand = parents.get(outer) if outer is not None else None
                found.add(not part or (isinstance(grand, ast.Call) and grand.func is outer))
            elif (
                named in _REACHES
                or _is_private(named)
                or _is_named(getattr(getattr(base, named, None), "fget", None), name)
            ):
                found.add(True)
        elif isinstance(node, ast.Name) and node.id == "getattr" and isinstance(outer, ast.Call):
            key = outer.args[1] if len(outer.args) > 1 else None
            if not isinstance(key, ast.Constant) or key.value == name:
                found.add(True)
        elif isinstance(node, ast.Name) and node.id in _REACHES:
            found.add(True)
        elif isinstance(node, ast.Name) and node.id == owner and isinstance(outer, ast.Call):
            callee = outer.func.id if isinstance(outer.func, ast.Name) else "getattr"
            called = method.function.__globals__.get(callee, getattr(builtins, callee, None))
            if called is None or _is_named(called, name):
                found.add(True)
    return found


def _is_named(function: Any, name: str) -> bool:
    """Whether a function's code contains a name."""
    return name in getattr(getattr(function, "__code__", None), "co_names", ())


def _is_private(name: str) -> bool:
    """Whether a name is private, ``__name``, so that Python prefixes it with that of the class."""
    return name.startswith("__") and not name.endswith("__")


def _why_unknown(module: nn.Module) -> str:
    """Why a module with the name of a dropout is left, if it is none that tridrop recognises."""
    kind = base_of(module)
    if kind.__module__.startswith("tridrop.nn."):
        return "it is tridrop's own"
    if kind in kinds.TYPES:
        return f"{kind.__name__}.forward, or a function of torch that it calls, was replaced"
    bases = [c for c in kind.__mro__[1:] if c in kinds.TYPES]
    if bases:
        return f"it is a subclass of {bases[0].__name__} that computes something else"
    return NO_SUCH_MODULE


def dropped_by(module: nn.Module, op: Op) -> list[nn.Module]:
    """The dropout modules whose masks or rates an op uses."""
    if op.name in ("dropout", "drop_path"):
        return [called_by(module, op)]
    if op.name not in ("attention", "interface"):
        return []
    paths = [ast.unparse(n.value) for n in ast.walk(op.rest[0]) if isinstance(n, ast.Attribute)]
    found = [resolve(module, path.partition(".")[2]) for path in paths if "." in path]
    return [child for child in found if isinstance(child, nn.Dropout)]


def is_torchs(base: type) -> bool:
    """Whether a class is one of torch.nn's building blocks, whose forwards contain no sites."""
    read = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)
    if base in read or classes.is_sequence(base):
        return False
    # If its forward was replaced, the replacement is read like any other source.
    return base.__module__.startswith("torch.nn.modules.") and has_own_forward(base)


def has_own_forward(base: Any) -> bool:
    """Whether a class has the forward of its own file, or none at all."""
    return base.forward is nn.Module.forward or is_original(base, "forward")


def _records_first(names: dict[nn.Module, str], base: type) -> bool:
    """Whether transformers records the first output of a class's modules, as for hidden_states."""
    for module in names:
        recorded = getattr(module, "_can_record_outputs", None) or {}
        for key, targets in recorded.items():
            for target in targets if isinstance(targets, list) else [targets]:
                kind = getattr(target, "target_class", target)
                index = getattr(target, "index", 0 if "hidden_states" in key else 1)
                if index == 0 and isinstance(kind, type) and issubclass(base, kind):
                    return True
    return False
