"""A pytest plugin for CUDA: a worker whose context is broken ends, and another replaces it.

After an illegal access every further CUDA call of the process fails. pytest-xdist starts a new
worker for one that ended, and goes on with the tests that are left.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

BROKEN = 70  # the exit status, after sysexits.h's EX_SOFTWARE


def broken() -> bool:
    """Whether the process can no longer use its CUDA device."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """End a worker with a broken context, once the reports of its test have been sent."""
    if "PYTEST_XDIST_WORKER" in os.environ and broken():
        os._exit(BROKEN)
