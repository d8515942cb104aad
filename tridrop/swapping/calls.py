"""Calls of a module or method whose end the caller takes over."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.compiler import is_compiling

from ..base.modules import CALL
from ..base.torch_private import has_global_hook


def call(owner: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``name`` of ``owner`` ("forward": ``owner`` itself), whose end the caller takes over."""
    bare = getattr(type(owner), f"_tridrop_{name}", None)
    if bare is None or name in owner.__dict__:
        return (owner if name == "forward" else getattr(owner, name))(*args, **kwargs)
    if name != "forward":
        return bare(owner, *args, **kwargs)
    if not _bare(owner):
        return owner(*args, **kwargs)
    out = bare(owner, *args, **kwargs)
    for hook in owner._forward_hooks.values():
        hook(owner, args, out)
    return out


def _bare(module: nn.Module) -> bool:
    """Whether a module's forward can be called directly, without its ``__call__``.

    The only hooks that allow this are those by which transformers records attention weights; the
    caller runs them.
    """
    return not (
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_global_hook()
        or type(module).__call__ is not nn.Module.__call__
        or (nn.Module.__call__ is not CALL and not is_compiling())
        or module._compiled_call_impl is not None
        or not all(_records_weights(module, hook) for hook in module._forward_hooks.values())
    )


def _records_weights(module: nn.Module, hook: Any) -> bool:
    """Whether a hook is one by which transformers records an output other than the first."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing" and bool(
        getattr(type(module), "_tridrop_tuple", False)
    )
