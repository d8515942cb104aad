"""All modules of a model, Keras' layers included; and whether anything listens to a module's call.

On its torch backend a Keras layer is a torch.nn.Module. But Keras keeps the layers of a functional
model in lists of its own, where torch's ``modules()`` does not find them, and registers other
modules with torch as well. So for a Keras layer its own list counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .torch_private import has_global_hook

CALL = nn.Module.__call__  # torch's own, unless something replaced it before this import


def heard(module: nn.Module) -> bool:
    """Whether anything listens to calls of the module, which therefore must be called.

    These are hooks, and whatever replaces torch's own ``__call__``, as torch.fx.symbolic_trace does
    (and torch.export, which also sees the ops inside).
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_global_hook()
        or (nn.Module.__call__ is not CALL and not is_compiling())
    )


def is_keras(module: Any) -> bool:
    """Whether ``module`` is a layer or a model of Keras 3, on any backend. It imports nothing."""
    layer = getattr(sys.modules.get("keras"), "Layer", None)
    return layer is not None and isinstance(module, layer)


def named_parts(
    model: nn.Module, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model.named_modules``, and the layers of Keras models.

    Keras' layers have their names in Keras, ``transformer_layer_0.self_attention_dropout``. Where
    two layers beside each other have the same name, ``_1`` is added to the second.
    """
    if any(map(is_keras, model.modules())):
        yield from _walk(model, prefix, set(), remove_duplicate)
    else:
        yield from model.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model.modules``, and the layers of Keras models."""
    for _, module in named_parts(model):
        yield module


def _walk(
    module: nn.Module, name: str, seen: set[nn.Module], once: bool
) -> Iterator[tuple[str, nn.Module]]:
    if module in seen and (once or is_keras(module)):
        return
    seen.add(module)
    yield name, module
    for key, child in _children(module):
        yield from _walk(child, f"{name}.{key}" if name else key, seen, once)


def _children(module: Any) -> Iterator[tuple[str, nn.Module]]:
    if not is_keras(module):
        yield from ((key, child) for key, child in module._modules.items() if child is not None)
        return
    used: dict[str, int] = {}
    for layer in module._layers:
        count = used[layer.name] = used.get(layer.name, -1) + 1
        yield f"{layer.name}_{count}" if count else layer.name, layer
    wrapped = module._modules.get("module")  # of a TorchModuleWrapper
    if wrapped is not None and not is_keras(wrapped):
        yield "module", wrapped
