"""What the loops are told of the tensors that they read, and new tensors for results."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...base.memory import SEEDS, STORED, Facts, Matrix, Stored, as_saved, place, whole
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
NUMBERS: Stored = {torch.float32: STORED[torch.float32]}


class Operand(NamedTuple):
    """What a kernel reads of a tensor: at least ``numel`` adjacent elements, of these dtypes.

    A tensor that was saved for backward must also be as it was ``saved``.
    """

    name: str  # for messages
    numel: int
    dtypes: Stored = STORED
    saved: Facts | None = None

    def description(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The same for the kernel: torch_library.py says which word is what."""
        numbers, widths = [torch_library.NO_DTYPE] * torch_library.CODES, [0] * torch_library.CODES
        for dtype, (code, width) in self.dtypes.items():
            if self.saved is None or dtype is self.saved.dtype:
                numbers[code], widths[code] = torch_library.dtype_number(dtype), width
        shape = None if self.saved is None else self.saved.shape
        saved = (-1,) if shape is None else (len(shape), *shape)
        return np.array([*numbers, *widths, self.numel, *saved], np.int64)


class Reads(NamedTuple):
    """What a kernel reads of tensors."""

    operands: tuple[Operand, ...]
    descriptions: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]  # kept for their addresses
    wanted: tuple[int, ...]  # the addresses
    compared: frozenset[str]  # the names of those that must be as they were saved

    @classmethod
    def of(cls, *operands: Operand) -> Reads:
        """Of tensors in this order."""
        descriptions = tuple(operand.description() for operand in operands)
        addresses = tuple(each.ctypes.data for each in descriptions)
        compared = frozenset(operand.name for operand in operands if operand.saved is not None)
        return cls(operands, descriptions, addresses, compared)

    def held_to(self, saved: Sequence[Facts]) -> tuple[Reads, tuple[Facts, ...]]:
        """The same of tensors that must be as they were saved, and the facts of the others.

        The others are those that the kernel does not read, or of which it reads a copy in fp32.
        """
        by_name = {facts.name: facts for facts in saved}
        operands = list(self.operands)
        for i, operand in enumerate(operands):
            facts = by_name.get(operand.name)
            if facts is not None and facts.device is True and facts.dtype in operand.dtypes:
                operands[i] = operand._replace(saved=by_name.pop(operand.name))
        return Reads.of(*operands), tuple(by_name.values())

    def as_saved(self, tensors: Tensors) -> list[Tensor | None]:
        """``tensors``, of which those that were saved are as they were; else ValueError."""
        return [
            t if operand.saved is None else as_saved(t, operand.saved)
            for t, operand in zip(tensors, self.operands, strict=True)
        ]


SEED = Operand("seed", 2, SEEDS)
Tensors = Sequence[Tensor | None]


def handles(tensors: Tensors) -> tuple[int, ...]:
    """torch's objects, which kernels ask for the places of their elements; 0 for an absent one."""
    return tuple([0 if t is None else t._cdata for t in tensors])


def places(tensors: Tensors, reads: Reads) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    """The tensors or contiguous copies, their addresses, and their dtype codes.

    Raises as :func:`place` and :func:`as_saved` do where a tensor is not what a kernel reads.
    """
    held, addresses, codes = [], [], []
    for t, operand in zip(reads.as_saved(tensors), reads.operands, strict=True):
        address = code = 0
        if t is not None:
            t, (address, code) = place(t, operand.numel, operand.name, operand.dtypes)
            held.append(t)
        addresses.append(address)
        codes.append(code)
    return held, tuple(addresses), tuple(codes)


def blanks(shape: Sequence[int]) -> dict[torch.dtype, Tensor]:
    """What :func:`result` makes a tensor of each dtype from: one number, expanded to a shape."""
    return {dtype: blank.expand(shape) for dtype, blank in _BLANK.items()}


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


def in_fp32(t: Tensor, name: str) -> Tensor:
    """``t`` if it is fp32, or a copy in fp32."""
    return t if t.dtype is torch.float32 else whole(t, name).detach().to(torch.float32)


def vectors(
    bias: Tensor | None, layer_scale: Tensor | None, reads: Reads
) -> tuple[Tensor | None, Tensor | None]:
    """Both as the kernel reads them, in fp32, or copies.

    One that was fp32 when it was saved is left as it is now: the kernel sees if that has changed.
    """
    if bias is not None and "bias" not in reads.compared:
        bias = in_fp32(bias, "bias")
    if layer_scale is not None and "layer_scale" not in reads.compared:
        layer_scale = in_fp32(layer_scale, "layer_scale")
    return bias, layer_scale
