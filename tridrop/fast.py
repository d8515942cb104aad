"""The mask contract on a CPU, fast: the functions of :mod:`tridrop.mask` with compiled loops.

The decisions are those of mask.py, bit for bit, from kernels that numba compiles
(``fast_kernels.py``). numba is optional. ``TRIDROP_CPU`` in the environment says what serves CPU
tensors: "numba", "torch" (mask.py itself), or, where it is not set, numba if it can be imported.
``tridrop info`` reports the choice.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import mask
from .mask import LANES, Shard

ENVIRONMENT, CACHE_ENVIRONMENT = "TRIDROP_CPU", "TRIDROP_CPU_CACHE"
NAMES = ("numba", "torch")

_has_numba = importlib.util.find_spec("numba") is not None
_loaded: Any = None  # the kernels' module
_broken: str | None = None  # why numba, though installed, could not be imported

# ------------------------------------------------------------------------------------- the choice


def choose() -> str:
    """What serves CPU tensors, "numba" or "torch"; an explicit choice that cannot be met raises."""
    name = os.environ.get(ENVIRONMENT)
    if not name:
        return "numba" if _has_numba and _broken is None else "torch"
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT} is {name!r}; known: {', '.join(NAMES)}")
    if name == "numba" and not _has_numba:
        raise ImportError(
            f"{ENVIRONMENT}=numba, but numba is not installed: pip install numba, "
            f"or set {ENVIRONMENT}=torch"
        )
    return name


def report() -> str:
    """What ``tridrop info`` says: what makes the masks of CPU tensors, and why."""
    try:
        name = choose()
    except (ImportError, ValueError) as error:
        return f"none: {error}"
    asked = f"{ENVIRONMENT}={name}" if os.environ.get(ENVIRONMENT) else "the default"
    if name == "torch":
        why = _broken or ("numba is installed" if _has_numba else "numba is not installed")
        return f"torch ({asked}; {why})"
    from importlib.metadata import version

    off = os.environ.get(CACHE_ENVIRONMENT) == "0"
    return f"numba {version('numba')} ({asked}; cache on disk {'off' if off else 'on'})"


def _kernels() -> Any:
    """The kernels' module where the choice is numba, or None."""
    global _loaded, _broken
    if choose() != "numba":
        return None
    if _loaded is None:
        try:
            from . import fast_kernels
        except ImportError as error:  # numba refuses a NumPy that is too new for it
            if os.environ.get(ENVIRONMENT):
                raise
            _broken = f"numba cannot be imported: {error}"
            warnings.warn(
                f"tridrop makes the masks of CPU tensors in torch: {_broken}", stacklevel=2
            )
            return None
        _loaded = fast_kernels
    return _loaded


