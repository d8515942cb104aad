"""The dropout mask of attention, and the bits of elements; their mask is in elementwise.py."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...contract import choice
from ...contract import mask as contract
from ...spec.attention import AttentionOptions


def attention_keep_mask(
    seed: Tensor,
    shape: tuple[int, ...],
    p: Tensor | None,
    options: AttentionOptions,
    draw: ModuleType = contract,
) -> Tensor:
    """See ``backends.protocol.Backend.attention_keep_mask``; ``draw`` is the module that draws."""
    threshold: int | Tensor = options.threshold()
    if p is not None:
        threshold = contract.rate_table(p)[0].to(torch.int64)
    keep = draw.attention_keep_mask(seed, shape, threshold, origin=options.origin)
    return keep.clone(memory_format=torch.contiguous_format)  # it may be a slice of whole tiles


def decision_bits(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """See ``backends.protocol.Backend.decision_bits``."""
    return choice.bits(seed, shape)
