"""The mask contract on a CPU, fast: the functions of :mod:`tridrop.mask` with compiled loops.

The decisions are those of mask.py, bit for bit, from kernels that numba compiles
(``fast_kernels.py``); so are the elementwise and norm families and the softmax
(``fast_elementwise.py``, ``fast_norm.py``, ``fast_softmax.py``). numba is optional. ``TRIDROP_CPU``
in the environment says what serves CPU tensors: "numba", "torch" (mask.py itself), or, where it is
not set, numba if it can be imported. ``tridrop info`` reports the choice.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import mask
from .mask import LANES, Shard
from .memory import SEEDS, place
from .torch_private import transformation

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


def kernels() -> Any:
    """The kernels where the choice is numba, or None."""
    global _loaded, _broken
    if choose() != "numba":
        return None
    if _loaded is None:
        try:
            from . import fast_elementwise, fast_kernels, fast_norm, fast_softmax
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
            softmax_forward=fast_softmax.forward,
            softmax_backward=fast_softmax.backward,
            forward=fast_elementwise.forward,
            backward=fast_elementwise.backward,
            norm_forward=fast_norm.forward,
            norm_backward=fast_norm.backward,
        )
    return _loaded


def serves() -> bool:
    """Whether numba makes the masks of CPU tensors: the choice, and that it can be imported."""
    return kernels() is not None


def readable(seed: Tensor | None) -> bool:
    """Whether the host can read the seed: a CPU tensor with data, not one of a transformation."""
    return (
        (seed is None or (type(seed) is Tensor and seed.device.type == "cpu"))
        # Inside torch.func's transformations what torch.empty makes has no storage either.
        and transformation() is None
    )


# ---------------------------------------------------------------------------------------- threads

# Elements below which a thread more costs more than it saves: 0.05 to 0.1 ms of work, where
# handing over takes 0.02 to 0.05.
_PART = 1 << 17
# Each part has sums of its own: a bound on their memory, and one on the rows of a sum in fp32.
_MOST_PARTS, _LONGEST_PART = 256, 1024

Parts = list[tuple[int, int]]

_jobs: SimpleQueue[_Job] = SimpleQueue()
_workers = 0  # threads that wait for jobs
# How long a thread sleeps that has missed its waking, which only an interrupt can make it.
_PATIENCE = 0.01


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _jobs, _workers
    _jobs, _workers = SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def parts_of(rows: int, columns: int) -> Parts:
    """The ranges of rows that are worked on at a time. Sizes alone decide, so that sums over the
    parts do not depend on the number of threads."""
    parts = min(rows, rows * columns // _PART, _MOST_PARTS)
    step = min(-(-rows // max(1, parts)), _LONGEST_PART)
    return [(start, min(rows, start + step)) for start in range(0, rows, step or 1)]


class _Job:
    """Parts that several threads take, each one after another, until none is left.

    To append to a list and to take the next number are atomic, and no lock is held that an
    interrupt, or a signal handler that calls an op itself, could find taken.
    """

    def __init__(self, parts: Parts, call: Callable[[int, int, int], object], held: Any) -> None:
        self.parts = parts
        self.call: Any = call
        # What the kernels have addresses of lives as long as a thread may work on it.
        self.held = held
        self.numbers = iter(range(len(parts)))
        self.entered: list[None] = []  # an entry for each helper that may take parts,
        self.gone: list[None] = []  # and for each that will take no more
        self.errors: list[BaseException] = []
        self.wake: SimpleQueue[None] = SimpleQueue()

    def work(self) -> None:
        """Do parts until none is left."""
        for number in self.numbers:
            self.call(number, *self.parts[number])

    def help(self) -> None:
        """The same in a thread of tridrop's own."""
        self.entered.append(None)  # before any part is taken: who finds none left sees it
        try:
            self.work()
        except BaseException as error:
            self.drop()
            self.errors.append(error)
        finally:
            self.gone.append(None)
            self.wake.put(None)

    def wait(self) -> None:
        """Return when no helper works any more. There are no parts left to take."""
        while len(self.gone) < len(self.entered):
            with suppress(Empty):
                self.wake.get(timeout=_PATIENCE)

    def drop(self) -> None:
        """Let no part begin any more."""
        for _ in self.numbers:
            pass

    def forget(self) -> None:
        """Leave nothing to a helper that comes too late."""
        self.call = self.held = None


def _serve(jobs: SimpleQueue[_Job]) -> None:
    """What a thread of tridrop's own does."""
    while True:
        jobs.get().help()


