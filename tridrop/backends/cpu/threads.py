"""Threads of tridrop's own that share the rows of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch

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
