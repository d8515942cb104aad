"""Which backend serves a call: explicit > ``TRIDROP_BACKEND`` > the device of its tensors.

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
ENVIRONMENT = "TRIDROP_BACKEND"


class _Thread(threading.local):
    name: str | None = None  # the backend that in_this_thread names


class _State:
    # Process-wide, as torch's own backend flags are, because backward runs in other threads.
    explicit: str | None = None


_state, _thread = _State(), _Thread()
_has_triton = importlib.util.find_spec("triton") is not None


def backend(name: str) -> AbstractContextManager[None]:
    """Run the calls inside the block on the backend ``name``: "triton", "cpu" or "reference".

    It overrides ``TRIDROP_BACKEND`` in the environment and the default, which is Triton for CUDA
    tensors where triton is installed, the cpu backend (compiled loops) for CPU tensors where numba
    is installed, and otherwise the reference, plain torch. Where the named backend cannot serve, an
    op raises when it is called. The backward of a call runs on the backend of its forward.

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
    before = _state.explicit
    _state.explicit = name
    try:
        yield
    finally:
        _state.explicit = before


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} names the backend {name!r}; known: {', '.join(NAMES)}")


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
    """The name of the backend that serves tensors on ``device``."""
    name = explicit()
    if name is None:
        name = os.environ.get(ENVIRONMENT) or None
        if name is not None:
            _check_name(name, ENVIRONMENT)
    if name is not None:
        return name
    if device.type == "cuda" and _has_triton:
        return "triton"
    return "cpu" if device.type == "cpu" and loops.serves() else "reference"


def explicit() -> str | None:
    """The backend that :func:`backend` or :func:`in_this_thread` names here; None where neither."""
    return _thread.name or _state.explicit


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
