"""Finds the modules of a model that drop while they are in training mode.

Dropouts of torch and tridrop are recognised by their type, a library's drop path by the form of its
forward, and any other module by its source: if a method reads ``self.training`` for a dropout, the
module itself has to be in training mode for that dropout.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.torch_private import AnyDropout
from ..nn.modules import _Site as Site
from . import classes, kinds, layer_drop
from .kinds import base_of
from .recognise import self_of
from .survey import is_torchs


@dataclass(frozen=True)
class Dropping:
    """A module that drops while its ``training`` is True.

    Attributes:
        name: its name in the model.
        module: the module.
        drops: False if it drops nothing itself, and needs training mode only so that torch does not
            take an inference path that omits the dropouts of its children.
        reads: True if the source of its methods showed that it drops.
        others: the places where that source reads ``self.training`` for something else.
    """

    name: str
    module: nn.Module
    drops: bool = True
    reads: bool = False
    others: tuple[str, ...] = ()


def find(model: nn.Module) -> tuple[list[Dropping], list[str]]:
    """The modules of ``model`` that drop; and, in words, those whose source could not be read."""
    found, unknown = [], []
    for name, module in model.named_modules():
        base = base_of(module)
        if isinstance(module, torch.jit.ScriptModule):
            unknown.append(f"{_title(name, module)} is compiled by TorchScript")
        elif drops_by_type(module):
            found.append(Dropping(name, module))
        elif base in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
            found.append(Dropping(name, module, drops=False))
        elif not is_torchs(base):
            drops, others, unread = _read(module, base)
            if drops:
                found.append(Dropping(name, module, reads=True, others=tuple(others)))
            unknown += [f"{_title(name, module)}.{method}: {why}" for method, why in unread]
    return found, unknown


def drops_by_type(module: nn.Module) -> bool:
    """Whether a module is a dropout, or a module of torch that drops in its own forward."""
    if isinstance(module, (AnyDropout, Site)):
        return True
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    kind = kinds.kind_of(module)
    return kind is not None and kind.name == "drop_path"


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _read(module: nn.Module, base: type) -> tuple[bool, list[str], list[tuple[str, str]]]:
    """Whether a module's methods drop where ``self.training`` is set, where they read it for
    something else, and the methods that could not be read."""
    text = classes.text_of(base, classes.children_of(module, base))
    unread = [
        (name, why) for name, why in text.unread.items() if _names_both(getattr(base, name, None))
    ]
    if _names_both(module.__dict__.get("forward")):
        unread.append(("forward", "it was replaced on the instance"))
    drops, others = False, []
    for name, method in text.methods.items():
        skips = list(layer_drop.find(method))
        # The names that belong to LayerDrop contain "drop", but mean no dropout.
        besides = frozenset().union(*(skip.names for skip in skips))
        idle = bool(skips) and all(skip.rate_of(module) == 0 for skip in skips)
        for names, node in _uses(method.node, self_of(method.node)):
            drop = not names <= besides
            drops |= drop
            if not drop and not (names and idle):
                others.append(f"{base.__name__}.{name}, line {node.lineno}")
    # An unreadable method that names both is taken for a dropout, and reported.
    return drops or bool(unread), others, unread


def _uses(method: ast.FunctionDef, owner: str) -> Iterator[tuple[frozenset[str], ast.Attribute]]:
    """Every use of ``self.training`` in a method, with the names that show that it is for a
    dropout.

    These are the names that contain "drop" in the innermost call, argument or statement around it
    that has any:
    ``F.dropout(x, self.p, self.training)``,
    ``attention(q, k, v, dropout_p=0.1 if self.training else 0.0)``,
    ``p = self.dropout if self.training else 0.0``.
    """
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not (isinstance(node, ast.Attribute) and node.attr == "training"):
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id == owner):
            continue
        at: ast.AST = node
        while not isinstance(at, ast.stmt) and not _drop_names(at):
            at = parents[at]
        yield _drop_names(at), node


def _drop_names(node: ast.AST) -> frozenset[str]:
    found = {str(getattr(n, k, "")) for n in ast.walk(node) for k in ("id", "attr", "arg")}
    return frozenset(name for name in found if "drop" in name.lower())


def _names_both(function: Any) -> bool:
    """Whether the names in a function's code include ``training`` and one with "drop"."""
    code = getattr(inspect.unwrap(function) if function is not None else None, "__code__", None)
    names = getattr(code, "co_names", ())
    return "training" in names and any("drop" in name.lower() for name in names)
