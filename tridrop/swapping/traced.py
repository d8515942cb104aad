"""What torch.fx.symbolic_trace gets of a rewritten forward: nodes that read their mode when run.

The tracer hands Proxies to forwards, of which nothing is known before the graph runs. Modules are
then called as they are (``calls.heard`` says so), and torch's dropouts are leaves of a graph. What
else drops becomes one node: a library's drop path, which reads its rate and mode at each call like
any leaf, and functions, which keep the arguments that they were given, as torch's do.
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
    """A call of a module, as one node whatever the tracer looks into."""
    path = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return x.tracer.create_proxy("call_module", path, (x,), {})


def _node(function: Callable[..., Any], x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    return x.tracer.create_proxy("call_function", function, args, kwargs)


def _seed(number: int | None, x: Tensor) -> Tensor | None:
    """The seed of a place under tridrop.rng; None leaves it to the op."""
    return seeds.seed_for(x.device, None, number) if seeds.active() else None


def dropout(number: int | None, x: Any, p: Any, training: bool, inplace: bool = False) -> Any:
    """torch.nn.functional.dropout at the place of a number, where nothing is fused with it."""
    if isinstance(x, Proxy) and not inplace:
        return _node(dropout, x, number, x, p, training)
    if inplace or not fits(x) or not spec.drops(p, training):
        return torch.nn.functional.dropout(x, p, training, inplace)
    return F.dropout(x, p, seed=_seed(number, x))


def attention(number: int | None, *args: Any, **kwargs: Any) -> Any:
    """torch.nn.functional.scaled_dot_product_attention; without dropout it stays that."""
    query = args[0] if args else kwargs["query"]
    if isinstance(query, Proxy):
        return _node(attention, query, number, *args, **kwargs)
    p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if p == 0 or not fits(query):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs, seed=_seed(number, query))
