"""Subclasses that stand in for torch's own modules, and for a library's drop path."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from .. import nn as tridrop_nn
from . import kinds, lazy, traced
from .pending import value
from .present import At, guarded


class _StandIn(nn.Module):
    """Of the name and the module of torch's class, by which torch.fx knows the leaves of a graph
    and others what to wrap; so a copy is made by :func:`stand_in` and not by that name."""

    _tridrop_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(max(protocol, 2))
        base = self._tridrop_base
        if found[:2] != (copyreg.__newobj__, (REPLACEMENTS[base],)):  # type: ignore[attr-defined]
            return found
        return (stand_in, (base,), *found[2:])


def stand_in(base: type[nn.Module]) -> nn.Module:
    """An empty module of the class that takes the place of ``base``; what unpickling calls."""
    kind = REPLACEMENTS[base]
    made: nn.Module = kind.__new__(kind)
    return made


def _stand_in(base: Any, **more: Any) -> type[nn.Module]:
    """A subclass of tridrop.nn's class of that name, which swap can tell from a user's.

    Where torch's class has been given another forward, or torch another function that it calls,
    that is what runs.
    """
    name = base.__name__
    ours: Any = getattr(tridrop_nn, name)
    called = tuple(At(F, name) for name in kinds.TYPES[base][1])
    body = {
        "_tridrop_base": base,
        "__module__": base.__module__,
        "__doc__": f"A torch.nn.{name} that draws tridrop's mask.",
        "forward": guarded(At(base, "forward"), getattr(ours, "_dropped", ours.forward), called),
        **more,
    }
    made = type(name, (_StandIn, ours), body)
    kinds.kind_of_type(made)
    return made


def _nested(self: nn.Dropout, input: Tensor) -> Tensor:
    """Of nested tensors torch's."""
    return nn.Dropout.forward(self, input)


Dropout = _stand_in(nn.Dropout, _nested=_nested)
Dropout1d, Dropout2d, Dropout3d = map(_stand_in, (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
AlphaDropout, FeatureAlphaDropout = map(_stand_in, (nn.AlphaDropout, nn.FeatureAlphaDropout))
MultiheadAttention = _stand_in(nn.MultiheadAttention)


REPLACEMENTS: dict[type, type[nn.Module]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
    nn.MultiheadAttention: MultiheadAttention,
}


def drop_path_forward(made: type, base: Any) -> Callable[..., Tensor]:
    """The forward of a library's drop path where it is called from what was not rewritten."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, x: Any) -> Any:
        if isinstance(x, Proxy):
            return traced.leaf(self, x)
        kind = kinds.known(made)
        if kind is None or not kinds.stands(made):
            return base.forward(self, x)
        return value(lazy.samples(self, kind, x, self.__dict__.get("_tridrop_site")))

    return forward
