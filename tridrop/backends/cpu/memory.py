"""What the loops are told of the tensors that they read, and new tensors for results."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import SEEDS, STORED, Matrix, Stored, place, whole
from . import torch_library

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


# One number of each dtype, whose memory is never read.
_BLANK = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in STORED}
_KINDS: tuple[Stored, ...] = (STORED, {torch.float32: STORED[torch.float32]}, SEEDS)


class Reads(NamedTuple):
    """What a kernel reads of tensors: their names for messages, and torch_library.wanted()."""

    names: tuple[str, ...]
    wanted: tuple[int, ...]

    @classmethod
    def of(cls, *operands: tuple[str, int]) -> Reads:
        """Of some :func:`operand` each."""
        names, wanted = zip(*operands, strict=True)
        return cls(names, wanted)


def operand(name: str, count: int, kind: int = torch_library.STORED) -> tuple[str, int]:
    """What is read of one tensor: at least ``count`` adjacent elements, of the dtypes of a kind."""
    return name, torch_library.wanted(count, kind)


SEED = operand("seed", 2, torch_library.SEED)
Tensors = Sequence[Tensor | None]


def handles(tensors: Tensors) -> tuple[int, ...]:
    """torch's objects, which kernels ask for the places of their elements; 0 for an absent one."""
    return tuple([0 if t is None else t._cdata for t in tensors])


def places(tensors: Tensors, reads: Reads) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    """The tensors or contiguous copies, their addresses, and their dtype codes.

    Raises as :func:`place` does where a tensor is not what a kernel reads.
    """
    held, addresses, codes = [], [], []
    for t, name, wanted in zip(tensors, *reads, strict=True):
        address = code = 0
        if t is not None:
            count, kind = divmod(-wanted, 1 << torch_library.KIND_BITS)
            t, (address, code) = place(t, count, name, _KINDS[kind])
            held.append(t)
        addresses.append(address)
        codes.append(code)
    return held, tuple(addresses), tuple(codes)


def like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What :func:`result` makes a tensor from: one number, expanded to a shape."""
    return _BLANK[dtype].expand(shape)


def blanks(shape: Sequence[int]) -> dict[torch.dtype, Tensor]:
    """:func:`like` for all dtypes."""
    return {dtype: like(shape, dtype) for dtype in _BLANK}


def matrix(t: Tensor | None) -> Matrix:
    """What the kernels take of a tensor that this backend has made: (address, dtype code)."""
    return NONE if t is None else (t.data_ptr(), CODES[t.dtype])


def result(blank: Tensor) -> tuple[Tensor, Matrix]:
    """A new contiguous tensor, and what the kernels take of it: (address, dtype code).

    It has the shape and dtype of ``blank``: torch.empty_like is the quickest way. For a large
    result this asks the operating system for large pages: the memory is new, and page faults of 4
    KiB each would take longer than the op. See madvise(2); a refusal changes nothing. Without it a
    dropout of 64 MiB takes 1.35 times as long: two threads, the median of 25 pairs in turns.
    """
    made = torch.empty_like(blank)
    address = made.data_ptr()
    if _madvise is not None and made.nbytes >= _MAPPED_ANEW:
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        _madvise(start, (address + made.nbytes - start) // page * page, _MADV_HUGEPAGE)
    return made, (address, CODES[blank.dtype])


def in_fp32(t: Tensor | None, name: str) -> Tensor | None:
    """``t`` in fp32, or a copy of it."""
    if t is None or t.dtype is torch.float32:
        return t
    return whole(t, name).detach().to(torch.float32)
