"""The device that is timed: its name, caches and clock, and the versions that ran on it."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import backends
from ...backends.cpu import serving
from ...base.torch_private import sleep
from ..info import versions
from ..inspection import provenance

Thunk = Callable[[], Any]
_UNKNOWN_CACHE = 64 * 2**20
_HIP_CACHE = 256 * 2**20  # the cache behind the L2 of an MI300; torch only reports the L2
_CYCLES = 2e9  # clock cycles per second: no GPU has more


class Machine:
    """A device, and ways to time calls on it.

    Raises:
        ValueError: the device is neither cuda nor cpu.
        RuntimeError: there is no such device, or tridrop's backend for it is Triton's interpreter,
            which is for tests.
    """

    def __init__(self, device: str) -> None:
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device {device!r} is not known; known: cuda, cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device here: use --device cpu")
        self.device = device
        self.cuda = device == "cuda"
        self.backend = backends.name_for(torch.device(device))
        if self.backend == "triton" and not self.cuda:
            raise RuntimeError(
                "on a CPU the Triton backend runs in Triton's interpreter, which is not "
                f"worth timing: unset {backends.ENVIRONMENT}"
            )
        self.name = torch.cuda.get_device_name() if self.cuda else _cpu_name()
        self.cache_bytes = _cuda_cache() if self.cuda else _cpu_cache()

    @property
    def slug(self) -> str:
        """A short name for files."""
        name = self.name if self.cuda else "cpu"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, calls: Sequence[Thunk], host: float) -> float:
        """Seconds per call, for calls one after the other.

        On a GPU this is the time of the device. It first sleeps for as long as the host is expected
        to need (``host`` seconds per call), so that the queue is full when the first kernel begins.
        The host time is measured separately.
        """
        if not self.cuda:
            return self.wall_seconds(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        sleep(int((1.5 * host * len(calls) + 1e-4) * _CYCLES))
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    def wall_seconds(self, calls: Sequence[Thunk]) -> float:
        """Seconds per call, from the start of the first to the end of the last on the device."""
        self.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        self.synchronize()
        return (time.perf_counter() - start) / len(calls)

    def host_seconds(self, call: Thunk) -> float:
        """Seconds until a call returns, on a device that has nothing else to do."""
        self.synchronize()
        start = time.perf_counter()
        call()
        found = time.perf_counter() - start
        self.synchronize()
        return found

    def peak_bytes(self, call: Thunk) -> int | None:
        """The peak of the memory that a call allocates in addition; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Thunk) -> int | None:
        """The number of kernels, copies and fills in a call on a GPU; None if the profiler sees
        none.

        On a CPU, the number of operators that are not called by another operator.
        """
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the messages of torch's profiler
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.synchronize()
        with torch.profiler.profile(activities=kinds) as profile:
            call()
            self.synchronize()
        events = profile.events() or []
        if self.cuda:
            kernels = [
                e for e in events
                if e.device_type.name == "CUDA"
                and not getattr(e, "is_user_annotation", False)
            ]  # fmt: skip
            return len(kernels) or None
        return sum(_is_operator(e.name) and not _inside(e) for e in events)

    def about(self) -> dict[str, Any]:
        """What the figures were measured with: device, versions and commit."""
        found = versions("torch", "triton", "numba", "numpy", "transformers")
        found["tridrop"] = provenance()["tridrop"]
        return {
            "device": self.name,
            "cache_bytes": self.cache_bytes,
            "backend": self.backend,
            "masks_on_cpu": serving.report(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "versions": found,
            "date": time.strftime("%Y-%m-%d"),
        }


def _is_operator(name: str) -> bool:
    return "::" in name and not name.startswith("autograd::")


def _inside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent.name):
            return True
        parent = parent.cpu_parent
    return False


def _cuda_cache() -> int:
    found = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return max(found, _HIP_CACHE) if torch.version.hip else found


def _cpu_cache() -> int:
    """The largest cache that Linux reports for the first core."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=_UNKNOWN_CACHE)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
