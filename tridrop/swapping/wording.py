"""The words of a report: what became of each site, and the source of a rewritten method."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..base.modules import all_modules, is_keras, named_parts
from . import classes, emission
from .classes import Recipe, Work
from .kinds import base_of
from .modules import REPLACEMENTS
from .recognise import called_by, called_path
from .rewrite import Levels, Op, Plan, taken_up
from .survey import Survey

# The verb for what a caller does with a value that it takes over.
_DONE = {
    "add": "added",
    "dropout_add": "dropped and added",
    "dropout": "dropped",
    "rate": "dropped",
    "drop_path": "dropped by sample",
    "norm": "normalised",
    "scale": "scaled",
}
_SAME = {"rate": "dropout", "dropout_add": "dropout + add"}
_SILENT = ("cast", "identity", "return")


def recipes_of(model: nn.Module) -> dict[nn.Module, Recipe]:
    """The recipe by which each rewritten module of a model was rewritten."""
    kinds = {module: type(module).__dict__ for module in all_modules(model)}
    return {m: kind["_tridrop_recipe"] for m, kind in kinds.items() if "_tridrop_recipe" in kind}


def is_swapped(model: nn.Module, levels: Levels) -> bool:
    """Whether a model is swapped at present, with exactly these levels."""
    found = recipes_of(model)
    return bool(found) and all(recipe.levels == levels for recipe in found.values())


class Plans:
    """The plans for a model's modules: those it was rewritten by, or would be."""

    def __init__(self, model: nn.Module | None, levels: Levels) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.works: dict[nn.Module, Work] = {}
        self.kinds: dict[nn.Module, type] = {}
        # For a module's method, the callers that take over its end: module, method and call.
        self.callers: dict[tuple[nn.Module, str], list[tuple[nn.Module, str, Op]]] = {}
        if model is None:
            return
        self.modules = dict(named_parts(model, remove_duplicate=False))
        swapped = is_swapped(model, levels)
        recipes = recipes_of(model) if swapped else Survey(model, levels).recipes
        for module, recipe in recipes.items():
            self.kinds[module] = base_of(module)
            self.works[module] = classes.work_of(self.kinds[module], recipe)
        for module, work in self.works.items():
            for method in work.plans:
                for op in self.plan(module, method).emitted:
                    if op.name.startswith("call"):
                        called = called_by(module, op) if op.method == "forward" else module
                        callers = self.callers.setdefault((called, op.method), [])
                        callers.append((module, method, op))

    def plan(self, module: nn.Module, method: str) -> Plan:
        """The plan for a method; for the form whose caller takes over its end, if it has one."""
        work = self.works[module]
        return work.bare.get(method) or work.plans[method]

    def became(self, name: str, line: int | None, code: str, parts: Sequence[str]) -> str:
        """What became of a site, in words: the ops that are one op now, "linear + dropout"."""
        module = self.modules.get(name)
        text = [part for part in parts if part not in _SILENT]
        places = self.works[module].places if module in self.works else []
        found = [(m, p.op) for m, p in places if p.line == line and p.text == code]
        if module is None or not found or found[0][0] not in self.works[module].plans:
            words = [part if part != "call" else "(a called module's end)" for part in text]
            then = ", taken up by the caller" if "return" in parts else ""
            return " + ".join(words) + then
        method, op = found[0]
        if "call" in text:
            ops = taken_up(self.plan(module, method), op)
            calls = iter([self.handed(module, p) for p in ops if p.name.startswith("call")])
            text = [next(calls, part) if part == "call" else part for part in text]
        then = f", {self.taken(module, method)}" if "return" in parts else ""
        return " + ".join(text) + then

    def handed(self, module: nn.Module, call: Op) -> str:
        """What a call hands on uncomputed: "(attention's linear)"."""
        called = called_by(module, call) if call.method == "forward" else module
        name = called_path(call) if call.method == "forward" else call.method
        made = self.works[called].bare.get(call.method) if called in self.works else None
        ends = [e.producer for e in made.edges if e.consumer.name == "return"] if made else []
        if made is None or not ends:
            return f"({name}'s end)"
        words = []
        for op in [*taken_up(made, ends[0]), ends[0]]:
            if op.name.startswith("call"):
                words.append(self.handed(called, op))
            elif op.name not in _SILENT:
                words.append(_SAME.get(op.name, op.name))
        return f"({name}'s {' + '.join(words)})"

    def taken(self, module: nn.Module, method: str) -> str:
        """What the callers do with what a method hands on: "added by GPT2Block"."""
        ways = [
            f"{' and '.join(v for v in (', '.join(verbs[:-1]), verbs[-1]) if v)} by {by}"
            for verbs, by in self.ways(module, method, set())
            if verbs
        ]
        return " or ".join(dict.fromkeys(ways)) or "taken up by the caller"

    def ways(
        self, module: nn.Module, method: str, seen: set[Op]
    ) -> Iterator[tuple[list[str], str]]:
        """What each caller does with the value that a method hands on, and the caller's name."""
        for caller, where, call in self.callers.get((module, method), []):
            if call in seen:
                continue
            made, op, verbs = self.plan(caller, where), call, []
            while out := made.out_of(op):
                op = out[0].consumer
                if op.name not in _SILENT:
                    verbs.append(_DONE.get(op.name, op.name))
            if op.name == "return":
                for more, by in self.ways(caller, where, seen | {call}):
                    yield verbs + more, by
            else:
                yield verbs, self.kinds[caller].__name__ if caller is not module else where

    def source(self, name: str) -> str:
        """The rewritten methods of a module, as :meth:`tridrop.swapping.Report.source` has them."""
        if name not in self.modules:
            raise ValueError(f"the model has no module named {name!r}")
        module = self.modules[name]
        work = self.works.get(module)
        text = vars(type(module)).get("_tridrop_text")  # of a layer of Keras
        if text is not None:
            return f"{text}\n"
        if work is None or not work.changes() or not (work.plans or work.lora):
            kind = self.kinds.get(module, type(module))
            why = "it became tridrop's own class" if _is_ours(module) else (
                "nothing in it was rewritten; see the report for what was left and why"
            )  # fmt: skip
            raise ValueError(f"{name!r} is a {kind.__name__}: {why}")
        if work.lora is not None:
            return ast.unparse(work.lora.text) + "\n"
        texts, first = [], 0
        for method, made in work.plans.items():
            if made.emitted:
                texts.append(_text(made, first, ""))
            if method in work.bare:
                texts.append(_text(work.bare[method], first, "_tridrop_"))
            first += len(made.places)
        return "\n\n".join(texts) + "\n"


def _is_ours(module: nn.Module) -> bool:
    kind = type(module)
    return kind in REPLACEMENTS.values() or (is_keras(module) and "_tridrop_base" in vars(kind))


def _text(made: Plan, first: int, prefix: str) -> str:
    node = emission.emit(made, first)
    node.name = prefix + node.name
    node.decorator_list = []  # the decorators stay in effect, and are not part of this text
    heading = (
        "# For callers that take over what this returns before it is computed.\n" if prefix else ""
    )
    return heading + ast.unparse(node)


def remade(counts: Mapping[str, int]) -> str:
    """What memory=True changes in a model, in words."""
    names = {"norm": "norms", "activation": "activations", "product": "gated products"}
    given = [f"{counts[name]} {text}" for name, text in names.items() if counts.get(name)]
    takers = counts.get("linear", 0)
    if not given or not takers:
        return "memory: found nothing that backward could recompute."
    return (
        f"memory: backward recomputes the results of {', '.join(given)}; those of the {takers} "
        "linear layers that take such a result do not keep it. report.verify(batch) counts the "
        "bytes."
    )
