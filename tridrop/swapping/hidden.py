"""Finds modules that torch does not see, because they are in plain lists, tuples and dicts.

torch registers modules that are attributes, or in its own ModuleList and ModuleDict. Others are
missing from ``model.modules()``: ``train()``, ``eval()`` and ``to()`` do not reach them, but a
forward may call them, and they may drop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..base.modules import all_modules, is_keras, named_parts

_TORCHS = frozenset(nn.Module().__dict__)  # the attributes that every module of torch has


def hidden_roots(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in plain Python containers, by the path to them; without their submodules.

    Modules that are also registered in the model are not among them.
    """
    seen = {id(module) for module in all_modules(model)}
    found: dict[str, nn.Module] = {}
    # Keras tracks the lists and dicts of its layers, so nothing is hidden in them.
    todo = [(name, part) for name, part in named_parts(model) if not is_keras(part)]
    while todo:
        name, owner = todo.pop(0)
        for key, value in owner.__dict__.items():
            if key in _TORCHS or not isinstance(value, (list, tuple, set, dict)):
                continue
            for where, module in _within(value, f"{name}.{key}" if name else key, depth=3):
                if id(module) not in seen:
                    found[where] = module
                    parts = list(named_parts(module, where))
                    seen |= {id(part) for _, part in parts}
                    todo += [(n, part) for n, part in parts if not is_keras(part)]
    return found


def with_hidden(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by name, including the hidden ones."""
    found = dict(named_parts(model, remove_duplicate=False))
    for name, module in hidden_roots(model).items():
        found |= dict(named_parts(module, name))
    return found


def _within(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container, and in containers inside it."""
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, dict) and depth:
        for key, item in value.items():
            yield from _within(item, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, (list, tuple, set)) and depth:
        for i, item in enumerate(value):
            yield from _within(item, f"{path}[{i}]", depth - 1)
