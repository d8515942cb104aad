"""``tridrop warmup``: compiles the CPU loops ahead, with one process per family of ops.

Within a process numba compiles one function at a time, so several processes share the families.
Each compiles the loops by small calls of the ops, and keeps them on disk.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import backends, functional
from ..backends.cpu import serving
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
}


def loops_of(family: str) -> int:
    """How many loops a family compiles."""
    return len(_forms()) if family == "activations" else 2


def run(
    families: Sequence[str], jobs: int, on_loop: Callable[[str], None] | None = None
) -> list[str]:
    """Compile the loops of ``families`` in ``jobs`` processes.

    ``on_loop`` is called after each loop with its family, from several threads. Returns the error
    output of the processes that failed; empty if none did. An interrupt stops all of them.
    """
    started: list[subprocess.Popen[str]] = []
    stopped = False

    def compile_family(name: str) -> str:
        if stopped:
            return ""
        command = [sys.executable, "-m", f"{__package__}.warmup", name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            started.append(process)
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in process.stdout:
                if on_loop is not None:
                    on_loop(name)
            said = process.stderr.read()
            return f"{name}: {said}" if process.wait() or said else ""

    with ThreadPoolExecutor(jobs) as threads:
        futures = [threads.submit(compile_family, name) for name in families]
        try:
            return [said for said in (future.result() for future in futures) if said]
        except BaseException:
            stopped = True
            for process in started:
                process.kill()
            raise


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
    with terminal.bar() as progress:
        task = progress.add_task("compiling loops", total=loops)
        failed = run(names, args.jobs, lambda _: progress.advance(task))
    for said in failed:
        print(f"tridrop warmup: {said}", file=sys.stderr)
    if failed:
        return 1
    from ..backends.cpu.loops.cache import folder

    print(f"{loops} loops are compiled, in {folder()}")
    return 0


def _worker(name: str) -> None:
    """Compile one family, and print a line per loop."""
    # the parent process handles Ctrl-C, and stops this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in FAMILIES[name]():
        print(name, flush=True)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
