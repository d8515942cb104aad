"""The addresses that the loops take of tensors, and new tensors for results."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any, overload

import torch
from torch import Tensor

from ...base.memory import STORED, Matrix, place, whole

NONE: Matrix = (0, 0)  # stands for an absent matrix
CODES = {dtype: code for dtype, (code, _) in STORED.items()}
# For every allocation larger than this, glibc maps new memory: DEFAULT_MMAP_THRESHOLD_MAX, see
# mallopt(3).
_MAPPED_ANEW = 32 << 20
_MADV_HUGEPAGE = 14

_madvise: Any = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def result(
    like: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Matrix]:
    """A new contiguous tensor, and what the kernels take of it: (address, dtype code).

    It has the shape of the contiguous tensor ``like``, or ``shape``. For a large result this asks
    the operating system for large pages: the memory is new, and page faults of 4 KiB each would
    take longer than the op. See madvise(2); a refusal changes nothing. Without it a dropout of 64
    MiB takes 1.35 times as long: two threads, the median of 25 pairs in turns.
    """
    if shape is not None:
        made = like.new_empty(*shape, dtype=dtype)  # torch.empty takes half as long again
    elif like.dtype is dtype:
        made = torch.empty_like(like)  # takes half the time of the other two
    else:
        made = torch.empty_like(like, dtype=dtype)
    address = made.data_ptr()
    if _madvise is not None and made.nbytes >= _MAPPED_ANEW:
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        _madvise(start, (address + made.nbytes - start) // page * page, _MADV_HUGEPAGE)
    return made, (address, CODES[dtype])


@overload
def matrix(t: Tensor, count: int, name: str) -> tuple[Tensor, Matrix]: ...
@overload
def matrix(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, Matrix]: ...
def matrix(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, Matrix]:
    """:func:`tridrop.base.memory.place` of a tensor that may be absent."""
    return (None, NONE) if t is None else place(t, count, name)


def vector(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, int]:
    """``t`` in fp32, or a copy of it, and its address; 0 where it is absent."""
    if t is None:
        return None, 0
    if t.dtype is not torch.float32:
        t = whole(t, name).detach().to(torch.float32)
    t, (at, _) = place(t, count, name)
    return t, at
