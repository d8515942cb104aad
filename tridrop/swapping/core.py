"""tridrop.swap: finds what drops in a model, exchanges it in place, and reports."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..integrations import transformers
from ..seeds import number_sites
from . import classes, kinds
from .classes import Recipe
from .modules import REPLACEMENTS
from .recognise import Tail, resolve
from .report import Report, Site
from .rewrite import ATTENTION_PARTS, Levels, Op

ATTENTION = "tridrop"  # the name of the attention function in transformers


def base_of(module: nn.Module) -> type:
    """A module's class, or the one it had before the swap."""
    kind = type(module)
    base: type = kind.__dict__.get("_tridrop_base", kind)
    return base


class Survey:
    """What there is in a model, and what is to become of it."""

    def __init__(self, model: nn.Module, levels: Levels) -> None:
        self.levels = levels
        self.names = {module: name for name, module in model.named_modules()}
        self.recipes: dict[nn.Module, Recipe] = {}
        self.tails: dict[nn.Module, Tail | None] = {}
        self.left: dict[nn.Module, str] = {}  # why nothing was done about a module
        # The places that call a module, or hand its rate to an attention function.
        self.places: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        kinds.learn(model)
        for module in self.names:
            self.recipe(module)
        for module in self.recipes:
            for i, (_, place) in enumerate(self.work(module).places):
                for child in self.dropped_by(module, place.op):
                    self.places.setdefault(child, []).append((module, i))
        todo = list(self.recipes)
        while todo:
            for child in self.bare_children(todo.pop()):
                if not self.recipes[child].bare:
                    self.recipes[child] = replace(self.recipes[child], bare=True)
                    todo.append(child)

    def recipe(self, module: nn.Module) -> Recipe | None:
        """The recipe for a module whose forward can be read, without its caller's wishes."""
        if module in self.recipes or module in self.left:
            return self.recipes.get(module)
        base = base_of(module)
        if isinstance(module, torch.jit.ScriptModule):
            self.left[module] = "it is compiled by TorchScript"
        elif "forward" in module.__dict__:
            self.left[module] = "its forward was replaced on the instance"
        elif _is_torchs(base):
            self.left[module] = "it is torch's own"
        if module in self.left:
            return None
        labels = classes.labels_of(module, base, self.tail)
        children = classes.children_of(module, base)
        self.recipes[module] = Recipe(self.levels, tuple(sorted(labels.items())), children=children)
        return self.recipes[module]

    def tail(self, module: nn.Module) -> Tail | None:
        """What a module would hand to its caller."""
        if module not in self.tails:
            self.tails[module] = None  # for a module that contains itself
            recipe = self.recipe(module)
            if recipe is not None and not _records_first(self.names, base_of(module)):
                self.tails[module] = classes.tail_of(base_of(module), recipe)
        return self.tails[module]

    def work(self, module: nn.Module) -> classes.Work:
        """The plans for a module."""
        return classes.work_of(base_of(module), self.recipes[module])

    def bare_children(self, module: nn.Module) -> list[nn.Module]:
        """The modules whose ends a module takes over."""
        found = []
        work = self.work(module)
        for made in (*work.plans.values(), *work.bare.values()):
            for op in made.emitted:
                if op.name.startswith("call") and op.method == "forward":
                    found.append(self.child(module, op))
        return found

    def dropped_by(self, module: nn.Module, op: Op) -> list[nn.Module]:
        """The modules of torch whose masks or rates an op uses."""
        if op.name in ("dropout", "drop_path"):
            return [self.child(module, op)]
        if op.name not in ("attention", "interface"):
            return []
        paths = [ast.unparse(n.value) for n in ast.walk(op.rest[0]) if isinstance(n, ast.Attribute)]
        found = [resolve(module, path.partition(".")[2]) for path in paths if "." in path]
        return [child for child in found if isinstance(child, nn.Dropout)]

    def child(self, module: nn.Module, op: Op) -> Any:
        """What an op calls on an instance."""
        assert isinstance(op.node, ast.Call)
        path = ast.unparse(op.node.func).partition(".")[2]
        return resolve(module, path)

    def drops(self, module: nn.Module) -> bool:
        """Whether a module is itself a dropout that tridrop knows."""
        kind = kinds.kind_of(module)
        if kind is not None and kind.name in ("dropout", "drop_path"):
            return True
        return base_of(module) is nn.MultiheadAttention

    def replaces(self, module: nn.Module) -> bool:
        """Whether one of torch's own modules becomes tridrop's."""
        return not self.why_left(module)

    def why_left(self, module: nn.Module) -> str:
        """Why a module that drops stays what it is; empty where it does not."""
        if self.left.get(module, "it is torch's own") != "it is torch's own":
            return self.left[module]
        if not self.drops(module):
            return "tridrop has no such module"
        if base_of(module) is nn.MultiheadAttention:
            if not module.dropout:
                return "its dropout is 0"
            return "" if self.levels.attention else "its level is off"
        return "" if self.levels.dropout else "its level is off"

    def parts(self, module: nn.Module) -> tuple[str, ...]:
        """What a module that drops becomes."""
        kind = kinds.kind_of(module)
        return ATTENTION_PARTS if kind is None else (kind.name,)

    def rate_of_module(self, module: nn.Module) -> float | None:
        """The p of a module that drops."""
        kind = kinds.kind_of(module)
        p = kind.get(module, "p") if kind is not None else getattr(module, "dropout", None)
        return float(p) if isinstance(p, (int, float)) else None

    def rate(self, module: nn.Module, op: Op) -> float | None:
        """The p of an op in a method of ``module``, where that can be told without running it."""
        if op.name in ("dropout", "drop_path"):
            return self.rate_of_module(self.child(module, op))
        where = op.rest[-2 if op.name in ("rate", "dropout_add") else 0] if op.rest else op.node
        for node in ast.walk(where):
            if isinstance(node, ast.Attribute) and node.attr != "training":
                p: Any = module
                for part in ast.unparse(node).split(".")[1:]:
                    p = getattr(p, part, None)
                if isinstance(p, (int, float)):
                    return float(p)
        return None


