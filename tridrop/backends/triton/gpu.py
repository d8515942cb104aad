"""The two properties of a GPU that launch settings depend on: generation and shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from . import launch


class Gpu(NamedTuple):
    """The properties that launch settings depend on."""

    generation: int
    """90 for Hopper, 100 for data centre Blackwell, 80 for other NVIDIA GPUs, 0 for AMD's"""
    shared: int
    """bytes of shared memory that a program may use"""


# The interpreter has no limits, so it gets the settings of the smallest GPU.
INTERPRETER = Gpu(80, 99 << 10)


def of(device: torch.device) -> Gpu:
    """The GPU of ``device``, which need not be the current one."""
    if launch.interpreting():
        return INTERPRETER
    # Only a real GPU is cached: for tensors without data, the driver may be replaced at any time.
    return _present(device) if device.type == "cuda" else _current()


@lru_cache
def _present(device: torch.device) -> Gpu:
    with launch.on(device):
        return _current()


def _current() -> Gpu:
    """The current device of Triton's driver."""
    active = driver.active
    target = active.get_current_target()
    generation = 0
    if target.backend == "cuda":
        generation = {9: 90, 10: 100, 11: 100}.get(int(target.arch) // 10, 80)
    properties = active.utils.get_device_properties(active.get_current_device())
    return Gpu(generation, int(properties["max_shared_mem"]))
