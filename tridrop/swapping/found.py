"""Finds the sites of a report: everything in a model that its source shows to drop or draw."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..base.modules import all_modules, is_keras
from . import classes, draws, keras_models, kinds
from .hidden import hidden_roots
from .interfaces import Interfaces
from .kinds import base_of
from .recognise import self_of
from .report import Site
from .rewrite import ATTENTION_PARTS
from .survey import NO_SUCH_MODULE, Survey, has_own_forward, is_torchs

_HIDDEN = "it is kept in a plain list or dict, where torch's train() and to() do not reach it"


def sites_of(model: nn.Module, survey: Survey, interfaces: Interfaces) -> list[Site]:
    """All sites of a model, in the order of its modules and of their code."""
    sites = [site for module in survey.names for site in _sites(module, survey, interfaces)]
    for name, module in hidden_roots(model).items():
        inner = Survey(module, survey.levels)
        each = [s for part in inner.names for s in _sites(part, inner, Interfaces(inner))]
        for site in (*each, *keras_models.Layers(module, survey.levels).sites()):
            path = f"{name}.{site.module}" if site.module else name
            sites.append(replace(site, module=path, parts=(), stream=None, reason=_HIDDEN))
    return sites


def is_certain(model: nn.Module) -> bool:
    """Whether a model without sites cannot drop: it has only torch's modules, and no hooks."""
    for module in all_modules(model):
        if is_keras(module):
            if not keras_models.is_certain(module):
                return False
            continue
        base = base_of(module)
        original = base.__module__.startswith("torch.nn.modules.") and has_own_forward(base)
        original = original and (base not in kinds.TYPES or kinds.kind_of_type(base) is not None)
        changed = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        if not original or changed or isinstance(module, torch.jit.ScriptModule):
            return False
    return not hidden_roots(model)


def _sites(module: nn.Module, survey: Survey, interfaces: Interfaces) -> list[Site]:
    """The sites of one module."""
    name, kind = survey.names[module], base_of(module).__name__
    first = module.__dict__.get("_tridrop_site")
    found = []
    if module in survey.recipes:
        work = survey.work(module)
        text = classes.text_of(base_of(module), survey.recipes[module].children)
        for i, (method, place) in enumerate(work.places):
            parts, reason = place.parts, ""
            if place.op.name == "interface":
                reason = interfaces.reason(module)
                parts = () if reason else ATTENTION_PARTS
            elif survey.in_place(module, place.op):
                parts, reason = (), "it works in place"
            elif place.op.name == "other":
                reason = place.op.reason
            elif not parts:
                reason = "its switch is off"
            stream = None if first is None or not parts else first + i
            p = survey.rate(module, place.op)
            read = text.methods.get(method)
            when = "" if read is None else read.flow.condition(place.op.node, self_of(read.node))
            found.append(Site(name, kind, place.text, place.line, p, parts, reason, stream, when))
        uncalled = survey.why_uncalled(module) if _looks_like_dropout(module) else ""
        # The draws inside a drop path are not reported: the module itself is the site.
        for _, place in () if survey.drops(module) else work.drawn:
            reason = uncalled or place.op.reason
            found.append(Site(name, kind, place.text, place.line, None, (), reason, None))
        for method, reason in text.unread.items():
            if text.caught(base_of(module), method) and survey.levels.dropout:
                continue  # it is one of the places above
            if _may_drop(base_of(module), method):
                found.append(Site(name, kind, method, None, None, (), reason, None))
    elif module in survey.left and _drops_unread(module, survey):
        kind = str(getattr(module, "original_name", kind))
        found.append(Site(name, kind, "forward", None, None, (), survey.left[module], None))
    for hook in draws.hooks(module):
        code = str(getattr(hook, "__qualname__", repr(hook)))
        found.append(Site(name, kind, code, None, None, (), "it is a hook that draws", None))
    found += _site_of_module(module, survey, interfaces, bool(found))
    return found


def _site_of_module(
    module: nn.Module, survey: Survey, interfaces: Interfaces, inside: bool
) -> Iterator[Site]:
    """The site that a module is itself; ``inside``: whether its source contains sites already."""
    name, kind = survey.names[module], base_of(module).__name__
    # A dropout whose rate is passed to an attention function may also be called by that function,
    # unless it is tridrop's.
    may_be_called = any(
        interfaces.reason(owner)
        for owner, i in survey.places.get(module, ())
        if survey.work(owner).places[i][1].op.name == "interface"
    )
    if module in survey.places and not may_be_called:
        return
    p = survey.rate_of_module(module)
    drawing = _drawing(module)
    if drawing:
        yield Site(name, kind, str(module), None, p, (), drawing, None)
    elif survey.drops(module) or (not inside and _may_be_dropout(module, survey)):
        reason = survey.why_left(module) or survey.why_not_fused(module)
        parts = () if survey.why_left(module) else survey.parts(module)
        if not may_be_called and reason in ("", NO_SUCH_MODULE):
            reason = survey.why_uncalled(module) or reason
        first = module.__dict__.get("_tridrop_site")
        stream = None if not parts else getattr(module, "site", first)
        yield Site(name, kind, str(module), None, p, parts, reason, stream)


def _drawing(module: nn.Module) -> str:
    """Why a module of torch that draws inside its own operators is left; empty for others."""
    if isinstance(module, nn.RNNBase):
        drops = module.dropout > 0 and module.num_layers > 1
        return "torch drops between its layers, all inside one operator" if drops else ""
    base = base_of(module)
    if base in (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d):
        return "it draws random numbers, and drops nothing"
    return ""


def _drops_unread(module: nn.Module, survey: Survey) -> bool:
    """Whether a module whose source is not read seems to drop, by the names in its forward."""
    if isinstance(module, torch.jit.ScriptModule):
        parent = survey.modules.get(survey.names[module].rpartition(".")[0])
        inner = parent is not module and isinstance(parent, torch.jit.ScriptModule)
        return not inner and draws.in_script(module)
    forward = module.__dict__.get("forward")
    return bool(draws.found_in(forward)) or _may_drop(base_of(module), "forward")


def _may_drop(base: type, method: str) -> bool:
    """Whether a method's code draws, or contains a name with "drop"."""
    function: Any = getattr(base, method, None)
    if is_torchs(base) or function is None:
        return False
    names = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())
    return bool(draws.found_in(function)) or any("drop" in name.lower() for name in names)


def _may_be_dropout(module: nn.Module, survey: Survey) -> bool:
    return survey.could_drop(module) or _looks_like_dropout(module)


def _looks_like_dropout(module: nn.Module) -> bool:
    name = base_of(module).__name__.lower()
    return "dropout" in name or "droppath" in name or "stochasticdepth" in name
