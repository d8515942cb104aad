"""``tridrop warmup``: compiles the CPU loops ahead, in several processes.

Within a process numba compiles one function at a time, so several processes share the families of
ops. Each takes one family after another, since steps that two families have in common are compiled
once in a process. It compiles the loops by small calls of the ops, and keeps them on disk.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from .. import backends, functional
from ..backends.cpu import products, serving, torch_library
from ..base import terminal


def _elementwise() -> Iterator[None]:
    x = torch.zeros(2, 8, requires_grad=True)
    y = functional.dropout(x, 0.5, seed=0)
    yield
    y.sum().backward()
    yield


def _norms() -> Iterator[None]:
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = functional.dropout_add_rms_norm(x, x, weight, p=0.5, seed=0)
    yield
    y.backward(torch.ones(2, 8))  # type: ignore[union-attr]  # without prenorm it is a tensor
    yield


def _softmax() -> Iterator[None]:
    scores = torch.zeros(1, 1, 2, 8, requires_grad=True)
    y = functional.softmax_dropout(scores, 0.5, seed=0)
    yield
    y.sum().backward()
    yield


def _products() -> Iterator[None]:
    if not torch_library.table:
        return
    query, threads_before = torch.zeros(1, 1, 2, 8), torch.get_num_threads()
    torch.set_num_threads(1)  # products of fewer heads than threads are not the loop's
    try:
        products.multiply(query, query.mT)
    finally:
        torch.set_num_threads(threads_before)
    yield


def _masks() -> Iterator[None]:
    functional.keep_mask(0, (2, 8), 0.5)
    yield
    functional.attention_keep_mask(0, (1, 1, 2, 8), 0.5)
    yield


def _forms() -> list[Any]:
    """The forms of activations that have loops."""
    forms = [form for pair in serving.kernels().functions.values() for form in pair]
    return [form for form in dict.fromkeys(forms) if form.name != "none"]


def _activations() -> Iterator[None]:
    for form in _forms():
        _ = form.address  # compiles the loops over it
        yield


# Those that take longest come first. Each yields once per compiled loop.
FAMILIES: dict[str, Callable[[], Iterator[None]]] = {
    "elementwise": _elementwise,
    "norms": _norms,
    "softmax": _softmax,
    "activations": _activations,
    "masks": _masks,
    "products": _products,
}


def loops_of(family: str) -> int:
    """How many loops a family compiles."""
    others = {"activations": len(_forms()), "products": int(torch_library.table != 0)}
    return others.get(family, 2)


def _processes() -> Any:
    """How processes are started. A fork has all modules, whose import takes seconds, already.

    A fork of a process with several threads could inherit a lock that nobody opens any more, and
    outside of Linux system libraries do not survive one.
    """
    forks = sys.platform == "linux" and threading.active_count() == 1
    return multiprocessing.get_context("fork" if forks else "spawn")


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until a process has started and is known.

    Python runs functions of other packages before and after a fork, and an interrupt that is raised
    in one of these is printed and forgotten.
    """
    block = getattr(signal, "pthread_sigmask", None)  # not on Windows
    before = None if block is None else block(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if block is not None:
            block(signal.SIG_SETMASK, before)


class _Worker:
    """A process that compiles one family after another, as seen from the one that started it."""

    def __init__(self, processes: Any, errors: Path) -> None:
        self.family = ""  # what it compiles
        self.connection, other = processes.Pipe()
        self.process = processes.Process(target=_work, args=(other, str(errors)), daemon=True)
        errors.touch()
        self._errors = errors.open(errors="replace")
        self.process.start()
        other.close()  # so that the connection ends with the process

    def begin(self, family: str) -> None:
        self.family = family
        self.connection.send(family)

    def said(self) -> str:
        """What was written on standard error since the last time."""
        return self._errors.read()

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        self._errors.close()


class Workers:
    """Processes that compile the loops of ``families``, ``jobs`` at a time.

    They start when the context is entered. When it is left, by an interrupt too, they are stopped.
    ``failed`` has the error output of each family that was not compiled.
    """

    def __init__(self, families: Sequence[str], jobs: int) -> None:
        self.failed: list[str] = []
        self._waiting, self._jobs = list(families), min(jobs, len(families))
        self._busy: dict[Connection, _Worker] = {}
        self._held = ExitStack()
        self._started = 0

    def __enter__(self) -> Workers:
        self._folder = Path(self._held.enter_context(TemporaryDirectory()))
        try:
            for _ in range(self._jobs):
                self._start()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _start(self) -> None:
        self._started += 1
        with _interrupts_wait():
            # Asked each time: a progress bar has a thread when one takes a dead one's place.
            worker = _Worker(_processes(), self._folder / str(self._started))
            self._held.callback(worker.stop)
        self._busy[worker.connection] = worker
        worker.begin(self._waiting.pop(0))

    def loops(self) -> Iterator[str]:
        """The family of each loop that is compiled, until all are."""
        while self._busy:
            for connection in cast("list[Connection]", wait(list(self._busy))):
                worker = self._busy[connection]
                try:
                    whole, status = connection.recv(), ""
                except (EOFError, OSError):  # the process has ended
                    worker.process.join()
                    whole, status = None, f"its process ended with {worker.process.exitcode}\n"
                if whole is False:
                    yield worker.family
                    continue
                said = worker.said() + status
                if said:
                    self.failed.append(f"{worker.family}: {said}")
                if whole and self._waiting:
                    worker.begin(self._waiting.pop(0))
                    continue
                del self._busy[worker.connection]
                if self._waiting:
                    self._start()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tridrop warmup``."""
    # Before Python 3.12 argparse compares the default of "*" with the choices, so there are none.
    parser.add_argument(
        "family",
        nargs="*",
        metavar="FAMILY",
        help=f"compile only these: {', '.join(FAMILIES)} (default: all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(len(FAMILIES), os.cpu_count() or 1),
        help="processes at a time (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Run it. Returns 0 if all loops are on disk, 1 if some failed, 2 if none can be kept."""
    for name in args.family:
        if name not in FAMILIES:
            known = ", ".join(FAMILIES)
            print(f"tridrop warmup: {name!r} is no family of ops; known: {known}", file=sys.stderr)
            return 2
    if args.jobs < 1:
        print(f"tridrop warmup: --jobs must be at least 1, not {args.jobs}", file=sys.stderr)
        return 2
    try:
        name = backends.name_for(torch.device("cpu"))
        backends.load(name)
    except (ImportError, ValueError) as error:  # the environment names what is not there
        print(f"tridrop warmup: {error}", file=sys.stderr)
        return 2
    if name != "cpu":
        print(f"tridrop warmup: nothing to compile: the {name} backend runs CPU tensors here")
        return 0
    if os.environ.get(serving.CACHE_ENVIRONMENT) == "0":
        text = f"{serving.CACHE_ENVIRONMENT}=0 is set, so that compiled loops would not be kept"
        print(f"tridrop warmup: {text}", file=sys.stderr)
        return 2
    names = [name for name in FAMILIES if name in args.family or not args.family]
    loops = sum(map(loops_of, names))
    with Workers(names, args.jobs) as workers, terminal.bar() as progress:
        task = progress.add_task("compiling loops", total=loops)
        for _ in workers.loops():
            progress.advance(task)
    for said in workers.failed:
        print(f"tridrop warmup: {said}", file=sys.stderr)
    if workers.failed:
        return 1
    from ..backends.cpu.loops.cache import folder

    print(f"{loops} loops are compiled, in {folder()}")
    return 0


def _work(connection: Connection, errors: str) -> None:
    """Compile the families that are named, one after another, until the other side closes.

    The answers are False for each loop, and True at the end of a family. Standard error goes to a
    file, also what LLVM writes there before it ends the process.
    """
    # the parent process handles Ctrl-C, and stops this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115  # until the process ends
    os.dup2(sys.stderr.fileno(), 2)
    gc.freeze()  # the modules are no garbage, and searching them takes time again and again
    while True:
        try:
            family = connection.recv()
        except EOFError:
            return
        try:
            for _ in FAMILIES[family]():
                connection.send(False)
        except Exception:
            traceback.print_exc()
        connection.send(True)
