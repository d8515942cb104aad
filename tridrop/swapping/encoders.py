"""Torch's inference path of encoder layers, which reads weights past the modules that hold them.

In evaluation ``nn.TransformerEncoderLayer`` gives the weights of its linear layers and attention to
one operator. What sits in their place, such as an adapter, is not called then: its result is lost.
torch reads two attributes before it takes the path; they are set so that it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from .survey import base_of

_LAYER, _STACK = "activation_relu_or_gelu", "use_nested_tensor"
_BEFORE = "_tridrop_inference_path"


def close_paths(modules: Iterable[nn.Module]) -> None:
    """Keep encoder layers with adapters, and stacks that would pack tensors for them, off it."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            if _adapted(module):
                _set(module, _LAYER, 0)
        elif isinstance(module, nn.TransformerEncoder) and any(map(_adapted, module.layers)):
            _set(module, _STACK, False)


def open_path(module: nn.Module) -> None:
    """Undo :func:`close_paths` for one module."""
    for name, value in module.__dict__.pop(_BEFORE, {}).items():
        setattr(module, name, value)


def _adapted(layer: nn.Module) -> bool:
    """Whether a part whose weights the path reads does more with them than torch's module."""
    attention = getattr(layer, "self_attn", None)
    parts: list[tuple[Any, Any]] = [(attention, nn.MultiheadAttention)]
    for owner, name in ((attention, "out_proj"), (layer, "linear1"), (layer, "linear2")):
        parts.append((getattr(owner, name, None), nn.Linear))
    classes = [(cast(Any, base_of(part)), torchs) for part, torchs in parts if part is not None]
    return any(own.forward is not torchs.forward for own, torchs in classes)


def _set(module: nn.Module, name: str, value: object) -> None:
    if hasattr(module, name):
        module.__dict__.setdefault(_BEFORE, {})[name] = getattr(module, name)
        setattr(module, name, value)
