"""Attention that a model of transformers looks up by name, and the choice of tridrop's for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from ..integrations import transformers
from .originals import is_attention
from .rewrite import Levels
from .survey import Survey

ATTENTION = "tridrop"  # the name of the attention function in transformers


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
        if now != "eager" and not is_attention(F.scaled_dot_product_attention):
            return "torch's scaled_dot_product_attention was replaced"
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
