"""Where the demo computes: the device and the backend that were asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

import tridrop
from tridrop import backends

from .options import DemoError


def device_of(name: str) -> torch.device:
    """The device ``name``, with "auto" resolved; DemoError where nothing can be computed on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--device {name} cannot be used: {reason}") from error


def backend_of(name: str) -> AbstractContextManager[None]:
    """The backend ``name`` for a block; "auto" leaves the choice to tridrop."""
    return nullcontext() if name == "auto" else tridrop.backend(name)


def check_backend(device: torch.device) -> str:
    """The name of the backend that serves ``device``; DemoError where it cannot."""
    try:
        name = backends.name_for(device)
        backends.serving(name, torch.empty(1, device=device))
    except (ImportError, RuntimeError, ValueError) as error:
        raise DemoError(str(error)) from error
    return name
