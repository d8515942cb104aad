"""Subclasses that stand in for torch's own modules, and for a library's drop path."""

from __future__ import annotations

from torch import Tensor, nn

from .. import nn as tridrop_nn
from . import kinds, lazy
from .pending import value


class Dropout(tridrop_nn.Dropout):
    """A torch.nn.Dropout that draws tridrop's mask."""

    _tridrop_base = nn.Dropout


class MultiheadAttention(tridrop_nn.MultiheadAttention):
    """A torch.nn.MultiheadAttention that runs on tridrop's attention."""

    _tridrop_base = nn.MultiheadAttention


kinds.KNOWN[Dropout] = kinds.KNOWN[nn.Dropout]

REPLACEMENTS: dict[type, type[nn.Module]] = {
    nn.Dropout: Dropout,
    nn.MultiheadAttention: MultiheadAttention,
}


def drop_path_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a library's drop path where it is called from what was not rewritten."""
    out: Tensor = value(lazy.samples(self, x, self.__dict__.get("_tridrop_site")))
    return out