def share(parts: Parts, elements: int, call: Callable[[int, int, int], object], held: Any) -> None:
    """``call(number, start, stop)`` for all parts of so many elements, on at most torch's number of
    threads.

    ``call`` runs a kernel and nothing of torch, whose modes and threads are those of a thread.
    ``held`` is all that it has addresses of. The threads are tridrop's own: numba's either forbid
    two calls at a time or do not survive a fork, depending on the machine. The calling thread does
    its part, and all of it if need be.

    Whatever is raised meanwhile, in a part or by an interrupt (Ctrl-C, a signal's handler), no
    thread reads or writes that memory when this function is left.
    """
    worthwhile = min(len(parts), elements // _PART)
    threads = min(torch.get_num_threads(), worthwhile) if worthwhile > 1 else 1
    if threads < 2:
        for number, part in enumerate(parts):
            call(number, *part)
        return
    job = _Job(parts, call, held)
    raised: BaseException | None = None
    while True:  # until nobody works: a second interrupt comes while the first is seen to
        try:
            if raised is None:
                _hand_out(job, threads - 1)
                job.work()
            else:
                job.drop()
            job.wait()
            break
        except BaseException as error:
            raised = error
    job.forget()
    if raised is None and job.errors:
        raised = job.errors.pop()
    if raised is not None:
        try:
            raise raised
        finally:
            del raised  # or its traceback would keep this frame, and that the memory


def _hand_out(job: _Job, helpers: int) -> None:
    """Ask so many threads to help."""
    global _workers
    while _workers < helpers:
        try:
            Thread(target=_serve, args=(_jobs,), name="tridrop", daemon=True).start()
        except RuntimeError:  # no more threads: the interpreter is shutting down
            return
        _workers += 1
    for _ in range(helpers):
        _jobs.put(job)


# ------------------------------------------------------------------------------------------ masks


def pair_of(seed: Tensor | None) -> tuple[Tensor | None, int]:
    """The two numbers of a seed side by side, and their address; 0 where there is none."""
    if seed is None:
        return None, 0
    pair, (address, _) = place(seed, 2, "seed", SEEDS)
    return pair, address


def rule_of(
    where: mask.Coordinates, domain: str, t: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What :func:`mask_of` says without looking at data: (lane, group) and (domain, last)."""
    group, lane = divmod(0 if where.col_shared else where.col_origin, LANES)
    return (lane, group), (mask.DOMAINS[domain] << 28, t - 1)


def mask_of(
    where: mask.Coordinates, seed: Tensor | None, domain: str, t: int, factors: Tensor | None = None
) -> tuple[tuple[int, ...], Any]:
    """What the kernels are told of the decisions, see ``fast_kernels.next_piece``, and the tensors
    that it has addresses of."""
    rows = mask.row_coordinates(where, "cpu") if where.leading and t else None
    first, rule = rule_of(where, domain, t)
    pair, address = pair_of(seed)
    places = 0 if rows is None else rows.data_ptr()
    by_row = 0 if factors is None else factors.data_ptr()
    return (places, *first, address, *rule, by_row), (rows, pair, factors)


def decide(where: mask.Coordinates, columns: int, seed: Tensor, domain: str, t: int) -> Tensor:
    """The decisions of the first ``columns`` of all rows."""
    keep = torch.empty((where.rows, columns), dtype=torch.bool, device="cpu")
    decisions, held = mask_of(where, seed, domain, t)
    out = keep.data_ptr()

    def call(_: int, start: int, stop: int) -> None:
        _loaded.keep_rows(start, stop, columns, decisions, out)

    share(parts_of(where.rows, columns), where.rows * columns, call, (keep, held))
    return keep


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
    loops: Any = kernels() if readable(seed) else None
    t = 0 if loops is None else int(drop_threshold)
    if t == 0:
        return mask.keep_mask(
            seed, shape, drop_threshold, shared=shared, shard=shard, domain=domain
        )
    where = mask.coordinates(shape, shared, shard)
    if domain == "drop_path" and not where.col_shared:
        raise ValueError("the masks of drop_path are shared along the last dimension")
    columns = min(1, where.cols) if where.col_shared else where.cols
    keep = decide(where, columns, seed, domain, t)
    return keep.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    origin: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """:func:`tridrop.mask.attention_keep_mask`, by numba where that serves."""
    loops: Any = kernels() if readable(seed) else None
    t = 0 if loops is None else int(drop_threshold)
    if t == 0:
        return mask.attention_keep_mask(seed, shape, drop_threshold, origin=origin)
    batch, heads, queries, keys = shape
    rows = batch * heads * queries
    keep = torch.empty((rows, keys), dtype=torch.bool, device="cpu")
    pair, address = pair_of(seed)
    domain, sizes = mask.DOMAINS["attention"] << 28, (heads, queries)
    others = (keys, sizes, address, domain, t - 1, tuple(origin), keep.data_ptr())

    def call(_: int, start: int, stop: int) -> None:
        loops.keep_scores(start, stop, *others)

    share(parts_of(rows, keys), rows * keys, call, (keep, pair))
    return keep.view(tuple(shape))
