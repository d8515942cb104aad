"""A pytest plugin: tests that ask for CUDA get CPU tensors, and their kernels are only compiled.

Such a test computes wrong values, and most of them fail. They are run for the kernels that they
launch before that, which Triton's cache keeps.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from . import stub

_STACK = ExitStack()


def _elsewhere(value: Any) -> Any:
    """The CPU instead of a CUDA device; any other value as it is."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


class _OnTheCpu(TorchFunctionMode):
    """Keeps tensors on the CPU that are created on, or moved to, a CUDA device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*tree_map(_elsewhere, args), **tree_map(_elsewhere, kwargs or {}))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before any test file is imported, pretend that there is a CUDA device."""
    os.environ["TRITON_INTERPRET"] = "0"
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    _STACK.enter_context(stub.launching(int(os.environ.get("GPU_PLAN_ARCH", "90"))))
    _STACK.enter_context(_OnTheCpu())


def pytest_unconfigure(config: pytest.Config) -> None:
    _STACK.close()
