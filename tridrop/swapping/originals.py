"""The functions of torch that a swap replaces, in torch's own version: user code may patch them.

If a function had been patched before tridrop was imported, its original is unknown, and no function
is taken for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .present import is_original


def _original(owner: Any, name: str) -> Any:
    return getattr(owner, name) if is_original(owner, name) else _original


_DROPOUT, _TORCHS_DROPOUT = _original(F, "dropout"), _original(torch, "dropout")
_SOFTMAX, _TORCHS_SOFTMAX = _original(F, "softmax"), _original(torch, "softmax")
_ATTENTION = _original(F, "scaled_dot_product_attention")
_DROPOUT_CODE, _SOFTMAX_CODE = _DROPOUT.__code__, _SOFTMAX.__code__


def is_dropout(function: Any) -> bool:
    """Whether a function is torch's dropout, with torch's code."""
    if function is _DROPOUT:
        return function.__code__ is _DROPOUT_CODE
    return function is _TORCHS_DROPOUT


def is_softmax(function: Any) -> bool:
    """Whether a function is torch's softmax; None stands for the method of tensors."""
    if function is _SOFTMAX:
        return function.__code__ is _SOFTMAX_CODE
    return function is None or function is _TORCHS_SOFTMAX


def is_attention(function: Any) -> bool:
    """Whether a function is torch's scaled_dot_product_attention."""
    return function is _ATTENTION
