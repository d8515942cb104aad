"""What launch settings know of a GPU: its kind, and its shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from . import launch


class Gpu(NamedTuple):
    """The figures that settings follow."""

    generation: int
    """90 for Hopper, 100 for data centre Blackwell, 80 for NVIDIA's others, 0 for AMD's"""
    shared: int
    """bytes of shared memory that a program may have"""


# The interpreter has no limits: it runs what the smallest GPU would.
INTERPRETER = Gpu(80, 99 << 10)


def of(device: torch.device) -> Gpu:
    """The GPU that the tensors of ``device`` are on, which need not be the current one."""
    if launch.interpreting():
        return INTERPRETER
    # Only a GPU that is there stays what it is: tensors without data stand for any.
    return _there(device) if device.type == "cuda" else _current()


@lru_cache
def _there(device: torch.device) -> Gpu:
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
