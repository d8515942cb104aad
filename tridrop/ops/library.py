"""The operator library that torch sees as torch.ops.tridrop.*

Operators are schemas, shape functions and the way to a backend; no math. They are opaque so that
torch.compile, export and the autograd engine treat a call as one node, with the same random bits
everywhere. The derivative lives above, in autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..spec import check_probability

_library = torch.library.Library("tridrop", "DEF")
_O = TypeVar("_O")


def define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator: its schema, what it does on any device, and the shapes it returns."""
    name = schema.split("(")[0]
    _library.define(schema, tags=tuple(tags))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tridrop::{name}", fake, lib=_library)


def read_rate(p_tensor: Tensor | None, options: _O) -> tuple[Tensor | None, _O]:
    """A tensor p that the host can read becomes a float, checked as any other."""
    if p_tensor is None or p_tensor.device.type != "cpu":
        return p_tensor, options
    p = float(p_tensor)
    check_probability(p)
    return None, dataclasses.replace(options, p=p)  # type: ignore[type-var]


def filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The results with empty tensors for those that are absent: an operator cannot return None."""
    return tuple(like.new_empty(0) if t is None else t for t in results)
