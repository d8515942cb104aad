"""Modules that drop in one line, and what report.verify finds of them."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

import tridrop

X = torch.randn(2, 2, 4, 8)
half = functools.partial(F.dropout, p=0.5)
attend = F.scaled_dot_product_attention


def module(forward, **attributes) -> nn.Module:
    """A module with a forward, in training mode."""
    made = type("Own", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.train()


def verified(model: nn.Module, *inputs, **given):
    """The report of a swap, verified: what the table says is what was seen."""
    report = tridrop.swap(model)
    found = report.verify(*inputs, **given)
    assert "Nothing in this model drops" not in str(report) or not found.drops()
    return report, found
