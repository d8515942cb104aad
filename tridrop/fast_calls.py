"""Calls of the elementwise and norm families by the kernels of :mod:`tridrop.fast`.

A :class:`Selection` is what does not depend on data in the random part of calls of one shape; the
decisions themselves are made in the kernels.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import fast, mask
from .mask import Shard
from .memory import SEEDS, STORED, Matrix, place, whole

NONE: Matrix = (0, 0)  # an absent one
KINDS = {dtype: kind for dtype, (kind, _) in STORED.items()}
# glibc maps what is larger than this anew for every allocation: DEFAULT_MMAP_THRESHOLD_MAX, see
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
    """A new contiguous tensor, and how the kernels take it: (address, kind).

    It has the shape of the contiguous tensor ``like``, or ``shape``. A large one asks the kernel
    for large pages: it is new memory, and 4 KiB at a time its page faults take longer than the op.
    See madvise(2); a refusal changes nothing.
    """
    if shape is not None:
        made = torch.empty(shape, dtype=dtype, device="cpu")
    elif like.dtype is dtype:
        made = torch.empty_like(like)  # half the time of the others
    else:
        made = torch.empty_like(like, dtype=dtype)
    address = made.data_ptr()
    if _madvise is not None and made.nbytes >= _MAPPED_ANEW:
        page = mmap.PAGESIZE
        start = -(-address // page) * page
        _madvise(start, (address + made.nbytes - start) // page * page, _MADV_HUGEPAGE)
    return made, (address, KINDS[dtype])


@overload
def matrix(t: Tensor, count: int, name: str) -> tuple[Tensor, Matrix]: ...
@overload
def matrix(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, Matrix]: ...
def matrix(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, Matrix]:
    """:func:`tridrop.memory.place` of a tensor that may be absent."""
    return (None, NONE) if t is None else place(t, count, name)


def vector(t: Tensor | None, count: int, name: str) -> tuple[Tensor | None, int]:
    """The same in fp32, and the address alone; 0 is none."""
    if t is None:
        return None, 0
    if t.dtype is not torch.float32:
        t = whole(t, name).detach().to(torch.float32)
    t, (at, _) = place(t, count, name)
    return t, at


class _Rows(NamedTuple):
    """Decisions that whole rows share: drop_path's, or those of a mask shared along the columns."""

    where: mask.Coordinates
    domain: str
    threshold: int


def _further(place: Any, bytes_: int) -> Any:
    """The place of a sum, an address or a matrix, so far behind another; 0 is none."""
    if isinstance(place, tuple):
        return _further(place[0], bytes_), place[1]
    return place and place + bytes_


class Sum(NamedTuple):
    """A sum over the rows; its dtype is None where it is not wanted."""

    width: int
    dtype: torch.dtype | None
    rounded: bool = False  # the kernel takes it as a matrix of a row, of any dtype


