"""Which backend serves a call: explicit > ``TRIDROP_BACKEND`` > the device of its tensors.

Triton serves CUDA tensors where it is installed, the cpu backend CPU tensors where numba is, and
the reference what is left. A backend is a module with the functions of :class:`Backend`. None
imports another but the cpu backend the reference, to which it hands what its loops do not take; and
nothing outside ``backends/triton`` imports triton, nothing outside ``backends/cpu`` numba.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..base.memory import all_whole
from ..spec.attention import AttentionInputs
from .cpu import serving as loops
from .protocol import Backend, Prepared

NAMES = ("triton", "cpu", "reference")
ENVIRONMENT = "TRIDROP_BACKEND"


class _Held(NamedTuple):
    """An elementwise op of a backend that prepares nothing: the call's options are kept."""

    module: Any
    options: Any

    def forward(self, *arguments: Any) -> Any:
        arguments = all_whole(arguments, ("x", "bias", "layer_scale", "residual", "seed"))
        return self.module.forward(*arguments, None, self.options)

    def backward(self, *arguments: Any) -> Any:
        names = ("grad", "x", "bias", "layer_scale", "seed", "dtypes")
        *tensors, dtypes = all_whole(arguments, names)
        return self.module.backward(*tensors, None, self.options, dtypes)


_NORM = ("x", "bias", "layer_scale", "residual", "weight", "norm_bias", "seed")
_OF_NORM = (
    "dout", "dstream", "stream", "statistics", "x", "bias", "layer_scale", "weight", "seed",
    "dtypes",
)  # fmt: skip


class _HeldNorm(_Held):
    def forward(self, *arguments: Any) -> Any:
        return self.module.norm_forward(*all_whole(arguments, _NORM), None, self.options)

    def backward(self, *arguments: Any) -> Any:
        *tensors, dtypes = all_whole(arguments, _OF_NORM)
        return self.module.norm_backward(*tensors, None, self.options, dtypes)


class _HeldSoftmax(_Held):
    """Its backends look at the memory themselves: what loops look at need not be asked twice."""

    def forward(self, *arguments: Any) -> Any:
        return self.module.softmax_forward(*arguments[:-1], None, self.options, arguments[-1])

    def backward(self, *arguments: Any) -> Any:
        return self.module.softmax_backward(*arguments[:-1], None, self.options, arguments[-1])


_ATTENTION = AttentionInputs._fields[:-1]


class _HeldAttention(_Held):
    """Its inputs one by one, up to the seed."""

    def forward(self, *arguments: Any) -> Any:
        inputs = AttentionInputs._make((*all_whole(arguments, _ATTENTION), None))
        return self.module.attention_forward(inputs, self.options)

    def backward(self, *arguments: Any) -> Any:
        names = ("dout", "dlse", "out", "lse", *_ATTENTION, "needs")
        dout, dlse, out, lse, *inputs, needs = all_whole(arguments, names)
        given = AttentionInputs._make((*inputs, None))
        return self.module.attention_backward(dout, dlse, out, lse, given, self.options, needs)


_HELD = {
    "elementwise": _Held,
    "norm": _HeldNorm,
    "softmax": _HeldSoftmax,
    "attention": _HeldAttention,
}


class _State:
    # Process-wide, as torch's own backend flags are: backward runs in threads of its own.
    explicit: str | None = None


_state = _State()
_has_triton = importlib.util.find_spec("triton") is not None


def backend(name: str) -> AbstractContextManager[None]:
    """Run the calls inside the block on the backend ``name``: "triton", "cpu" or "reference".

    It goes before ``TRIDROP_BACKEND`` in the environment and before the default, which is Triton
    for CUDA tensors where triton is installed, the cpu backend (compiled loops) for CPU tensors
    where numba is, and the reference, plain torch, otherwise. A choice that cannot be
    met raises when an op is called. The backward of a call runs on the backend of its forward.

    The setting is process-wide: do not enter it in several threads at once.

    Raises:
        ValueError: another name, at once.

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


def choose(device: torch.device) -> str:
    """The name of the backend for tensors on ``device``."""
    name = _state.explicit
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
    """The backend of the :func:`backend` block that is being run."""
    return _state.explicit


def load(name: str) -> Backend:
    """The backend module ``name``; ImportError, saying what to do, where it cannot be imported."""
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
    """The backend ``name`` if it can serve these tensors; RuntimeError, saying why, if not."""
    module = load(name)
    given = [t for t in tensors if t is not None]
    reason = module.why_not(given[0].device, [t.dtype for t in given])
    if reason is not None:
        raise RuntimeError(reason)
    return module


def prepare(
    name: str, family: str, shape: tuple[int, ...], options: Any, *tensors: Tensor | None
) -> Prepared:
    """The backend ``name``, prepared for calls with results of ``shape`` and tensors like these.

    ``family`` is "elementwise", "norm", "softmax" or "attention". Raises as :func:`serving` does.
    """
    module = serving(name, *(t for t in tensors if t is None or t.is_floating_point()))
    prepares = module.PREPARES.get(family)
    found: Prepared | None = None if prepares is None else prepares(shape, options, *tensors)
    return _HELD[family](module, options) if found is None else found


def report() -> list[dict[str, Any]]:
    """What ``tridrop info`` says of each backend: its name, whether it is available, and why."""
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
