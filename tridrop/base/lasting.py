"""Tensors that outlive the block in which they are made: seeds, tables of seeds, rates."""

from __future__ import annotations

import torch
from torch import Tensor

_is_compiling, _is_inference = torch.compiler.is_dynamo_compiling, torch.is_inference_mode_enabled


def lasting(made: Tensor) -> Tensor:
    """``made`` as a tensor that may be saved for backward: under inference_mode, a copy.

    >>> with torch.inference_mode():
    ...     lasting(torch.ones(2)).is_inference()
    False
    """
    if _is_compiling() or not _is_inference():  # Dynamo cannot trace the second call
        return made
    with torch.inference_mode(False):
        return made.clone()