class Interfaces:
    """Attention that a transformers model looks up by name."""

    def __init__(self, survey: Survey) -> None:
        self.owners: dict[nn.Module, nn.Module] = {}  # attention module -> its model
        self.reasons: dict[nn.Module, str] = {}  # why a model keeps its function
        modules = {name: module for module, name in survey.names.items()}
        rates: dict[nn.Module, list[float | None]] = {}
        for module in survey.recipes:
            for _, place in survey.work(module).places:
                if place.op.name == "interface":
                    owner = self._owner(survey.names[module], modules)
                    if owner is not None:
                        self.owners[module] = owner
                        rates.setdefault(owner, []).append(survey.rate(module, place.op))
        for owner, found in rates.items():
            self.reasons[owner] = self._why_not(owner, found, survey.levels)

    @staticmethod
    def _owner(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
        """The innermost model of transformers around a module."""
        while True:
            name = name.rpartition(".")[0]
            if hasattr(modules.get(name), "set_attn_implementation"):
                return modules[name]
            if not name:
                return None

    @staticmethod
    def _why_not(owner: Any, rates: list[float | None], levels: Levels) -> str:
        now = owner.config._attn_implementation
        if not levels.attention:
            return "its level is off"
        if now == ATTENTION:
            return ""
        if all(p == 0 for p in rates):
            return "its dropout is 0"
        if not owner._can_set_attn_implementation():
            return "its class lets no attention function be set"
        if now not in ("eager", "sdpa", None):
            return f"{now} was chosen for it"
        if now == "eager" and getattr(owner.config, "reorder_and_upcast_attn", False):
            return "it upcasts its scores (reorder_and_upcast_attn)"
        return ""

    def reason(self, module: nn.Module) -> str:
        """Why an attention module keeps its function; empty where it does not."""
        owner = self.owners.get(module)
        return "its function is passed in" if owner is None else self.reasons[owner]

    def apply(self) -> None:
        """Choose tridrop's attention."""
        for owner, reason in self.reasons.items():
            now = owner.config._attn_implementation  # type: ignore[union-attr]
            if not reason and now != ATTENTION:
                transformers.register()
                owner.set_attn_implementation(ATTENTION)  # type: ignore[operator]
                owner.__dict__["_tridrop_attention"] = now


def _is_torchs(base: type) -> bool:
    """Whether a class is one of torch.nn's building blocks, which have no sites inside."""
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    if base in layers or classes.is_sequence(base):
        return False
    return base.__module__.startswith("torch.nn.modules.")


def _records_first(names: dict[nn.Module, str], base: type) -> bool:
    """Whether transformers records the first output of a class's modules, for hidden_states."""
    for module in names:
        recorded = getattr(module, "_can_record_outputs", None) or {}
        for key, targets in recorded.items():
            for target in targets if isinstance(targets, list) else [targets]:
                kind = getattr(target, "target_class", target)
                index = getattr(target, "index", 0 if "hidden_states" in key else 1)
                if index == 0 and isinstance(kind, type) and issubclass(base, kind):
                    return True
    return False


def swap(
    model: nn.Module,
    *,
    dropout: bool = True,
    attention: bool = True,
    inside: bool = True,
    across: bool = True,
    dry_run: bool = False,
) -> Report:
    """Rewrite a model in place so that its dropouts are tridrop's, fused where that can be.

    Parameters, state_dict keys, hooks, names of classes, isinstance, pickling and gradient
    checkpointing stay what they were, and so does the result in eval mode. Masks are tridrop's,
    numbered for :func:`tridrop.rng`, and do not depend on the switches; a fused op rounds once.
    What is not known for sure is left as it is, and the report says why. Swap before fully_shard
    and the wrappers of trainers. A second call replaces the first.

    Args:
        model: any module, of torch.nn, transformers, timm, peft or one's own.
        dropout: exchange dropouts and drop paths, also those with nothing to be fused with.
        attention: run attention that drops its probabilities in memory linear in the lengths.
        inside: fuse a dropout with its neighbours in the same forward: the bias of the linear
            layer, activation, residual and norm around it.
        across: fuse over the ends of forwards, and what drop path, layer scale and sums shared by
            several users have part in.
        dry_run: report only, and change nothing.

    Returns:
        A :class:`Report`: print it, and see its ``measure``, ``source`` and ``to_dict``.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: as :func:`unswap`.

    >>> model = nn.TransformerEncoderLayer(8, 2, 16)
    >>> swap(model).counts()
    {'fused': 4, 'swapped': 0, 'left': 0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    levels = Levels(dropout, attention, inside, across)
    if not dry_run:
        unswap(model)
    survey = Survey(model, levels)
    interfaces = Interfaces(survey)
    if not dry_run:
        _apply(survey, interfaces)
        _number(model, survey)
    sites = [site for module in survey.names for site in _sites(module, survey, interfaces)]
    return Report(sites, levels, dry_run, model)


def _apply(survey: Survey, interfaces: Interfaces) -> None:
    for module, recipe in survey.recipes.items():
        base = base_of(module)
        kind = kinds.kind_of(module)
        drops_samples = kind is not None and kind.name == "drop_path"
        if survey.levels.dropout if drops_samples else survey.work(module).changes():
            module.__class__ = classes.swapped_class(base, recipe)
    for module in survey.names:
        if type(module) in REPLACEMENTS and survey.replaces(module):
            module.__class__ = REPLACEMENTS[type(module)]
    interfaces.apply()


def _number(model: nn.Module, survey: Survey) -> None:
    """Number every place, whatever became of it, so that numbers do not depend on the levels."""
    for module in survey.names:
        places = survey.work(module).places if module in survey.recipes else []
        count = len(places)
        if survey.drops(module) and not hasattr(module, "site"):
            count += 1
        if count:
            module.__dict__["_tridrop_count"] = count
        for i, (_, place) in enumerate(places):
            if place.op.name == "interface":
                module.__dict__["_tridrop_attention_site"] = i
    number_sites(model)
    for module, users in survey.places.items():
        if len(users) == 1 and "site" in module.__dict__:
            # Whoever else calls it draws what the report says of its place.
            owner, i = users[0]
            module.site = owner.__dict__["_tridrop_site"] + i


def _sites(module: nn.Module, survey: Survey, interfaces: Interfaces) -> list[Site]:
    """What is to be reported of one module."""
    name, kind = survey.names[module], base_of(module).__name__
    first = module.__dict__.get("_tridrop_site")
    found = []
    if module in survey.recipes:
        for i, (_, place) in enumerate(survey.work(module).places):
            parts, reason = place.parts, ""
            if place.op.name == "interface":
                reason = interfaces.reason(module)
                parts = () if reason else ATTENTION_PARTS
            elif place.op.name == "other":
                reason = place.op.reason
            elif not parts:
                reason = "its level is off"
            stream = None if first is None or not parts else first + i
            p = survey.rate(module, place.op)
            found.append(Site(name, kind, place.text, place.line, p, parts, reason, stream))
        text = classes.text_of(base_of(module), survey.recipes[module].children)
        for method, reason in text.unread.items():
            if text.caught(base_of(module), method) and survey.levels.dropout:
                continue  # one of the places above
            if _mentions_dropout(base_of(module), method):
                found.append(Site(name, kind, method, None, None, (), reason, None))
    elif module in survey.left and _mentions_dropout(base_of(module), "forward"):
        found.append(Site(name, kind, "forward", None, None, (), survey.left[module], None))
    if module not in survey.places and (survey.drops(module) or _looks_like_dropout(module)):
        reason = survey.why_left(module)
        stream = None if reason else getattr(module, "site", first)
        parts = () if reason else survey.parts(module)
        p = survey.rate_of_module(module)
        found.append(Site(name, kind, str(module), None, p, parts, reason, stream))
    return found


def _mentions_dropout(base: type, method: str) -> bool:
    """Whether a method's code names a dropout, by its names alone."""
    function = getattr(base, method, None)
    function = inspect.unwrap(function) if function is not None else None
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return not _is_torchs(base) and any("drop" in name.lower() for name in names)


def _looks_like_dropout(module: nn.Module) -> bool:
    name = base_of(module).__name__.lower()
    return "dropout" in name or "droppath" in name or "stochasticdepth" in name


def unswap(model: nn.Module) -> None:
    """Undo :func:`swap`: every module gets its own class and attention function back.

    Where nothing was swapped it does nothing. Raises RuntimeError where a module was given another
    class after the swap.
    """
    for module in model.modules():  # all of them, before anything is changed
        inherited = any("_tridrop_base" in c.__dict__ for c in type(module).__mro__)
        if inherited and not classes.is_swapped(module):
            raise RuntimeError(
                f"a {type(module).__name__} was given another class after the swap, by fully_shard "
                "for instance: unswap before that"
            )
    for module in model.modules():
        if classes.is_swapped(module):
            module.__class__ = type(module).__dict__["_tridrop_base"]
        for name in ("_tridrop_site", "_tridrop_count", "_tridrop_attention_site"):
            module.__dict__.pop(name, None)
        if not hasattr(type(module), "site"):
            module.__dict__.pop("site", None)
        before = module.__dict__.pop("_tridrop_attention", None)
        if before is not None:
            module.set_attn_implementation(before)  # type: ignore[operator]
