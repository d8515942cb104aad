"""Fuses sums that follow a dropout layer in the ``call`` of Keras layers, by reading its source.

Layers of KerasHub, and many that users write, contain these two statements in a row::

    x = self._feedforward_dropout(x, training=training)
    x = x + residual

The dropped value has no other user, so both become one call of :func:`dropout_add`, which checks in
each call whether it may compute both at once. The rest of the method stays as it is.
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

MARK = "_tridrop_sum"  # the key in the __dict__ of a dropout layer whose sum is fused
# The key in that of a functional model with the numbers of such layers and sums, see
# keras_graphs.py. Keras does not save attributes with names like this.
GRAPH = "__tridrop_sums"


class Sums(NamedTuple):
    """The sums in a ``call``: their dropout layers' attributes, and the new function."""

    attributes: tuple[str, ...]
    call: FunctionType
    text: str


_read: dict[tuple[FunctionType, Any], Sums | None] = {}


def sums_of(base: type) -> Sums | None:
    """The sums in the ``call`` of a class; None if there are none, or it has no readable source."""
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
    """The lists of statements in a function, without those in functions inside it."""
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
    """For two statements that are a dropout and a sum: the layer's attribute, the new statement."""
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
    behind = _is(add.left, name)  # whether the residual is the second operand of the sum
    arguments = [called.func, called.args[0], sides[behind], ast.Constant(behind)]
    function = ast.Attribute(ast.Name("_tridrop", ast.Load()), "dropout_add", ast.Load())
    new = ast.Assign([first.targets[0]], ast.Call(function, arguments, called.keywords))
    for part in (new, new.value, function, function.value, arguments[-1]):
        ast.copy_location(part, second)
    return called.func.attr, new


def dropout_add(layer: Any, x: Any, residual: Any, behind: bool, training: Any) -> Any:
    """``layer(x, training=training) + residual``, as one op where possible.

    Without ``behind`` it is ``residual + layer(...)``.
    """
    if training is True and fits(layer, x, residual):
        return at_once(layer, x, residual)
    dropped = layer(x, training=training)
    return dropped + residual if behind else residual + dropped


def at_once(layer: Any, x: Any, residual: Any) -> Any:
    """The training call of a dropout layer and the sum, which :func:`fits` has looked at.

    :mod:`.locate` tells whose a draw is by the first argument.
    """
    return F.dropout_add(x, residual, layer.rate, seed=layer.next_seed(x))


class _Runtime:
    dropout_add = staticmethod(dropout_add)


def only_computes(layer: Any) -> bool:
    """Whether a call of a Keras layer is its class's ``call``, and nothing sees or adds to it."""
    return (
        "call" not in layer.__dict__
        and layer.activity_regularizer is None
        and layer._remat_mode is None
        and not heard(layer)
    )


def fits(layer: Any, x: Any, residual: Any) -> bool:
    """Whether the layer only drops, and both operands have one shape, dtype and device."""
    attributes = getattr(layer, "__dict__", {})
    return (
        MARK in attributes
        and type(layer)._tridrop_holds()
        and layer.rate > 0
        and layer.noise_shape is None
        and only_computes(layer)
        and all(type(t) in (Tensor, nn.Parameter) and t.is_floating_point() for t in (x, residual))
        and x.dtype == residual.dtype
        and x.shape == residual.shape
        and x.device == residual.device
        and x.device.type != "meta"
        and (not layer.autocast or x.dtype == getattr(torch, layer.compute_dtype))
    )
