"""Subclasses that stand in for torch's own modules, and for a library's drop path."""

from __future__ import annotations

from torch import Tensor, nn

from .. import nn as tridrop_nn
from . import kinds, lazy
from .pending import value


class Dropout(tridrop_nn.Dropout):
    """A torch.nn.Dropout that draws tridrop's mask; of nested tensors torch's."""

    _tridrop_base = nn.Dropout

    def _nested(self, input: Tensor) -> Tensor:
        return nn.Dropout.forward(self, input)


class MultiheadAttention(tridrop_nn.MultiheadAttention):
    """A torch.nn.MultiheadAttention that runs on tridrop's attention."""

    _tridrop_base = nn.MultiheadAttention


def _stand_in(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of tridrop.nn's class of that name, which swap can tell from a user's."""
    name = base.__name__
    ours = getattr(tridrop_nn, name)
    body = {"_tridrop_base": base, "__module__": __name__, "__doc__": f"A torch.nn.{name}."}
    return type(name, (ours,), body)


Dropout1d, Dropout2d, Dropout3d = map(_stand_in, (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
AlphaDropout, FeatureAlphaDropout = map(_stand_in, (nn.AlphaDropout, nn.FeatureAlphaDropout))


REPLACEMENTS: dict[type, type[nn.Module]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
    nn.MultiheadAttention: MultiheadAttention,
}

for base, ours in REPLACEMENTS.items():
    if base in kinds.KNOWN:
        kinds.KNOWN[ours] = kinds.KNOWN[base]


def drop_path_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a library's drop path where it is called from what was not rewritten."""
    out: Tensor = value(lazy.samples(self, x, self.__dict__.get("_tridrop_site")))
    return out
