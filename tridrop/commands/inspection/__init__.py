"""The machine code of the kernels, compiled without a GPU, behind ``tridrop inspect``.

>>> from tridrop.commands import inspection
>>> inspection.run(ops=["softmax"])
Traceback (most recent call last):
    ...
ValueError: op 'softmax' is not known; known: dropout, dropout_add, activation_dropout, ...
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

from ... import __version__, backends
from ...spec.attention import SPECIALIZE
from .devices import DEVICES
from .records import DTYPES
from .rows import OPS, TABLE

ARCHS = tuple(dict.fromkeys(device.arch for device in DEVICES))

__all__ = ["ARCHS", "DTYPES", "OPS", "choose", "run"]


def choose(what: str, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """``names``, or all ``known`` ones if None; a ValueError lists these if a name is not known."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known; known: {', '.join(known)}")
    return list(dict.fromkeys(names)) if names else list(known)


def run(
    ops: Sequence[str] | None = None,
    archs: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    jobs: int = 2,
    on_start: Callable[[int], None] | None = None,
    on_done: Callable[[str], None] | None = None,
    on_records: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Compile the kernels of the ops, and return a record of each; see docs/performance.md.

    Args:
        ops: names of public functions; None for all.
        archs: None for sm_80, sm_90, sm_100 and gfx942.
        dtypes: None for bf16.
        jobs: the number of processes that compile.
        on_start: called with the number of calls to compile.
        on_done: called after each of these with its name, from several threads.
        on_records: called with the records of each, in order.

    Raises:
        ValueError: a name is unknown.
        ImportError: triton is not installed.
        RuntimeError: a kernel did not compile.
    """
    wanted = choose("op", ops, OPS)
    machines = choose("arch", archs, ARCHS)
    kinds = choose("dtype", dtypes or ["bf16"], tuple(DTYPES))
    backends.load("triton")
    tasks = [
        (row.name, arch, dtype, method)
        for row in TABLE.values()
        if row.op in wanted
        for dtype in kinds
        for arch in machines
        for method in row.methods
    ]
    if on_start is not None:
        on_start(len(tasks))
    workers: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
    started = [_start() for _ in range(min(jobs, len(tasks)))]
    said: set[str] = set()
    for worker in started:
        workers.put(worker)
        Thread(target=_relay, args=(worker, said), daemon=True).start()
    source = provenance()
    records: list[dict[str, Any]] = []

    def compile_in_worker(task: tuple[str, str, str, str]) -> list[dict[str, Any]]:
        worker = workers.get()
        try:
            records = _ask(worker, task)
        finally:
            workers.put(worker)
        if on_done is not None:
            on_done(" ".join(task))
        return records

    try:
        with ThreadPoolExecutor(len(started)) as threads:
            futures = [threads.submit(compile_in_worker, task) for task in tasks]
            try:
                for future in futures:
                    found = [record | source for record in future.result()]
                    records += found
                    if on_records is not None:
                        on_records(found)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in started:  # otherwise the threads would wait until they have compiled
                    worker.kill()
                raise
    finally:
        for worker in started:
            worker.kill()
            worker.wait()
    return records


def provenance() -> dict[str, str]:
    """The versions that compiled, and the commit if this is a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    version = f"{__version__} ({commit})" if commit else __version__
    return {"tridrop": version, "triton": metadata.version("triton")}


def _start() -> subprocess.Popen[str]:
    # In a separate process, Triton compiles even if it interprets in this one, and can compile for
    # a GPU that this machine does not have. The rows are those of the ordinary kernels: a count per
    # score says nothing of a kernel whose threads do different things.
    others = ("TRITON_INTERPRET", SPECIALIZE)
    environment = {k: v for k, v in os.environ.items() if k not in others}
    command = [sys.executable, "-m", "tridrop.commands.inspection.worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    )


def _relay(worker: subprocess.Popen[str], said: set[str]) -> None:
    """Pass on what a worker writes to standard error; lines that several write appear once."""
    assert worker.stderr is not None
    for line in worker.stderr:
        if line not in said:
            said.add(line)
            print(line, end="", file=sys.stderr, flush=True)


def _ask(worker: subprocess.Popen[str], task: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    what = ", ".join(task)
    if not line:
        raise RuntimeError(f"the process that compiled ({what}) ended")
    answer = json.loads(line)
    if isinstance(answer, dict):
        raise RuntimeError(f"({what}) did not compile:\n{answer['error']}")
    return list(answer)