@dataclass(frozen=True)
class Selection:
    """The random part of calls of one shape, without a mask in memory; see :func:`selection`."""

    loops: Any  # the kernels
    where: mask.Coordinates
    threshold: int  # of the elements' own decisions; 0 where they have none
    scale: float
    rows: tuple[_Rows, ...]
    parts: fast.Parts
    # As fast.rule_of gives it, where a row has the coordinate of its number and no factor.
    fixed: tuple[tuple[int, int], tuple[int, int]] | None
    alone: int | None  # the number of rows, where they are one part
    count: int  # elements of the result
    drops: bool  # whether anything is dropped

    def call(self, name: str, seed: Tensor | None, held: Any, *arguments: Any) -> None:
        """Call a kernel for all rows, by several threads, with its arguments after ``scale``.

        ``held`` is what these point to.
        """
        kernel, columns, scale = getattr(self.loops, name), self.where.cols, self.scale
        decisions, drawn = self._decisions(seed)
        if self.alone is not None:
            kernel(0, self.alone, columns, decisions, scale, *arguments)
            return

        def call(_: int, start: int, stop: int) -> None:
            kernel(start, stop, columns, decisions, scale, *arguments)

        fast.share(self.parts, self.count, call, (held, drawn))

    def sum(
        self,
        name: str,
        seed: Tensor | None,
        like: Tensor,
        sums: Sequence[Sum],
        held: Any,
        *arguments: Any,
    ) -> list[Tensor | None]:
        """Call a kernel that sums over the rows as well, and give the sums.

        ``arguments`` are those before the places of the sums, and the last; ``held`` is what they
        point to. Sums are made in fp32 within a part of the rows, then in fp64 in the order of the
        parts.
        """
        kernel, columns, scale = getattr(self.loops, name), self.where.cols, self.scale
        decisions, drawn = self._decisions(seed)
        count = len(self.parts)
        found: list[Tensor | None] = []
        places: list[Any] = []
        unfinished: list[tuple[int, Tensor, torch.dtype]] = []
        for width, dtype, rounded in sums:
            if dtype is None:
                found.append(None)
                places.append((0, 0) if rounded else 0)
                continue
            own = dtype if rounded and count == 1 else torch.float32
            t = like.new_empty(count * width, dtype=own)
            places.append((t.data_ptr(), KINDS[own]) if rounded else t.data_ptr())
            if count > 1 or own is not dtype:
                unfinished.append((len(found), t, dtype))
            found.append(t)
        *before, options = arguments
        if count == 1:
            kernel(0, self.alone, columns, decisions, scale, *before, tuple(places), options)
        else:

            def call(number: int, start: int, stop: int) -> None:
                own = tuple(
                    _further(at, 4 * number * n.width) for at, n in zip(places, sums, strict=True)
                )
                kernel(start, stop, columns, decisions, scale, *before, own, options)

            fast.share(self.parts, self.count, call, (held, drawn, found))
        for i, t, dtype in unfinished:
            if count > 1:
                t = torch.from_numpy(t.view(count, -1).numpy().sum(0, np.float64))
            found[i] = t.to(dtype)
        return found

    def _decisions(self, seed: Tensor | None) -> tuple[tuple[int, ...], Any]:
        """What the kernels are told of them, and what that points to."""
        if self.fixed is not None:
            first, rule = self.fixed
            if seed is None:
                return (0, *first, 0, *rule, 0), None
            pair, (address, _) = place(seed, 2, "seed", SEEDS)
            return (0, *first, address, *rule, 0), pair
        factors = None
        if self.rows:
            assert seed is not None
            shape = (self.where.rows, 1)
            factors = torch.full(shape, self.scale, dtype=torch.float32, device="cpu")
            for where, domain, t in self.rows:
                factors *= fast.decide(where, 1, seed, domain, t)
        return fast.mask_of(self.where, seed, "elements", self.threshold, factors)


def selection(
    shape: tuple[int, ...],
    drop_threshold: int,
    scale: float,
    *,
    shared: tuple[int, ...] = (),
    shard: Shard | None = None,
    path_threshold: int = 0,
) -> Selection:
    """What drops elements, and samples, of a tensor of ``shape`` that has any.

    Thresholds of 0 drop nothing. ``scale`` is what is multiplied by where nothing drops.
    """
    where, rows = mask.coordinates(shape, shared, shard), []
    if where.col_shared and drop_threshold:
        rows.append(_Rows(where, "elements", drop_threshold))
        drop_threshold = 0
    if path_threshold:
        samples = mask.coordinates(shape, tuple(range(1, len(shape))), shard)
        rows.append(_Rows(samples, "drop_path", path_threshold))
    parts = fast.parts_of(where.rows, where.cols)
    fixed = None
    if not rows and (not where.leading or drop_threshold == 0):
        fixed = fast.rule_of(where, "elements", drop_threshold)
    alone = where.rows if len(parts) == 1 else None
    return Selection(
        fast.kernels(), where, drop_threshold, scale, tuple(rows), parts, fixed, alone,
        where.rows * where.cols, drop_threshold > 0 or bool(rows),
    )  # fmt: skip
