"""A forward of attention in which loading and computing have warps of their own; off by default.

Triton calls it warp specialisation. One group of four warps loads blocks of keys and values, and
two others, with half of the queries each, multiply, draw the mask and keep the softmax: while one
of them computes between its products, the other's products run. Whether that is faster than the
ordinary forward only a GPU can tell (``benchmarks/hopper.py``), so it is used only where
``TRIDROP_WARP_SPECIALIZE=1`` is in the environment. Masks are the same.

The compiler sets these limits: one loop, no branch in it, no array that is reshaped, and rows that
are loaded by tensor descriptors. The descriptors are made in the kernel: Triton does not divide one
that the host made, and from 3.7 on it finds that out itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import copy_context
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ...spec.attention import SPECIALIZE
from . import gpu, launch
from .attention_settings import Tile
from .attention_tiles import EDGE, INNER, Shape, Tensors

# The versions of Triton whose machine code was looked at.
VERSIONS = ("3.6", "3.7", "3.8", "3.9")
KEYS = 128
# For each width, how many blocks of keys and values fit the shared memory beside the queries.
STAGES = {64: 3, 128: 2}
# Bytes to which a descriptor's address and strides have to be aligned.
ALIGNMENT = 16


@cache
def asked() -> bool:
    """Whether the environment asks for it."""
    value = os.environ.get(SPECIALIZE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SPECIALIZE}={value!r} in the environment: use 1 (on) or 0 (off)")
    return value == "1"


def why_not(device: torch.device) -> str | None:
    """Why no kernel for ``device`` can be specialised, or None where one can."""
    if launch.interpreting():
        return None
    if ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
        return f"Triton {triton.__version__} was not tried (only {', '.join(VERSIONS)})"
    if gpu.of(device).generation != 90:
        return f"{device} is not a Hopper GPU"
    return None


def check(device: torch.device) -> None:
    """Raise RuntimeError unless kernels for ``device`` can be specialised."""
    reason = why_not(device)
    if reason is not None:
        raise RuntimeError(
            f"{SPECIALIZE}=1 asks for warp specialisation, but {reason}: remove it from the "
            "environment"
        )


def tile(tensors: Tensors, shape: Shape, flags: dict[str, Any], scale: float) -> Tile | None:
    """The tile of a specialised forward; None for a call that the ordinary forward serves.

    A specialised forward serves fp16 and bf16 with 64 or 128 columns, dense or causal, with or
    without dropout, also with grouped heads.
    """
    rows = (tensors.query, tensors.key, tensors.value)
    others = (tensors.mask, tensors.key_mask, tensors.sinks)
    features = ("LOWER", "SHIFTED", "SOFTCAP", "PACKED")
    if (
        any(t is not None for t in others)
        or any(flags[name] for name in features)
        or scale <= 0
        or shape.width not in STAGES
        or shape.value_width != shape.width
        or not all(map(_can_be_described, rows))
    ):
        return None
    whole = not flags["UPPER"] and shape.keys % KEYS == 0
    bounds = INNER.value if whole else EDGE.value
    return Tile(128, KEYS, 4, STAGES[shape.width], special=bounds)


def _can_be_described(t: Tensor) -> bool:
    """Whether the rows of each head can be loaded by a tensor descriptor."""
    size = t.element_size()
    steps = [s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
    aligned = all(step * size % ALIGNMENT == 0 for step in (*steps, t.stride(2)))
    return size == 2 and aligned and t.stride(2) > 0 and t.data_ptr() % ALIGNMENT == 0


def run(device: torch.device, launching: Callable[[], None]) -> None:
    """Launch with memory of torch's for the descriptors, 128 bytes each.

    Triton keeps the function that gives it memory in a context variable. Here it is set in a copy
    of the context, so that the caller's stays as it is.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        # torch aligns to 512 bytes. Whoever gets the memory next uses it on the same stream.
        return torch.empty(size, dtype=torch.int8, device=device)

    def run_here() -> None:
        triton.set_allocator(allocate)
        launching()

    copy_context().run(run_here)
