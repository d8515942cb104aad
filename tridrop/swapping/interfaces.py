"""Sets tridrop's attention in models of transformers, which look their attention up by name."""

from __future__ import annotations

import dis
import inspect
import weakref
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

from ..integrations import transformers
from . import classes
from .kinds import base_of
from .originals import is_attention
from .present import At, Holds, holds
from .survey import Survey

ATTENTION = "tridrop"  # the name of the attention function in transformers
# the names in the model files of transformers
_TABLE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
_BEFORE = "_tridrop_attention"  # the key in a model's __dict__ for the function it had before


class Interfaces:
    """The attention modules of a survey whose model looks their function up by name."""

    def __init__(self, survey: Survey) -> None:
        self.owners: dict[nn.Module, nn.Module] = {}  # attention module -> its model
        # why a model keeps its function; empty if it does not
        self.reasons: dict[nn.Module, str] = {}
        # model -> class name -> functions that tridrop's attention replaces
        self.looked_up: dict[nn.Module, dict[str, list[At]]] = {}
        modules = {name: module for module, name in survey.names.items()}
        rates: dict[nn.Module, list[float | None]] = {}
        for module in survey.recipes:
            for method, place in survey.work(module).places:
                if place.op.name == "interface":
                    owner = self._owner(survey.names[module], modules)
                    if owner is not None:
                        self.owners[module] = owner
                        rates.setdefault(owner, []).append(survey.rate(module, place.op))
                        base = base_of(module)
                        text = classes.text_of(base, survey.recipes[module].children)
                        found = _looked_up(text.methods[method].function, _chosen(owner))
                        self.looked_up.setdefault(owner, {})[base.__name__] = found
        for owner, each in rates.items():
            self.reasons[owner] = self._why_not(owner, each, survey)

    @staticmethod
    def _owner(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
        """The innermost transformers model that contains a module."""
        while True:
            name = name.rpartition(".")[0]
            if hasattr(modules.get(name), "set_attn_implementation"):
                return modules[name]
            if not name:
                return None

    def _why_not(self, owner: Any, rates: list[float | None], survey: Survey) -> str:
        now = _chosen(owner)
        if not survey.levels.attention:
            return "its switch is off"
        if now == ATTENTION:
            return ""
        if all(p == 0 for p in rates):
            return "its dropout is 0"
        if not owner._can_set_attn_implementation():
            return "its class does not support another attention function"
        each = self.looked_up[owner].values()
        if now not in ("eager", "sdpa", None):
            found = next((at.now() for places in each for at in places), None)
            return f"{now} was chosen for it{_what_it_drops(now, found)}"
        if now != "eager" and not is_attention(F.scaled_dot_product_attention):
            return "torch's scaled_dot_product_attention was replaced"
        if now == "eager" and getattr(owner.config, "reorder_and_upcast_attn", False):
            return "it upcasts its scores (reorder_and_upcast_attn)"
        replaced = [at.name for found in each for at in found if _is_replaced(at)]
        return f"its attention function was replaced: {replaced[0]}" if replaced else ""

    def reason(self, module: nn.Module) -> str:
        """Why an attention module keeps its attention function; empty if it does not."""
        owner = self.owners.get(module)
        return (
            "no transformers model around it sets its attention function"
            if owner is None
            else self.reasons[owner]
        )

    def apply(self) -> None:
        """Set tridrop's attention where there is no reason against it."""
        for owner, reason in self.reasons.items():
            now = _chosen(owner)
            if not reason and now != ATTENTION:
                transformers.register()
                owner.set_attn_implementation(ATTENTION)  # type: ignore[operator]
                owner.__dict__[_BEFORE] = now

    def read(self) -> dict[str, list[Holds]]:
        """For each class name, checks that the functions it replaces are the same."""
        found: dict[str, list[Holds]] = {}
        for owner, places in self.looked_up.items():
            if not self.reasons[owner]:
                chosen = _stays(weakref.ref(owner))
                before = owner.__dict__.get(_BEFORE, _chosen(owner))
                torchs = () if before == "eager" else (At(F, "scaled_dot_product_attention"),)
                for name, each in places.items():
                    found.setdefault(name, []).extend((holds(*each, *torchs), chosen))
        return found


def restore_attention(model: Any) -> None:
    """Set the attention function that a model had, unless it was given another one since."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None and _chosen(model) == ATTENTION:
        model.set_attn_implementation(before)


def _chosen(model: Any) -> str | None:
    found: str | None = model.config._attn_implementation
    return found


def _stays(model: weakref.ref[Any]) -> Holds:
    """A check that a swapped model still has tridrop's attention."""

    def stays() -> bool:
        now = model()
        return now is None or _BEFORE not in now.__dict__ or _chosen(now) == ATTENTION

    return stays


def _looked_up(function: FunctionType, chosen: str | None) -> list[At]:
    """Where the attention function is that a method finds by a name of transformers."""
    table = function.__globals__.get(_TABLE)
    if table is not None and chosen in table:
        return [At(table, str(chosen))]
    names = [name for name in function.__code__.co_names if name.endswith(_EAGER)]
    return [At(function.__globals__, name) for name in names if name in function.__globals__]


def _what_it_drops(name: str, function: Any) -> str:
    """What a function of transformers' table does with a rate, where it is not to drop by it."""
    if name == "flex_attention":
        return ", which raises in training where its rate is not 0"
    if name in ("flash_attention_3", "flash_attention_4"):
        return ", which drops nothing: transformers leaves the rate out where a kernel takes none"
    return "" if _may_read(function, "dropout") else ", which drops nothing: it reads no rate"


def _may_read(function: Any, argument: str) -> bool:
    """Whether a function names an argument, or hands on what it is given without naming it."""
    code = getattr(function, "__code__", None)
    if code is None or argument in (*code.co_varnames, *code.co_consts):
        return True
    count = code.co_argcount + code.co_kwonlyargcount
    starred = sum(bool(code.co_flags & f) for f in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    names = code.co_varnames[count : count + starred]
    loads = (at.argval for at in dis.get_instructions(code) if at.opname.startswith("LOAD"))
    return any(name in names for x in loads for name in (x if isinstance(x, tuple) else (x,)))


def _is_replaced(at: At) -> bool:
    """Whether a function is neither transformers' nor, if eager, of the model's own file."""
    function = at.now()
    if not isinstance(function, FunctionType) or function.__name__ != function.__qualname__:
        return True
    home = function.__globals__
    return home is not at.owner and home["__name__"].partition(".")[0] != "transformers"
