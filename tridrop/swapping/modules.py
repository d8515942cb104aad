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
    """Base of the stand-ins, which have the name and the ``__module__`` of torch's class.

    torch.fx recognises the leaves of a graph by these, and other libraries what to wrap. Since that
    name finds torch's class and not the stand-in, pickling and copying go through :func:`stand_in`.
    """

    _tridrop_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(max(protocol, 2))
        base = self._tridrop_base
        if found[:2] != (copyreg.__newobj__, (REPLACEMENTS[base],)):  # type: ignore[attr-defined]
            return found
        return (stand_in, (base,), *found[2:])


def stand_in(base: type[nn.Module]) -> nn.Module:
    """An empty module of the class that takes the place of ``base``; unpickling calls this."""
    kind = REPLACEMENTS[base]
    made: nn.Module = kind.__new__(kind)
    return made


def _stand_in(base: Any, **more: Any) -> type[nn.Module]:
    """A subclass of the class of that name in tridrop.nn, which swap can tell from a user's own.

    If the forward of torch's class is replaced, or a function of torch that it calls, then the
    replacement runs.
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
    """Nested tensors take torch's own dropout."""
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
    """The forward of a library's drop path for callers that were not rewritten."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, x: Any) -> Any:
        if isinstance(x, Proxy):
            return traced.leaf(self, x)
        kind = kinds.cached_kind(made)
        if kind is None or not kinds.is_unchanged(made):
            return base.forward(self, x)
        return value(lazy.samples(self, kind, x, self.__dict__.get("_tridrop_site")))

    return forward
