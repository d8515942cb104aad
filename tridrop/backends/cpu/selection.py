"""How the elementwise and norm families call the compiled loops.

A :class:`Selection` is the random part of the calls of one shape, as far as it does not depend on
data. The kernels draw the decisions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import readable
from ...contract import mask
from ...contract.mask import Shard
from ...spec.elementwise import Options
from ...spec.operands import Operands
from . import masks, serving, threads
from .memory import CODES, NONE, Reads, Tensors


class _Rows(NamedTuple):
    """One decision per row: of drop_path, or of a mask that is shared along the columns."""

    where: mask.Coordinates
    domain: str
    threshold: int


class Sum(NamedTuple):
    """A sum over the rows; its dtype is None where no gradient needs it."""

    width: int
    dtype: torch.dtype | None


ABSENT = (0, 0, NONE)  # what a kernel gets for a sum that nothing needs


@dataclass(frozen=True)
class Selection:
    """The random part of calls of one shape, without a mask in memory; see :func:`selection`."""

    loops: Any  # the kernels
    where: mask.Coordinates
    threshold: int  # of the decisions on single elements; 0 where there are none
    scale: float
    rows: tuple[_Rows, ...]
    parts: threads.Parts
    # masks.decisions_of(), where a row's coordinate is its number and rows have no factors
    fixed: tuple[int, ...] | None
    count: int  # elements of the result
    drops: bool  # whether anything is dropped

    def call(
        self,
        name: str,
        tensors: Tensors,
        reads: Reads,
        keep_alive: Any,
        *arguments: Any,
    ) -> None:
        """Call a kernel for all rows, by several threads, with its arguments after ``scale``.

        The kernel reads the ``tensors``, of which the first is the seed; ``keep_alive`` holds those
        to whose memory the arguments point.
        """
        decisions, drawn = self._decisions(tensors[0])
        others = (self.where.cols, decisions, self.scale, *arguments)
        kernel, held = getattr(self.loops, name), (keep_alive, drawn)
        threads.share(kernel, self.parts, tensors, reads, others, held)

    def sum(
        self,
        name: str,
        tensors: Tensors,
        reads: Reads,
        sums: Sequence[Sum],
        keep_alive: Any,
        *arguments: Any,
    ) -> list[Tensor | None]:
        """Call a kernel that sums over the rows as well, and return the sums.

        ``tensors``, ``reads`` and ``keep_alive`` are those of :meth:`call`; ``arguments`` are those
        before the last one. A part of the rows is summed in fp32, and the parts are then summed in
        fp64, in their order.
        """
        like, count = tensors[1], self.parts.number
        assert like is not None
        found = [None if dtype is None else like.new_empty(n, dtype=dtype) for n, dtype in sums]
        # A part that is alone writes fp32 where the result stays.
        direct = torch.float32 if count == 1 else None
        apart = sum(n for n, dtype in sums if dtype is not None and dtype is not direct)
        memory = like.new_empty(count * apart, dtype=torch.float32) if apart else None
        free = 0 if memory is None else memory.data_ptr()
        places = []
        for (width, dtype), t in zip(sums, found, strict=True):
            if dtype is None or t is None:
                places.append(ABSENT)
                continue
            at = t.data_ptr()
            places.append((at if dtype is direct else free, width, (at, CODES[dtype])))
            if dtype is not direct:
                free += 4 * count * width
        held = (keep_alive, found, memory)
        self.call(name, tensors, reads, held, *arguments, (self.parts.step, count, tuple(places)))
        return found

    def _decisions(self, seed: Tensor | None) -> tuple[tuple[int, ...], Any]:
        """The result of masks.decisions_of() for a seed."""
        if self.fixed is not None:
            return self.fixed, None
        factors = None
        if self.rows:
            assert seed is not None
            shape = (self.where.rows, 1)
            factors = torch.full(shape, self.scale, dtype=torch.float32, device="cpu")
            for where, domain, t in self.rows:
                factors *= masks.decide(where, 1, seed, domain, t)
        return masks.decisions_of(self.where, "elements", self.threshold, factors)


def selection(
    shape: tuple[int, ...],
    drop_threshold: int,
    scale: float,
    *,
    shared: tuple[int, ...] = (),
    shard: Shard | None = None,
    path_threshold: int = 0,
) -> Selection:
    """The :class:`Selection` for a tensor of ``shape``, which is not empty.

    A threshold of 0 drops nothing. Kept elements are multiplied by ``scale``.
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
        fixed = masks.decisions_of(where, "elements", drop_threshold)[0]
    return Selection(
        serving.kernels(), where, drop_threshold, scale, tuple(rows), parts, fixed,
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
    """Whether the loops serve such calls; ``wanted`` holds the dtypes of the gradients.

    They serve dropout with masks and calls that drop nothing, without fp64, with gains that all
    rows share, and where the host can read the seed and the rate.
    """
    if 0 in shape or (options.noise != "mask" and options.p > 0) or operands.p is not None:
        return False
    if torch.float64 in wanted:  # an operand that was not saved for backward may be fp64
        return False
    for t in operands:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu"):
            return False
    gain = operands.layer_scale
    return (gain is None or gain.dim() < 2) and readable(operands.seed)
