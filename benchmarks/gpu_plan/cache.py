"""Kernels compiled in advance: Triton's cache, filled without the GPU that it is for.

A kernel's key in the cache depends on its text, its arguments, the architecture and Triton's own
files, but not on the folder of the clone or of the cache. Only the lists of a kernel's files name
folders; :func:`take` rewrites them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from .archive import kernels, write_json
from .headline import LENGTHS, MEMORY_OPS, MEMORY_SIZE, WIDTHS
from .pieces import ROOT, Piece
from .running import environment

MANIFEST = "manifest.json"
SETS = ("tests", "headline")
ARCHS = (80, 90, 100)
P = 0.1
Job = tuple[str, int]
"""the kind of work, and its index"""


class Mismatch(ValueError):
    """A cache cannot be used here; the message is the reason."""


def identity() -> dict[str, str]:
    """What identifies Triton for its cache: its version and the content of its files."""
    import hashlib

    import triton
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "triton_files": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def count(folder: Path) -> int:
    """The number of compiled kernels in a cache."""
    return sum(1 for _ in folder.glob("*/*.cubin"))


# Using a cache.


def take(source: Path, target: Path, arch: int) -> str:
    """Make ``target`` a cache of Triton's with the content of ``source``, a folder or its .tar.gz.

    Returns a description of it. Raises Mismatch if this Triton, for ``arch``, would not use it.
    """
    if source.is_file():
        with tarfile.open(source) as packed:
            packed.extractall(target, filter="data")
    elif source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        raise Mismatch(f"there is no {source}")
    file = target / MANIFEST
    if not file.exists():
        raise Mismatch(f"{source} has no {MANIFEST}: fill it with --precompile")
    found, wanted = json.loads(file.read_text()), identity() | {"arch": arch}
    if others := [f"{k} {found.get(k)}, here {v}" for k, v in wanted.items() if found.get(k) != v]:
        raise Mismatch(f"it is for {'; '.join(others)}")
    relocate(target)
    changed = "" if found["kernels"] == kernels() else ", of kernels that have changed since"
    return f"{count(target)} kernels for sm_{arch}, Triton {found['triton']}{changed}"


def relocate(folder: Path) -> None:
    """Make the lists of a cache's files name the folder that the files are in now."""
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        files = {name: group.parent / name for name in names}
        paths = {name: str(file) for name, file in files.items() if file.exists()}
        group.write_text(json.dumps({"child_paths": paths}))


def trim(folder: Path) -> None:
    """Remove the kernels' first intermediate form, half of a cache, which no launch reads."""
    for file in folder.glob("*/*.source"):
        file.unlink()


def complete(folder: Path, wanted: str) -> bool:
    """Whether a cache was filled with this set of the present kernels."""
    file = folder / MANIFEST
    if not file.exists():
        return False
    about = json.loads(file.read_text())
    return wanted in about["sets"] and about["kernels"] == kernels()


# Filling a cache.


