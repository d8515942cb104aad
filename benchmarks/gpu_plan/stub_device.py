"""A pytest plugin: tests that ask for CUDA get CPU tensors, and their kernels are compiled only.

What such a test computes is wrong, and most fail for it. They are run for the kernels that they
launch until then, which Triton's cache keeps.
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
    """A CPU in the place of a CUDA device."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


class _OnTheCpu(TorchFunctionMode):
    """Tensors that are made on, or moved to, a CUDA device stay on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*tree_map(_elsewhere, args), **tree_map(_elsewhere, kwargs or {}))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before any test file is imported: there is a CUDA device, for all that it is asked for."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRIDROP_BACKEND"] = "triton"
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    _STACK.enter_context(stub.launching(int(os.environ.get("GPU_PLAN_ARCH", "90"))))
    _STACK.enter_context(_OnTheCpu())


def pytest_unconfigure(config: pytest.Config) -> None:
    _STACK.close()
