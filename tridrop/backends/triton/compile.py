"""Compile the kernels for GPUs that need not be present.

A launcher is called with tensors on the device "meta", and the kernel that it would launch is
compiled instead, with the same arguments, constants and settings but without data.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from . import (
    attention_launch,
    elementwise,
    launch,
    masks,
    norm_launch,
    product_launch,
    softmax_launch,
    sums,
    yardstick,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may use. NVIDIA: CUDA C++ Programming Guide, technical
# specifications by compute capability; AMD: CDNA 3 ISA, the local data share of a compute unit.
SHARED = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
LAUNCHERS = (
    attention_launch,
    elementwise,
    masks,
    norm_launch,
    product_launch,
    softmax_launch,
    sums,
    yardstick,
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would have been launched on ``arch``."""

    kernel: str
    arch: str
    text: str
    """cuobjdump's output for the machine code and its resources, or AMD's assembly; or the text of
    the requested stage"""
    grid: tuple[int, ...]
    numbers: tuple[int | float, ...]
    """the numbers among the arguments, in order"""
    constants: dict[str, Any]
    """the compile-time arguments: tiles, features"""
    threads: int
    """threads of a program"""
    shared_bytes: int
    """shared memory of a program; 0 if the compiler was stopped before it was laid out"""
    tensor_bytes: int
    """bytes of all tensors that the kernel gets, each counted once"""
    fuses: bool
    """whether a product and a sum may become one instruction"""

    @property
    def tile(self) -> int:
        """How many elements, or scores, a program works on at a time."""
        c = self.constants
        if "BLOCKS" in c:
            return int(c["BLOCKS"].M * c["BLOCKS"].N)
        if "BLOCK_ROWS" in c:
            return int(c["BLOCK_ROWS"] * c["BLOCK_COLS"])
        return int(c["BLOCK"] * c["VALUES"])


class _Driver:
    """Takes the place of the driver of a GPU that is not present; nothing is launched."""

    def __init__(self, arch: str) -> None:
        self.target, self.shared = TARGETS[arch], SHARED[arch]
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}


class _Stopped(Exception):
    """The compiler has finished the stage after which it was to stop."""

    def __init__(self, text: str, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.text, self.metadata = text, metadata


@contextmanager
def _stopping(arch: str, until: str) -> Iterator[None]:
    """A block in which compilers for ``arch`` raise :class:`_Stopped` after the stage ``until``."""
    compiler = type(make_backend(TARGETS[arch]))
    original = compiler.add_stages

    def stop(module: Any, metadata: dict[str, Any]) -> None:
        raise _Stopped(str(module), metadata)

    def add_stages(self: Any, stages: dict[str, Any], *args: Any) -> None:
        original(self, stages, *args)
        names = list(stages)
        stages[names[names.index(until) + 1]] = stop

    compiler.add_stages = add_stages
    try:
        yield
    finally:
        compiler.add_stages = original


class _Recorder:
    """Takes a kernel's place in its launcher, and compiles the kernel instead of launching it."""

    def __init__(
        self, name: str, kernel: Any, arch: str, until: str | None, found: list[Compiled]
    ) -> None:
        self.name, self.kernel, self.arch, self.until, self.found = name, kernel, arch, until, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            # Triton caches kernels by device, and all targets have the same device here.
            self.kernel.device_caches.clear()
            try:
                compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
                metadata = compiled.metadata._asdict()
                text = _text(compiled.asm) if self.until is None else compiled.asm[self.until]
            except _Stopped as stopped:
                text, metadata = stopped.text, stopped.metadata
            tensors = {id(t): t for t in _leaves(args) if isinstance(t, Tensor)}
            warp = TARGETS[self.arch].warp_size
            self.found.append(
                Compiled(
                    kernel=self.name,
                    arch=self.arch,
                    text=text,
                    grid=grid,
                    numbers=tuple(n for n in _leaves(args) if isinstance(n, int | float)),
                    constants={k: v for k, v in kwargs.items() if k.isupper()},
                    threads=metadata["num_warps"] * warp,
                    shared_bytes=metadata.get("shared", 0),
                    tensor_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
                    fuses=kwargs.get("enable_fp_fusion", False),
                )
            )

        return compile_only


def _leaves(value: Any) -> Iterator[Any]:
    """The kernel's arguments one by one, with named tuples taken apart."""
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _text(asm: dict[str, Any]) -> str:
    if "cubin" not in asm:
        return str(asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def _recording(
    arch: str, until: str | None, launchers: Sequence[ModuleType]
) -> Iterator[list[Compiled]]:
    found: list[Compiled] = []
    places = [
        (module, name, kernel)
        for module in launchers
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in places:
        setattr(module, name, _Recorder(name, kernel, arch, until, found))
    try:
        yield found
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)


def capture(
    arch: str,
    call: Callable[[], object],
    until: str | None = None,
    launchers: Sequence[ModuleType] = LAUNCHERS,
) -> list[Compiled]:
    """The kernels that ``call`` would launch on ``arch``, compiled, in order.

    ``until`` names the stage after which the compiler stops and whose text is returned: "ttir",
    "ttgir", or "llir", where the shared memory is laid out. ``launchers`` are the modules whose
    kernels are compiled.

    Run this in a separate process, because it replaces Triton's driver.
    """
    if launch.interpreting():
        raise RuntimeError(
            "kernels of Triton's interpreter cannot be compiled: unset TRITON_INTERPRET in the "
            "environment before the first import of triton"
        )
    driver.set_active(_Driver(arch))
    stopping = _stopping(arch, until) if until else nullcontext()
    with _recording(arch, until, launchers) as found, stopping:
        call()
    return found
