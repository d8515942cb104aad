"""Compile the kernels for GPUs that need not be here.

A launcher is called with tensors of the device "meta", and what it would have launched is compiled
instead: the same kernel, arguments, constants and settings, and no data at all.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import (
    attention_launch,
    elementwise,
    launch,
    masks,
    norm_launch,
    product_launch,
    softmax_launch,
    yardstick,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LAUNCHERS = (
    attention_launch,
    elementwise,
    masks,
    norm_launch,
    product_launch,
    softmax_launch,
    yardstick,
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would have been launched on ``arch``."""

    kernel: str
    arch: str
    text: str
    """what cuobjdump says of the machine code and its resources, or AMD's assembly"""
    constants: dict[str, Any]
    """the compile-time arguments: tiles, features"""
    threads: int
    """of a program"""
    shared_bytes: int
    """shared memory of a program"""
    tensor_bytes: int
    """all tensors that the kernel is given, each once"""

    @property
    def tile(self) -> int:
        """The elements, or scores, that a program has in its hands at a time."""
        c = self.constants
        if "BLOCKS" in c:
            return int(c["BLOCKS"].M * c["BLOCKS"].N)
        if "BLOCK_ROWS" in c:
            return int(c["BLOCK_ROWS"] * c["BLOCK_COLS"])
        return int(c["BLOCK"] * c["VALUES"])


class _Driver:
    """Stands for the driver of a GPU that is not there; nothing is launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Takes a kernel's place in its launcher."""

    def __init__(self, name: str, kernel: Any, arch: str, found: list[Compiled]) -> None:
        self.name, self.kernel, self.arch, self.found = name, kernel, arch, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            # Kernels are cached by device, and all targets are the same device here.
            self.kernel.device_caches.clear()
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            tensors = {id(t): t for t in _tensors(args)}
            warp = TARGETS[self.arch].warp_size
            self.found.append(
                Compiled(
                    kernel=self.name,
                    arch=self.arch,
                    text=_text(compiled.asm),
                    constants={k: v for k, v in kwargs.items() if k.isupper()},
                    threads=compiled.metadata.num_warps * warp,
                    shared_bytes=compiled.metadata.shared,
                    tensor_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
                )
            )

        return compile_only


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _text(asm: dict[str, Any]) -> str:
    if "cubin" not in asm:
        return str(asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def _recording(arch: str) -> Iterator[list[Compiled]]:
    found: list[Compiled] = []
    places = [
        (module, name, kernel)
        for module in LAUNCHERS
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in places:
        setattr(module, name, _Recorder(name, kernel, arch, found))
    try:
        yield found
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)


def capture(arch: str, call: Callable[[], object]) -> list[Compiled]:
    """The kernels that ``call`` would launch on ``arch``, compiled, in order.

    For a process of its own: Triton's driver is another one from here on.
    """
    if launch.interpreting():
        raise RuntimeError(
            "kernels of Triton's interpreter cannot be compiled: unset TRITON_INTERPRET in the "
            "environment before the first import of triton"
        )
    driver.set_active(_Driver(TARGETS[arch]))
    with _recording(arch) as found:
        call()
    return found