def precompile(
    folder: Path, sets: Sequence[str], arch: int, workers: int, tests: Sequence[Piece]
) -> dict[str, Any]:
    """Compile what the sets need into ``folder``; returns the manifest, with counts.

    Args:
        folder: a cache of Triton's, or a folder that becomes one.
        sets: "tests", the correctness tests, and "headline", the rows that are timed first.
        arch: the architecture, such as 90.
        workers: the number of processes.
        tests: the pieces of the first set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = count(folder)
    environ = environment(folder) | {"TRITON_STORE_BINARY_ONLY": "1"}
    if "headline" in sets:
        _compile_headline(environ, arch, workers)
        _expect(folder, "the headline")
    if "tests" in sets:
        for piece in tests:
            _compile_tests(piece, environ, arch, workers)
        _expect(folder, "the tests")
    trim(folder)
    # A set that an earlier call filled with the present kernels stays in the list.
    filled = [name for name in SETS if name in sets or complete(folder, name)]
    about = {**identity(), "arch": arch, "kernels": kernels(), "sets": filled}
    write_json(about, folder / MANIFEST)
    return about | {"count": count(folder), "compiled": count(folder) - before}


def _expect(folder: Path, what: str) -> None:
    if not count(folder):
        raise RuntimeError(f"{what} launched nothing: there is no kernel in {folder}")


def _compile_tests(piece: Piece, environ: dict[str, str], arch: int, workers: int) -> None:
    """Run a piece's tests with a driver that launches nothing; they may fail."""
    command = [*piece.command, "-p", "gpu_plan.stub_device", "-q", "--tb=no", "--maxfail=1000000"]
    command[command.index("-n") + 1] = str(workers)
    command = [part for part in command if not part.startswith("--junitxml")]
    environ = environ | {"GPU_PLAN_ARCH": str(arch), "TRIDROP_BACKEND": "triton"}
    found = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if found.returncode not in (0, 1):
        raise RuntimeError(f"{piece.name} did not run:\n{found.stdout[-3000:]}{found.stderr}")


def _compile_headline(environ: dict[str, str], arch: int, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    saved = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)  # which new processes inherit
    try:
        with ProcessPoolExecutor(workers, context, _install, (arch,)) as pool:
            for _ in pool.map(_do, list(jobs())):
                pass
    finally:
        os.environ.clear()
        os.environ.update(saved)


_process = ExitStack()  # open for as long as the process is


def _install(arch: int) -> None:
    import torch

    from . import stub

    torch.set_num_threads(1)
    _process.enter_context(stub.launching(arch))


def _rows() -> list[Any]:
    from tridrop.commands.bench.options import Options

    attention = Options.of(
        "cuda", ops=["scaled_dot_product_attention"], lengths=LENGTHS, head_dims=WIDTHS
    )
    memory = Options.of("cuda", ops=MEMORY_OPS, sizes=[MEMORY_SIZE])
    return [*memory.rows, *attention.rows]


def jobs() -> Iterator[Job]:
    """The parts of the headline, which are independent of each other."""
    yield ("step", 0)
    yield from itertools.product(("row", "check"), range(len(_rows())))


def _do(job: Job) -> None:
    perform(*job)


def perform(kind: str, index: int) -> None:
    """Make the calls of a headline row, in a process in which no kernel runs."""
    actions: dict[str, Callable[[int], None]] = {"row": _row, "check": _check, "step": _step}
    actions[kind](index)


def _row(index: int) -> None:
    """Run forward and backward at the size that is timed, with dropout and without."""
    import torch

    from tridrop.commands.bench.providers import tridrop_call
    from tridrop.commands.bench.timing import Operands, results

    row = _rows()[index]
    for p in (P, 0.0):
        case = row.sized(p)
        operands = Operands(case.inputs(torch.bfloat16, "cpu", torch.Generator().manual_seed(0)))
        operands.backward(results(tridrop_call(case)(operands.leaves)))


def _check(index: int) -> None:
    """Make the check that a row must pass before it is timed."""
    import torch

    from tridrop.commands.bench.gate import SEEDS
    from tridrop.commands.check import check_case
    from tridrop.commands.check.measure import run_with_gradients

    row = _rows()[index]
    check_case(row.case, torch.bfloat16, "triton", "cpu", SEEDS)
    case = row.checked(P)
    inputs = case.inputs(torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
    run_with_gradients(lambda i: case.call(i, 7, P, True), inputs, None)


def _step(index: int) -> None:
    """Run a step of GPT-2 small; one layer and a small vocabulary use all of its kernels."""
    import torch

    import tridrop
    from tridrop.commands.bench import models

    architecture = models.ARCHITECTURES["gpt2"]
    size = replace(architecture.full, layers=1, vocabulary=64)
    for p in (P, 0.0):
        model = architecture.build(size, p).train()
        tridrop.swap(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**architecture.data(size, "cpu")).loss
        loss.backward()
