"""The cpu backend: loops that numba compiles, in blocks and by several threads.

Its results are those of the reference up to rounding, under the same masks. Calls that the loops do
not take (fp64, a ``p`` in a tensor, alpha and Gaussian noise, gates, sinks) are handed to the
reference whole; only their masks come from the loops.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...spec.operands import Functions, Operands, Prepared
from ..reference import FAMILIES as _REFERENCE
from ..reference import decision_bits
from ..reference import elementwise as _reference
from ..reference import masks as _reference_masks
from . import attention, elementwise, masks, norm, softmax

__all__ = ["attention_keep_mask", "decision_bits", "keep_mask", "prepare", "why_not"]

keep_mask = partial(_reference.keep_mask, draw=masks)
attention_keep_mask = partial(_reference_masks.attention_keep_mask, draw=masks)

# What the loops prepare; where they return None, the reference computes the call.
_LOOPS: dict[str, Callable[..., Prepared | None]] = {
    "elementwise": elementwise.prepare,
    "norm": norm.prepare,
    "softmax": softmax.prepare,
}
_HANDED_OVER = {
    name: _REFERENCE[name].partial(draw=masks) for name in ("elementwise", "norm", "product")
} | {
    "softmax": _REFERENCE["softmax"].partial(random_part=softmax.attention_multiplier),
    "attention": Functions(attention.attention_forward, attention.attention_backward),
}


def prepare(
    family: str, shape: tuple[int, ...], options: Any, operands: Operands, wanted: Sequence[Any]
) -> Prepared:
    """See :meth:`tridrop.backends.protocol.Backend.prepare`."""
    loops = _LOOPS.get(family)
    found = None if loops is None else loops(shape, options, operands, wanted)
    return _HANDED_OVER[family].prepare(options) if found is None else found


def why_not(device: torch.device, dtypes: list[torch.dtype]) -> str | None:
    """See :meth:`tridrop.backends.protocol.Backend.why_not`."""
    if device.type == "cpu":
        return None
    return (
        f"the cpu backend cannot run on {device}: its loops are for the CPU's memory. Use "
        "tridrop.backend('triton') or tridrop.backend('reference')"
    )
