"""torch's functions that are exchanged, as torch has them; somebody may put others in their place.

A function that was replaced before tridrop was imported is not there: nothing is known of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .present import is_own


def _own(owner: Any, name: str) -> Any:
    return getattr(owner, name) if is_own(owner, name) else _own


_DROPOUT, _TORCHS_DROPOUT = _own(F, "dropout"), _own(torch, "dropout")
_SOFTMAX, _TORCHS_SOFTMAX = _own(F, "softmax"), _own(torch, "softmax")
_ATTENTION = _own(F, "scaled_dot_product_attention")
_DROPOUT_CODE, _SOFTMAX_CODE = _DROPOUT.__code__, _SOFTMAX.__code__


def is_dropout(function: Any) -> bool:
    """Whether it is torch's dropout, with torch's code."""
    if function is _DROPOUT:
        return function.__code__ is _DROPOUT_CODE
    return function is _TORCHS_DROPOUT


def is_softmax(function: Any) -> bool:
    """Whether it is torch's softmax; None stands for the method of tensors."""
    if function is _SOFTMAX:
        return function.__code__ is _SOFTMAX_CODE
    return function is None or function is _TORCHS_SOFTMAX


def is_attention(function: Any) -> bool:
    """Whether it is torch's scaled_dot_product_attention."""
    return function is _ATTENTION
