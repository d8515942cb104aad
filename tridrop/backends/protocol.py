"""The functions that a backend module has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.attention import AttentionOptions
from ..spec.elementwise import Options
from ..spec.operands import Operands, Prepared


class Backend(Protocol):
    """The functions of a backend module. ``p`` is a 0-d tensor in the place of ``options.p``."""

    def prepare(
        self,
        family: str,
        shape: tuple[int, ...],
        options: Any,
        operands: Operands,
        wanted: Sequence[Any],
    ) -> Prepared:
        """The op of a family for calls like this one, forward and backward.

        ``family`` is "elementwise", "norm", "softmax", "attention" or "product". ``operands`` is
        the family's tuple in spec/operands.py, for the direction that is called first. ``shape`` is
        that of the results and of the incoming gradients. ``wanted`` holds the dtypes of the
        gradients where backward is called first. The formulas are those of ``backends/reference``.
        """

    def keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: Options, domain: str
    ) -> Tensor:
        """The mask of ``domain``: bool, True where an element is kept."""

    def decision_bits(self, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The 32 bits that the mask of elements compares with T: int64, in [0, 2^32)."""

    def attention_keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: AttentionOptions
    ) -> Tensor:
        """The dropout mask of attention, beginning at ``options.origin``: bool, [B, H, Sq, Sk]."""

    def why_not(self, device: torch.device, dtypes: list[torch.dtype]) -> str | None:
        """Why the backend cannot serve tensors of this device and dtypes; None where it can."""
