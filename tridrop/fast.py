"""The mask contract on a CPU, fast: the functions of :mod:`tridrop.mask` with compiled loops.

The decisions are those of mask.py, bit for bit, from kernels that numba compiles
(``fast_kernels.py``); so are the elementwise and norm families (``fast_elementwise.py``,
``fast_norm.py``). numba is optional. ``TRIDROP_CPU`` in the environment says what serves CPU
tensors: "numba", "torch" (mask.py itself), or, where it is not set, numba if it can be imported.
``tridrop info`` reports the choice.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import mask
from .mask import LANES, Shard

ENVIRONMENT, CACHE_ENVIRONMENT = "TRIDROP_CPU", "TRIDROP_CPU_CACHE"
NAMES = ("numba", "torch")

_has_numba = importlib.util.find_spec("numba") is not None
_loaded: Any = None  # the kernels by name
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
    """The kernels where the choice is numba, or None."""
    global _loaded, _broken
    if choose() != "numba":
        return None
    if _loaded is None:
        try:
            from . import fast_elementwise, fast_kernels, fast_norm
        except ImportError as error:  # numba refuses a NumPy that is too new for it
            if os.environ.get(ENVIRONMENT):
                raise
            _broken = f"numba cannot be imported: {error}"
            warnings.warn(
                f"tridrop makes the masks of CPU tensors in torch: {_broken}", stacklevel=2
            )
            return None
        _loaded = SimpleNamespace(
            keep_rows=fast_kernels.keep_rows,
            keep_scores=fast_kernels.keep_scores,
            forward=fast_elementwise.forward,
            backward=fast_elementwise.backward,
            norm_forward=fast_norm.forward,
            norm_backward=fast_norm.backward,
        )
    return _loaded


def serves() -> bool:
    """Whether numba makes the masks of CPU tensors: the choice, and that it can be imported."""
    return _kernels() is not None


def readable(seed: Tensor) -> bool:
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
# Each part has sums of its own: a bound on their memory, and one on the rows of a sum in fp32.
_MOST_PARTS, _LONGEST_PART = 256, 1024

Parts = list[tuple[int, int]]

_pool: ThreadPoolExecutor | None = None
_workers = 0


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _workers
    _pool, _workers = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def parts_of(rows: int, columns: int) -> Parts:
    """The ranges of rows that are worked on at a time. Sizes alone decide, so that sums over the
    parts do not depend on the number of threads."""
    parts = min(rows, rows * columns // _PART, _MOST_PARTS)
    step = min(-(-rows // max(1, parts)), _LONGEST_PART)
    return [(start, min(rows, start + step)) for start in range(0, rows, step or 1)]


def _share(parts: Parts, elements: int, call: Callable[[int, int, int], object]) -> None:
    """``call(number, start, stop)`` for all parts of so many elements, on at most torch's number of
    threads.

    ``call`` runs a kernel and nothing of torch, whose modes and threads are those of a thread. The
    threads are tridrop's own: numba's either forbid two calls at a time or do not survive a
    fork, depending on the machine. The calling thread does its part, and all of it if need be.
    """
    global _pool, _workers
    worthwhile = min(len(parts), elements // _PART)
    threads = min(torch.get_num_threads(), worthwhile) if worthwhile > 1 else 1
    numbers = list(range(len(parts)))

    def work() -> None:
        while True:
            try:
                number = numbers.pop()  # atomic
            except IndexError:
                return
            call(number, *parts[number])

    if threads < 2:
        work()
        return
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


def _key(seed: Tensor) -> tuple[int, int]:
    """:func:`mask.key_of` on the host."""
    first, stream = seed.tolist()
    key = (first + stream * mask.STREAM_MULTIPLIER) % (1 << 64)
    return key % mask.ONE, key // mask.ONE


def _mask_of(
    where: mask.Coordinates, seed: Tensor, domain: str, t: int
) -> tuple[tuple[int, ...], Tensor | None]:
    """What the kernels are told of the decisions, see ``fast_kernels.next_strip``, and the row
    coordinates that the first entry is the address of."""
    rows = mask.row_coordinates(where, "cpu") if where.leading else None
    group, lane = divmod(0 if where.col_shared else where.col_origin, LANES)
    address = 0 if rows is None else rows.data_ptr()
    return (address, lane, group, *_key(seed), mask.DOMAINS[domain] << 28, t - 1), rows


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
    kernels: Any = _kernels() if readable(seed) else None
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
    decisions, _rows = _mask_of(where, seed, domain, t)
    out = keep.data_ptr()

    def call(_: int, start: int, stop: int) -> None:
        kernels.keep_rows(start, stop, columns, decisions, out)

    _share(parts_of(where.rows, columns), where.rows * columns, call)
    return keep.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    origin: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """:func:`tridrop.mask.attention_keep_mask`, by numba where that serves."""
    kernels: Any = _kernels() if readable(seed) else None
    t = 0 if kernels is None else int(drop_threshold)
    if t == 0:
        return mask.attention_keep_mask(seed, shape, drop_threshold, origin=origin)
    batch, heads, queries, keys = shape
    rows = batch * heads * queries
    keep = torch.empty((rows, keys), dtype=torch.bool, device="cpu")
    out, key = keep.numpy(), (np.uint32(word) for word in _key(seed))
    sizes = (np.uint64(heads), np.uint64(queries), np.array(origin, np.uint64))
    domain, last = np.uint32(mask.DOMAINS["attention"] << 28), np.uint32(t - 1)
    others = (*sizes, *key, domain, last)

    def call(_: int, start: int, stop: int) -> None:
        kernels.keep_scores(out[start:stop], np.uint64(start), *others)

    _share(parts_of(rows, keys), rows * keys, call)
    return keep.view(tuple(shape))


# ---------------------------------------------------------------------------------------- the ops

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in fast_storage.py
# glibc maps what is larger than this anew for every allocation: DEFAULT_MMAP_THRESHOLD_MAX, see
# mallopt(3).
_MAPPED_ANEW = 32 << 20
_MADV_HUGEPAGE = 14

_madvise: Any = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A contiguous result; ``like`` is an operand, often of the same kind.

    A large one asks the kernel for large pages: it is new memory, and 4 KiB at a time its page
    faults take longer than the op. See madvise(2); a refusal changes nothing.
    """
    if like.dtype == dtype and like.shape == shape and like.is_contiguous():
        result = torch.empty_like(like)  # half the time of the other
    else:
        result = torch.empty(shape, dtype=dtype, device="cpu")
    if _madvise is not None and result.nbytes >= _MAPPED_ANEW:
        page = mmap.PAGESIZE
        start = -(-result.data_ptr() // page) * page
        _madvise(start, (result.data_ptr() + result.nbytes - start) // page * page, _MADV_HUGEPAGE)
    return result


@dataclass(frozen=True)
class Selection:
    """The random part of calls of one shape, without a mask in memory; see :func:`selection`."""

    where: mask.Coordinates
    threshold: int
    scale: float
    parts: Parts

    def call(self, name: str, seed: Tensor, *arguments: Any) -> None:
        """Call a kernel for all rows, by several threads, with its arguments after ``scale``.

        Whoever calls keeps alive what they point to.
        """
        kernel = getattr(_loaded, name)
        columns, scale = self.where.cols, self.scale
        decisions, _rows = _mask_of(self.where, seed, "elements", self.threshold)
        if len(self.parts) == 1:
            kernel(*self.parts[0], columns, decisions, scale, *arguments)
            return

        def call(_: int, start: int, stop: int) -> None:
            kernel(start, stop, columns, decisions, scale, *arguments)

        _share(self.parts, self.where.rows * columns, call)

    def sum(
        self, name: str, seed: Tensor, widths: Sequence[int], *arguments: Any
    ) -> list[Tensor | None]:
        """Call a kernel that sums over the rows as well, and give the sums.

        ``widths`` are theirs, 0 for one not wanted; ``arguments`` are those before their addresses,
        and the last. They are made in fp32 within a part of the rows, then in fp64 in the order of
        the parts.
        """
        kernel = getattr(_loaded, name)
        columns, scale, count = self.where.cols, self.scale, len(self.parts)
        decisions, _rows = _mask_of(self.where, seed, "elements", self.threshold)
        sums = [seed.new_empty(count * w, dtype=torch.float32) if w else None for w in widths]
        begin = [0 if s is None else s.data_ptr() for s in sums]
        *before, options = arguments
        if count == 1:
            kernel(*self.parts[0], columns, decisions, scale, *before, tuple(begin), options)
            return sums

        def call(number: int, start: int, stop: int) -> None:
            own = tuple(a and a + 4 * number * w for a, w in zip(begin, widths, strict=True))
            kernel(start, stop, columns, decisions, scale, *before, own, options)

        _share(self.parts, self.where.rows * columns, call)
        return [
            None if s is None else torch.from_numpy(s.view(count, -1).numpy().sum(0, np.float64))
            for s in sums
        ]


@lru_cache(256)
def _selection(
    shape: tuple[int, ...], drop_threshold: int, shared: tuple[int, ...], shard: Shard | None
) -> Selection | None:
    where = mask.coordinates(shape, shared, shard)
    if where.col_shared:
        return None
    parts = parts_of(where.rows, where.cols)
    return Selection(where, drop_threshold, mask.scale(drop_threshold), parts)


def selection(
    shape: tuple[int, ...],
    drop_threshold: int,
    *,
    shared: tuple[int, ...] = (),
    shard: Shard | None = None,
) -> Selection | None:
    """What drops elements of a tensor of ``shape``; None where numba does not serve.

    That is also where the mask is shared along the last dimension: then it is small, or a column.
    """
    if drop_threshold == 0 or 0 in shape or _kernels() is None:
        return None
    return _selection(shape, drop_threshold, shared, shard)
