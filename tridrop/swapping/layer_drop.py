"""Finds LayerDrop in forwards of libraries: a random number on the host skips whole layers.

Fan, Grave, Joulin, "Reducing transformer depth on demand with structured dropout", ICLR 2020.
Models of transformers draw the number from torch, NumPy or Python's random, and compare it with a
rate::

    dropout_probability = torch.rand([])
    if dropout_probability < self.layerdrop:
        continue

A report lists it among the other draws. Although its names contain "drop", it is no dropout, so
that training mode is not needed for one; this module tells the two apart.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import draws
from .recognise import Method, path_of, resolve, self_of

_SCALARS = ("", "[]", "()", "1")  # the shapes of one number, as torch.rand is given them


@dataclass(frozen=True)
class LayerDrop:
    """A comparison of a random number with a rate.

    Attributes:
        rate: what the number is compared with, as a path below self.
        names: all names in the method that belong to it, of the number and of the rate.
    """

    rate: str
    names: frozenset[str]

    def rate_of(self, module: nn.Module) -> float | None:
        """The rate of a module, if it is a number that can be read."""
        found: Any = resolve(module, self.rate)
        if found is None:  # it may be a property, of a configuration for instance
            found = module
            for part in self.rate.split("."):
                found = getattr(found, part, None)
        return float(found) if isinstance(found, (int, float)) else None


def find(method: Method) -> Iterator[LayerDrop]:
    """Every LayerDrop in a method."""
    owner = self_of(method.node)
    drawn = set()  # variables that hold a random number
    for node in ast.walk(method.node):
        if isinstance(node, ast.Assign) and _is_drawn(method, node.value):
            drawn |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(method.node):
        if not isinstance(node, ast.Compare) or len(node.comparators) != 1:
            continue
        for number, rate in ((node.left, node.comparators[0]), (node.comparators[0], node.left)):
            name = number.id if isinstance(number, ast.Name) else ""
            path = path_of(rate, owner)
            if path is None or "drop" not in path.lower():
                continue
            if name in drawn or _is_drawn(method, number):
                yield LayerDrop(path, frozenset({name, *path.split(".")}))


def _is_drawn(method: Method, e: ast.expr) -> bool:
    """Whether an expression draws one random number for use on the host."""
    if not isinstance(e, ast.Call):
        return False
    path: list[str] = []
    at: ast.expr = e.func
    while isinstance(at, ast.Attribute):
        path.insert(0, at.attr)
        at = at.value
    if not isinstance(at, ast.Name):
        return False
    called: Any = method.function.__globals__.get(at.id)
    for part in path:
        called = getattr(called, part, None)
    if called is torch.rand:
        return ", ".join(ast.unparse(a) for a in e.args) in _SCALARS
    return bool(draws.generator_of(called))
