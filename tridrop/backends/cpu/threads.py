"""The threads that share the rows of a call, those of torch where that is possible.

torch's operators run in threads of OpenMP, which turn a loop for some milliseconds after each
operator before they sleep. Other threads get no core meanwhile: with two of them on two cores,
dropout of [512, 3072] after a matrix product took as long as with one. So the loops run in the same
threads, by ``GOMP_parallel``, what GCC makes of a parallel region: torch's library has it on Linux,
and both GCC's and Intel's OpenMP offer it. Elsewhere, and in a forked child, to which OpenMP's
threads do not come along, own_threads.py serves.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from . import own_threads
from .memory import Reads, Tensors, handles, places
from .torch_library import gomp_parallel, table

# Several threads save time from so many elements on: they are some 0.1 ms of work, and handing it
# over takes a few microseconds, or 0.05 ms if the other threads sleep.
_SHARED = 1 << 17
_PART = 1 << 15  # the elements of a part
# Each part has its own sums: the first number bounds their memory, the second one the rows that are
# summed in fp32.
_MOST_PARTS, _LONGEST_PART = 256, 1024


class Parts(NamedTuple):
    """How the rows of a call are divided among threads."""

    # The number of the first part and the one after the last, the rows, and the rows of a part, of
    # which the last one may have fewer; and 1, as all parts are done by one call of the kernel.
    work: tuple[int, int, int, int, int]
    shared: bool  # whether the call has enough to do for several threads

    @property
    def number(self) -> int:
        """How many parts there are."""
        return self.work[1]

    @property
    def step(self) -> int:
        """How many rows a part has."""
        return self.work[3]


_parallel = gomp_parallel
_ALONE = 0, 1, table  # the team of a call by one thread


def _forget() -> None:
    global _parallel
    _parallel = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def report() -> str:
    """What ``tridrop info`` says about the threads."""
    return "the threads of torch" if _parallel else "threads of its own"


def parts_of(rows: int, columns: int) -> Parts:
    """How a call is divided.

    It depends on sizes alone, so that sums over the parts do not depend on the number of threads.
    """
    parts = min(rows, rows * columns // _PART, _MOST_PARTS)
    step = max(1, min(-(-rows // max(1, parts)), _LONGEST_PART))
    count = -(-rows // step)
    return Parts((0, count, rows, step, 1), count > 1 and rows * columns >= _SHARED)


def torchs_team() -> tuple[int, int, int] | None:
    """All of torch's threads, as kernels take them; None where kernels cannot use them."""
    threads = torch.get_num_threads()
    if not table or (threads > 1 and not _parallel):
        return None
    return _ALONE if threads < 2 else (_parallel, threads, table)


def share(
    kernel: Any,
    parts: Parts,
    tensors: Tensors,
    reads: Reads,
    arguments: tuple[Any, ...],
    keep_alive: Any,
) -> None:
    """Call a kernel for all parts, in torch's number of threads.

    ``reads`` says what the kernel reads of ``tensors``; ``keep_alive`` holds those to whose memory
    its other ``arguments`` point. No thread reads or writes their memory after this function has
    ended, also where an interrupt ends it.

    Raises:
        TypeError, ValueError: one of the tensors is not what is read, or has no memory.
    """
    work, shared = parts
    threads = torch.get_num_threads() if shared else 1
    own = threads > 1 and not _parallel
    # Another number of threads than torch's would make OpenMP end some, and start them again.
    team = _ALONE if threads < 2 or own else (_parallel, threads, table)
    if table and not own and kernel(team, work, handles(tensors), reads.wanted, arguments) == 0:
        return
    # What the kernel refuses is copied here, or named in an error.
    held, addresses, codes = places(tensors, reads)
    if not own:
        kernel(team, work, addresses, codes, arguments)
        return
    rows, step = work[2:4]

    def call(number: int) -> None:
        kernel(team, (number, number + 1, rows, step, 0), addresses, codes, arguments)

    own_threads.share(parts.number, threads, call, (held, keep_alive))
    kernel(
        team, (0, 0, rows, step, 1), addresses, codes, arguments
    )  # what all parts are needed for
