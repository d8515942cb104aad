"""A driver for Triton without a GPU: it compiles kernels, and launches nothing.

The launchers, their arguments and Triton's own steps are those of a machine with a GPU; results are
whatever their memory held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

import tridrop
from tridrop import backends

# Bytes of shared memory per program: CUDA C++ Programming Guide, technical specifications.
SHARED = {80: 166912, 90: 232448, 100: 232448}


class _NoLauncher:
    """Takes the arguments of a launcher, and launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Utils:
    """Answers Triton's questions about the device."""

    def __init__(self, arch: int) -> None:
        self.properties = {
            "max_shared_mem": SHARED[arch], "multiprocessor_count": 132, "warpSize": 32,
        }  # fmt: skip

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads


class Driver:
    """Replaces the driver of one GPU of an architecture, such as 90."""

    launcher_cls = _NoLauncher

    def __init__(self, arch: int = 90) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = _Utils(arch)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def launching(arch: int = 90) -> Iterator[None]:
    """Make calls on CPU tensors use Triton inside; no kernel runs.

    Use it in a separate process: Triton's driver stays replaced afterwards.
    """
    triton.runtime.driver.set_active(Driver(arch))
    module = backends.load("triton")
    with tridrop.backend("triton"), mock.patch.object(module, "why_not", return_value=None):
        yield


class Counts:
    """How many kernels a process found in Triton's cache, and how many it compiled."""

    def __init__(self) -> None:
        self.hits = self.misses = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.hits += 1
        else:
            self.misses += 1


@contextmanager
def counting() -> Iterator[Counts]:
    """Count inside: Triton calls a listener for every kernel that it needs for the first time."""
    counts = Counts()
    before, knobs.compilation.listener = knobs.compilation.listener, counts
    try:
        yield counts
    finally:
        knobs.compilation.listener = before
