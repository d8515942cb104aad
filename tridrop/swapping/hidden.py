"""Modules that a model keeps where torch does not look: in plain lists, tuples and dicts.

torch knows the modules that are attributes, or in its own ModuleList and ModuleDict. The others are
in no ``model.modules()``: ``train()``, ``eval()`` and ``to()`` do not reach them, but a forward
calls them, and they may drop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..base.modules import all_modules, is_keras, named_parts

_TORCHS = frozenset(nn.Module().__dict__)  # torch's own tables in a module


def hidden_roots(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in containers of Python's, by the names that lead to them; without their parts.

    Those that have a place in the model as well are none.
    """
    known = {id(module) for module in all_modules(model)}
    found: dict[str, nn.Module] = {}
    # Keras tracks the lists and dicts of its layers, so nothing is hidden in them.
    todo = [(name, part) for name, part in named_parts(model) if not is_keras(part)]
    while todo:
        name, owner = todo.pop(0)
        for key, value in owner.__dict__.items():
            if key in _TORCHS or not isinstance(value, (list, tuple, set, dict)):
                continue
            for where, module in _within(value, f"{name}.{key}" if name else key, depth=3):
                if id(module) not in known:
                    found[where] = module
                    parts = list(named_parts(module, where))
                    known |= {id(part) for _, part in parts}
                    todo += [(n, part) for n, part in parts if not is_keras(part)]
    return found


def with_hidden(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by name, with those that are hidden."""
    found = dict(named_parts(model, remove_duplicate=False))
    for name, module in hidden_roots(model).items():
        found |= dict(named_parts(module, name))
    return found


def _within(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container, and in containers in it."""
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, dict) and depth:
        for key, item in value.items():
            yield from _within(item, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, (list, tuple, set)) and depth:
        for i, item in enumerate(value):
            yield from _within(item, f"{path}[{i}]", depth - 1)
