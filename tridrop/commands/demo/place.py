"""The device and the backend of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

import tridrop
from tridrop import backends

from .options import DemoError


def device_of(name: str) -> torch.device:
    """The device ``name``, with "auto" resolved; raises DemoError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--device {name} cannot be used: {reason}") from error


def backend_of(name: str) -> AbstractContextManager[None]:
    """A context with the backend ``name``; "auto" leaves the choice to tridrop."""
    return nullcontext() if name == "auto" else tridrop.backend(name)


def check_backend(device: torch.device) -> str:
    """The name of the backend for ``device``; raises DemoError if there is none."""
    try:
        name = backends.name_for(device)
        backends.serving(name, torch.empty(1, device=device))
    except (ImportError, RuntimeError, ValueError) as error:
        raise DemoError(str(error)) from error
    return name


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch has one thread inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
