"""Rewritten forwards under torch.fx.symbolic_trace: nodes that read their mode when they run.

The tracer passes Proxies to forwards, whose values are unknown before the graph runs. Modules are
then called as they are (since ``heard`` is true), and torch's dropouts are leaves of the graph.
Everything else that drops becomes one node: a library's drop path, which reads its rate and mode in
each call as a leaf does; and functions, which keep the arguments they were traced with, as torch's
functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..contract import seeds
from ..spec import elementwise as spec
from .pending import fits


def leaf(module: nn.Module, x: Proxy) -> Proxy:
    """A call of a module as one node, whichever modules the tracer looks into."""
    path = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return x.tracer.create_proxy("call_module", path, (x,), {})


def _node(function: Callable[..., Any], x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    return x.tracer.create_proxy("call_function", function, args, kwargs)


def _seed(number: int | None, x: Tensor) -> Tensor | None:
    """The seed of a place under tridrop.rng; None lets the op draw one."""
    return seeds.seed_for(x.device, None, number) if seeds.active() else None


def dropout(number: int | None, x: Any, p: Any, training: bool, inplace: bool = False) -> Any:
    """torch.nn.functional.dropout under the number of its place, fused with nothing."""
    if isinstance(x, Proxy) and not inplace:
        return _node(dropout, x, number, x, p, training)
    if inplace or not fits(x) or not spec.drops(p, training):
        return torch.nn.functional.dropout(x, p, training, inplace)
    return F.dropout(x, p, seed=_seed(number, x))


def attention(number: int | None, *args: Any, **kwargs: Any) -> Any:
    """torch.nn.functional.scaled_dot_product_attention; tridrop's if it drops."""
    query = args[0] if args else kwargs["query"]
    if isinstance(query, Proxy):
        return _node(attention, query, number, *args, **kwargs)
    p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if p == 0 or not fits(query):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs, seed=_seed(number, query))
