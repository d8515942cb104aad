"""tridrop's own threads, where the loops cannot run in those of torch; see threads.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

_jobs: SimpleQueue[_Job] = SimpleQueue()
_workers = 0  # threads that wait for jobs
# How long the calling thread sleeps if an interrupt makes it miss the signal of a helper.
_PATIENCE = 0.01


def _forget() -> None:
    """Reset the state in a forked child, which has none of its parent's threads."""
    global _jobs, _workers
    _jobs, _workers = SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Job:
    """The parts of one call: each thread takes one after another until none is left.

    It works without locks: appending to a list and taking the next number are atomic. So an
    interrupt, or a signal handler that calls an op itself, never finds a lock taken.
    """

    def __init__(self, count: int, call: Callable[[int], object], keep_alive: Any) -> None:
        self.call: Any = call
        # The tensors whose addresses the kernels have live as long as a thread may use them.
        self.keep_alive = keep_alive
        self.numbers = iter(range(count))
        self.entered: list[None] = []  # one entry per helper that may take parts
        self.gone: list[None] = []  # one entry per helper that will take no more
        self.errors: list[BaseException] = []
        self.wake: SimpleQueue[None] = SimpleQueue()

    def work(self) -> None:
        """Take parts until none is left."""
        for number in self.numbers:
            self.call(number)

    def help(self) -> None:
        """Take parts in one of tridrop's own threads."""
        # The entry comes before any part is taken: the calling thread, once no part is left, then
        # sees all helpers that are still at work.
        self.entered.append(None)
        try:
            self.work()
        except BaseException as error:
            self.cancel()
            self.errors.append(error)
        finally:
            self.gone.append(None)
            self.wake.put(None)

    def wait(self) -> None:
        """Return when no helper is at work. It is called when no parts are left to take."""
        while len(self.gone) < len(self.entered):
            with suppress(Empty):
                self.wake.get(timeout=_PATIENCE)

    def cancel(self) -> None:
        """Let no more parts begin."""
        for _ in self.numbers:
            pass

    def release(self) -> None:
        """Release the function and the tensors: a helper that comes later finds no parts."""
        self.call = self.keep_alive = None


def _serve(jobs: SimpleQueue[_Job]) -> None:
    """The main loop of tridrop's own threads."""
    while True:
        jobs.get().help()


def share(count: int, threads: int, call: Callable[[int], object], keep_alive: Any) -> None:
    """Run ``call`` for all numbers below ``count``, in ``threads`` threads.

    It runs a kernel and no function of torch, whose modes differ from thread to thread.
    ``keep_alive`` holds all tensors whose addresses it has. The threads are not numba's, which
    either forbid two calls at a time or do not survive a fork, depending on the machine. The
    calling thread takes parts too, all of them if need be.

    Whatever is raised meanwhile, in a part or by an interrupt (Ctrl-C, a signal handler), no thread
    reads or writes the tensors' memory after this function has ended.
    """
    job = _Job(count, call, keep_alive)
    raised: BaseException | None = None
    while True:  # until no helper is at work: a second interrupt may come during the cleanup
        try:
            if raised is None:
                _hand_out(job, threads - 1)
                job.work()
            else:
                job.cancel()
            job.wait()
            break
        except BaseException as error:
            raised = error
    job.release()
    if raised is None and job.errors:
        raised = job.errors.pop()
    if raised is not None:
        try:
            raise raised
        finally:
            del raised  # or its traceback would keep this frame alive, and the frame the tensors


def _hand_out(job: _Job, helpers: int) -> None:
    """Ask ``helpers`` threads to help, and start those that do not exist yet."""
    global _workers
    while _workers < helpers:
        try:
            Thread(target=_serve, args=(_jobs,), name="tridrop", daemon=True).start()
        except RuntimeError:  # no thread can start: the interpreter is shutting down
            return
        _workers += 1
    for _ in range(helpers):
        _jobs.put(job)
