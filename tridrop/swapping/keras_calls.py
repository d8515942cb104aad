"""Sums behind dropout layers in the ``call`` of Keras layers, read from its text and made one op.

In the layers of KerasHub, and in many of one's own, two statements follow each other::

    x = self._feedforward_dropout(x, training=training)
    x = x + residual

Their dropped value has no other user, so both become one call of :func:`dropout_add`, which looks
again, each time, whether it may compute both at once. Everything else in the method stays.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..base.modules import heard
from . import source

MARK = "_tridrop_sum"  # in the __dict__ of a dropout layer whose sum is taken over


class Sums(NamedTuple):
    """What was read of a ``call``: the attributes of its dropout layers, and its new form."""

    attributes: tuple[str, ...]
    call: FunctionType
    text: str


_read: dict[tuple[FunctionType, Any], Sums | None] = {}


def sums_of(base: type) -> Sums | None:
    """The sums in the call of a class; None where there are none, or its text cannot be had."""
    function = getattr(base, "call", None)
    if not isinstance(function, FunctionType) or function.__module__.startswith("keras.src."):
        return None
    key = function, function.__code__
    if key not in _read:
        _read[key] = _sums(function)
    return _read[key]


def _sums(function: FunctionType) -> Sums | None:
    try:
        inner, rewrap = source.unwrap(function)
        node = source.parse(inner)
    except source.Unreadable:
        return None
    if not node.args.args:
        return None
    owner, found = node.args.args[0].arg, []
    uses = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and _is(n.value, owner)]
    for statements in _blocks(node):
        for i in range(len(statements) - 2, -1, -1):
            match = _match(owner, statements[i], statements[i + 1])
            if match is not None and uses.count(match[0]) == 1:
                found.append(match[0])
                statements[i : i + 2] = [match[1]]
    if not found:
        return None
    text = ast.unparse(ast.fix_missing_locations(node))
    new = source.build(inner, node, {"_tridrop": _Runtime})
    return Sums(tuple(found), rewrap(new), text)


def _blocks(node: ast.AST) -> Iterator[list[Any]]:
    """The lists of statements of a function, without those of functions inside of it."""
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        if isinstance(statements, list):
            for statement in statements:
                if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield from _blocks(statement)
            yield statements


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _match(owner: str, first: Any, second: Any) -> tuple[str, ast.Assign] | None:
    """The dropout layer's attribute and the new statement, of two that are a dropout and a sum."""
    if not all(
        isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)
        for s in (first, second)
    ):
        return None
    name, called, add = first.targets[0].id, first.value, second.value
    if (
        not isinstance(called, ast.Call)
        or not isinstance(called.func, ast.Attribute)
        or not _is(called.func.value, owner)
        or len(called.args) != 1
        or isinstance(called.args[0], ast.Starred)
        or [k.arg for k in called.keywords] != ["training"]
        or second.targets[0].id != name
        or not isinstance(add, ast.BinOp)
        or not isinstance(add.op, ast.Add)
    ):
        return None
    sides = [add.left, add.right]
    if not all(isinstance(side, ast.Name) for side in sides) or _is(sides[0], name) == _is(
        sides[1], name
    ):
        return None
    behind = _is(add.left, name)  # the residual is the second of the sum
    arguments = [called.func, called.args[0], sides[behind], ast.Constant(behind)]
    function = ast.Attribute(ast.Name("_tridrop", ast.Load()), "dropout_add", ast.Load())
    new = ast.Assign([first.targets[0]], ast.Call(function, arguments, called.keywords))
    for part in (new, new.value, function, function.value, arguments[-1]):
        ast.copy_location(part, second)
    return called.func.attr, new


def dropout_add(layer: Any, x: Any, residual: Any, behind: bool, training: Any) -> Any:
    """``layer(x, training=training) + residual``, or the residual first; as one op where it may."""
    if training is True and _fits(layer, x, residual):
        return F.dropout_add(x, residual, layer.rate, seed=layer.next_seed(x))
    dropped = layer(x, training=training)
    return dropped + residual if behind else residual + dropped


class _Runtime:
    dropout_add = staticmethod(dropout_add)


def _fits(layer: Any, x: Any, residual: Any) -> bool:
    """Whether a layer's call is its dropout and no more, and the sum one of equal tensors."""
    own = getattr(layer, "__dict__", {})
    return (
        MARK in own
        and "call" not in own
        and type(layer)._tridrop_holds()
        and layer.rate > 0
        and layer.noise_shape is None
        and layer.activity_regularizer is None
        and layer._remat_mode is None
        and not heard(layer)
        and all(type(t) in (Tensor, nn.Parameter) and t.is_floating_point() for t in (x, residual))
        and x.dtype == residual.dtype
        and x.shape == residual.shape
        and x.device == residual.device
        and x.device.type != "meta"
        and (not layer.autocast or x.dtype == getattr(torch, layer.compute_dtype))
    )
