"""Calls of the elementwise and norm families by the compiled loops.

A :class:`Selection` is what does not depend on data in the random part of calls of one shape; the
decisions themselves are made in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...base.memory import SEEDS, place, readable
from ...contract import mask
from ...contract.mask import Shard
from ...spec.elementwise import Options
from ...spec.operands import Operands
from . import masks, serving, threads
from .memory import KINDS


class _Rows(NamedTuple):
    """Decisions that whole rows share: drop_path's, or those of a mask shared along the columns."""

    where: mask.Coordinates
    domain: str
    threshold: int


def _further(place: Any, bytes_: int) -> Any:
    """The place ``bytes_`` behind ``place``, an address or a matrix.

    An address of 0 stands for a sum that is absent, and stays 0.
    """
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
    parts: threads.Parts
    # As masks.rule_of gives it, where a row has the coordinate of its number and no factor.
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

        threads.share(self.parts, self.count, call, (held, drawn))

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

            threads.share(self.parts, self.count, call, (held, drawn, found))
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
                factors *= masks.decide(where, 1, seed, domain, t)
        return masks.mask_of(self.where, seed, "elements", self.threshold, factors)


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
    parts = threads.parts_of(where.rows, where.cols)
    fixed = None
    if not rows and (not where.leading or drop_threshold == 0):
        fixed = masks.rule_of(where, "elements", drop_threshold)
    alone = where.rows if len(parts) == 1 else None
    return Selection(
        serving.kernels(), where, drop_threshold, scale, tuple(rows), parts, fixed, alone,
        where.rows * where.cols, drop_threshold > 0 or bool(rows),
    )  # fmt: skip


def selection_of(shape: tuple[int, ...], options: Options) -> Selection:
    """The random part of calls of the elementwise and norm families with results of ``shape``."""
    elements, path = options.thresholds()
    return selection(
        shape,
        elements,
        math.prod(options.scales()),
        shared=options.shared,
        shard=options.shard,
        path_threshold=path,
    )


def serves(
    shape: tuple[int, ...], options: Options, operands: Operands, wanted: Sequence[Any]
) -> bool:
    """Whether the loops serve such calls, ``wanted`` being the dtypes of gradients.

    They do with masks or nothing to drop, in fp32, for gains that rows share, and where the host
    can read the random part.
    """
    if 0 in shape or (options.noise != "mask" and options.p > 0) or operands.p is not None:
        return False
    if torch.float64 in wanted:  # an operand that is not kept for backward may be fp64
        return False
    for t in operands:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu"):
            return False
    gain = operands.layer_scale
    return (gain is None or gain.dim() < 2) and readable(operands.seed)
