"""Which backend serves a call: explicit > ``TRIDROP_BACKEND`` > the device of its tensors.

The environment is read once, when tridrop is imported: ``TRIDROP_BACKEND``, and the older
``TRIDROP_CPU``, which names the backend of CPU tensors where nothing else names one: "numba" is the
cpu backend, "torch" the reference. In a running process :func:`backend` names one.

Triton serves CUDA tensors where it is installed, the cpu backend serves CPU tensors where numba is
installed, and the reference serves all others. A backend is a module with the functions of
:class:`Backend`. Only the cpu backend imports another one, the reference, to which it hands the
calls that its loops do not take. Only ``backends/triton`` imports triton, and only ``backends/cpu``
imports numba.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ..spec.operands import Operands, Prepared
from .cpu import serving as loops
from .protocol import Backend

NAMES = ("triton", "cpu", "reference")
ENVIRONMENT, CPU_ENVIRONMENT = "TRIDROP_BACKEND", "TRIDROP_CPU"
_OF_CPU_TENSORS = {"numba": "cpu", "torch": "reference"}  # the values of TRIDROP_CPU


class _Thread(threading.local):
    name: str | None = None  # the backend that in_this_thread names


class _State:
    # Process-wide, as torch's own backend flags are, because backward runs in other threads. What
    # the environment names is not checked here but by the first call, so that `tridrop info` can
    # report a wrong name.
    named: str | None = os.environ.get(ENVIRONMENT) or None
    of_cpu_tensors: str | None = os.environ.get(CPU_ENVIRONMENT) or None


_state, _thread = _State(), _Thread()
_has_triton = importlib.util.find_spec("triton") is not None


def backend(name: str) -> AbstractContextManager[None]:
    """Run the calls inside the block on the backend ``name``: "triton", "cpu" or "reference".

    It overrides ``TRIDROP_BACKEND``, which is read from the environment once, when tridrop is
    imported, and the default, which is Triton for CUDA tensors where triton is installed, the cpu
    backend (compiled loops) for CPU tensors where numba is installed, and otherwise the reference,
    plain torch. Where the named backend cannot serve, an op raises when it is called. The backward
    of a call runs on the backend of its forward.

    The setting is process-wide: do not enter it in several threads at once.

    Raises:
        ValueError: another name; raised at once, not at the first call.

    >>> import tridrop
    >>> with tridrop.backend("reference"):
    ...     tridrop.dropout(torch.ones(4), 0.5, seed=1)
    tensor([2., 0., 2., 0.])
    """
    _check_name(name, "tridrop.backend(...)")
    return _entered(name)


@contextmanager
def _entered(name: str) -> Iterator[None]:
    before = _state.named
    _state.named = name
    try:
        yield
    finally:
        _state.named = before


def _check_name(name: str, source: str, more: str = "") -> None:
    if name not in NAMES:
        raise ValueError(f"{source} names the backend {name!r}; known: {', '.join(NAMES)}{more}")


def _read_when(variable: str) -> str:
    return (
        f". {variable} is read once, when tridrop is imported: set it before, or use "
        "tridrop.backend(...)"
    )


@contextmanager
def in_this_thread(name: str) -> Iterator[None]:
    """Run the block's calls on the backend ``name``, in this thread alone.

    A backward, which runs in a thread of torch, uses it to compute as its forward did.
    """
    before, _thread.name = _thread.name, name
    try:
        yield
    finally:
        _thread.name = before


def name_for(device: torch.device) -> str:
    """The name of the backend that serves tensors on ``device``.

    Raises:
        ValueError: the environment named a backend that is not known when tridrop was imported.
        ImportError: ``TRIDROP_CPU`` was "numba", which cannot be imported.
    """
    name = named()
    if name is not None:
        _check_name(name, ENVIRONMENT, _read_when(ENVIRONMENT))  # others are checked when named
        return name
    if device.type == "cuda" and _has_triton:
        return "triton"
    return _for_cpu_tensors() if device.type == "cpu" else "reference"


def _for_cpu_tensors() -> str:
    asked = _state.of_cpu_tensors
    if asked is None:
        return "cpu" if loops.can_serve() else "reference"
    if asked not in _OF_CPU_TENSORS:
        raise ValueError(
            f"{CPU_ENVIRONMENT} is {asked!r}; known: {', '.join(_OF_CPU_TENSORS)}"
            f"{_read_when(CPU_ENVIRONMENT)}"
        )
    if asked == "numba" and not loops.can_serve():
        raise ImportError(
            f"{CPU_ENVIRONMENT}=numba, but {loops.why_not()}: pip install numba, or set "
            f"{CPU_ENVIRONMENT}=torch{_read_when(CPU_ENVIRONMENT)}"
        )
    return _OF_CPU_TENSORS[asked]


def named() -> str | None:
    """The backend that is named for calls of this thread; None where the device decides.

    It was named by :func:`in_this_thread`, :func:`backend` or ``TRIDROP_BACKEND``.
    """
    return _thread.name or _state.named


def load(name: str) -> Backend:
    """The backend module ``name``; ImportError with the remedy where it cannot be imported."""
    _check_name(name, "the backend argument")
    if name == "triton" and not _has_triton:
        raise ImportError(
            "the Triton backend was asked for but triton is not installed: pip install triton, "
            "or use tridrop.backend('reference')"
        )
    if name == "cpu" and not loops.can_serve():
        raise ImportError(
            f"the cpu backend was asked for but {loops.why_not()}: pip install numba, or "
            "use tridrop.backend('reference')"
        )
    return _module(name)


@cache
def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def serving(name: str, *tensors: Tensor | None) -> Backend:
    """The backend ``name`` if it can serve these tensors; RuntimeError with the reason if not."""
    module = load(name)
    given = [t for t in tensors if t is not None]
    reason = module.why_not(given[0].device, [t.dtype for t in given])
    if reason is not None:
        raise RuntimeError(reason)
    return module


def prepare(
    name: str,
    family: str,
    shape: tuple[int, ...],
    options: Any,
    operands: Operands,
    wanted: Sequence[Any] = (),
) -> Prepared:
    """The op that backend ``name`` prepares for such calls: see :meth:`Backend.prepare`.

    Raises as :func:`serving` does.
    """
    *tensors, _ = operands  # the last operand is p, whose dtype does not matter
    module = serving(name, *(t for t in tensors if t is not None and t.is_floating_point()))
    return module.prepare(family, shape, options, operands, wanted)


def report() -> list[dict[str, Any]]:
    """What ``tridrop info`` says about each backend: its name, whether it is available, and why."""
    rows: list[dict[str, Any]] = [
        {"name": "reference", "available": True, "why": "plain torch, on any device"},
        {"name": "cpu", "available": loops.can_serve(), "why": loops.report()},
    ]
    if not _has_triton:
        why = "triton is not installed"
        return [*rows, {"name": "triton", "available": False, "why": why}]
    module = cast(Any, load("triton"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = module.why_not(device, [torch.float32])
    why = reason or f"{module.target()}, on {device.type} tensors"
    return [*rows, {"name": "triton", "available": reason is None, "why": why}]