def _readable(seed: Tensor) -> bool:
    """Whether the host can read the seed: a CPU tensor with data, not one of a transformation."""
    return (
        type(seed) is Tensor
        and seed.device.type == "cpu"
        # Inside torch.func's transformations what torch.empty makes has no storage either.
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# ---------------------------------------------------------------------------------------- threads

# Elements below which a thread more costs more than it saves: 0.05 to 0.1 ms of work, where
# handing over takes 0.02 to 0.05.
_PART = 1 << 17

_pool: ThreadPoolExecutor | None = None
_workers = 0


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _workers
    _pool, _workers = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _share_rows(rows: int, columns: int, call: Callable[[int, int], None]) -> None:
    """``call(start, stop)`` for ranges that make up ``rows``, on at most torch's number of threads.

    ``call`` runs a kernel and nothing of torch, whose modes and threads are those of a thread. The
    threads are tridrop's own: numba's either forbid two calls at a time or do not survive a
    fork, depending on the machine. The calling thread does its part, and all of it if need be.
    """
    global _pool, _workers
    parts = min(rows, rows * columns // _PART)
    threads = min(torch.get_num_threads(), parts)
    if threads < 2:
        call(0, rows)
        return
    step = -(-rows // parts)
    starts = list(range(0, rows, step))

    def work() -> None:
        while True:
            try:
                start = starts.pop()  # atomic
            except IndexError:
                return
            call(start, min(rows, start + step))

    if _pool is None or _workers < threads - 1:
        _pool, _workers = ThreadPoolExecutor(threads - 1, "tridrop"), threads - 1
    helpers: list[Future[None]] = []
    with suppress(RuntimeError):  # when the interpreter is shutting down
        helpers += [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


# ------------------------------------------------------------------------------------------ masks


def _key(seed: Tensor) -> tuple[np.uint32, np.uint32]:
    """:func:`mask.key_of` on the host."""
    first, stream = seed.tolist()
    key = (first + stream * mask.STREAM_MULTIPLIER) % (1 << 64)
    return np.uint32(key % mask.ONE), np.uint32(key // mask.ONE)


def keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    shared: Sequence[int] = (),
    shard: Shard | None = None,
    domain: str = "elements",
) -> Tensor:
    """:func:`tridrop.mask.keep_mask`, by numba where that serves."""
    kernels: Any = _kernels() if _readable(seed) else None
    t = 0 if kernels is None else int(drop_threshold)
    if t == 0:
        return mask.keep_mask(
            seed, shape, drop_threshold, shared=shared, shard=shard, domain=domain
        )
    where = mask.coordinates(shape, shared, shard)
    if domain == "drop_path" and not where.col_shared:
        raise ValueError("the masks of drop_path are shared along the last dimension")
    columns = min(1, where.cols) if where.col_shared else where.cols
    keep = torch.empty((where.rows, columns), dtype=torch.bool, device="cpu")
    draw = _Rows.of(where, seed, mask.DOMAINS[domain], t)
    out = keep.numpy()

    def call(start: int, stop: int) -> None:
        rows, others = draw.part(start, stop)
        kernels.keep_rows(out[start:stop], rows, *others)

    _share_rows(where.rows, columns, call)
    return keep.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    origin: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """:func:`tridrop.mask.attention_keep_mask`, by numba where that serves."""
    kernels: Any = _kernels() if _readable(seed) else None
    t = 0 if kernels is None else int(drop_threshold)
    if t == 0:
        return mask.attention_keep_mask(seed, shape, drop_threshold, origin=origin)
    batch, heads, queries, keys = shape
    rows = batch * heads * queries
    keep = torch.empty((rows, keys), dtype=torch.bool, device="cpu")
    out, key = keep.numpy(), _key(seed)
    sizes = (np.uint64(heads), np.uint64(queries), np.array(origin, np.uint64))
    domain, last = np.uint32(mask.DOMAINS["attention"] << 28), np.uint32(t - 1)

    def call(start: int, stop: int) -> None:
        kernels.keep_scores(out[start:stop], np.uint64(start), *sizes, *key, domain, last)

    _share_rows(rows, keys, call)
    return keep.view(tuple(shape))


@dataclass(frozen=True)
class _Rows:
    """What the kernels are told of the decisions of rows."""

    rows: np.ndarray[Any, Any]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, where: mask.Coordinates, seed: Tensor, domain: int, t: int) -> _Rows:
        rows = mask.row_coordinates(where, "cpu").numpy()
        group, lane = divmod(0 if where.col_shared else where.col_origin, LANES)
        high, last = np.uint32(domain << 28), np.uint32(t - 1)
        return cls(rows, (lane, *_key(seed), high, np.uint64(group), last))

    def part(self, start: int, stop: int) -> tuple[np.ndarray[Any, Any], tuple[Any, ...]]:
        return self.rows[start:stop], self.others


# --------------------------------------------------------------------------------------- selection

_WORDS = (torch.float32, torch.bfloat16)  # what the kernels read and write


@dataclass(frozen=True)
class Selection:
    """The random part of rows of a call, without a mask in memory; see :func:`selection`.

    Results have no derivative.
    """

    kernels: Any
    draw: _Rows
    scale: np.float32

    def part(self, start: int, stop: int) -> Selection:
        """Of the rows from ``start`` to ``stop``."""
        return Selection(self.kernels, _Rows(*self.draw.part(start, stop)), self.scale)

    def __call__(self, value: Tensor) -> Tensor:
        """value * scale where kept, exactly 0 elsewhere: fp32, [rows, columns]."""
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
        self._select(_array(out), _array(value.contiguous()), None, 0, len(out))
        return out

    def add(self, value: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """``out`` = residual + value * scale where kept, rounded once; by several threads.

        Matrices, each of fp32 or bf16.
        """
        o, v = _array(out), _array(value)
        r = None if residual is None else _array(residual)
        rows, columns = out.shape
        _share_rows(rows, columns, lambda start, stop: self._select(o, v, r, start, stop))

    def _select(self, out: Any, value: Any, residual: Any, start: int, stop: int) -> None:
        rows = slice(start, stop)
        r = None if residual is None else residual[rows]
        draw = self.draw.part(start, stop)
        self.kernels.select(out[rows], value[rows], r, self.scale, draw[0], *draw[1])


def _array(t: Tensor) -> np.ndarray[Any, Any]:
    return t.numpy() if t.dtype == torch.float32 else t.view(torch.uint16).numpy()


def can_store(*tensors: Tensor | None) -> bool:
    """Whether :meth:`Selection.add` takes these."""
    return all(t is None or t.dtype in _WORDS for t in tensors)


def selection(
    seed: Tensor | None,
    shape: Sequence[int],
    drop_threshold: int,
    *,
    shared: Sequence[int] = (),
    shard: Shard | None = None,
) -> Selection | None:
    """What drops elements of a tensor of ``shape``; None where numba does not serve.

    That is also where the mask is shared along the last dimension: then it is small, or a column.
    """
    if seed is None or drop_threshold == 0 or not _readable(seed):
        return None
    kernels = _kernels()
    where = mask.coordinates(shape, shared, shard)
    if kernels is None or where.col_shared:
        return None
    draw = _Rows.of(where, seed, mask.DOMAINS["elements"], drop_threshold)
    return Selection(kernels, draw, np.float32(mask.scale(drop_threshold)))
