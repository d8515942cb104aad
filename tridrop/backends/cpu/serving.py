"""Whether the compiled loops can serve, and the import of numba and of the loops."""

from __future__ import annotations

import importlib.util
import os
import warnings
from types import SimpleNamespace
from typing import Any

from ...base.torch_private import constant_when_compiling
from . import threads

CACHE_ENVIRONMENT = "TRIDROP_CPU_CACHE"

_has_numba = importlib.util.find_spec("numba") is not None
_loaded: Any = None  # the kernels by name
_broken: str | None = None  # why numba, though installed, could not be imported


def can_serve() -> bool:
    """Whether numba is installed and can be imported."""
    return _has_numba and _load() is not None


constant_when_compiling(can_serve)  # a compiled call may be the first one, which loads the loops


def why_not() -> str:
    """Why the loops cannot serve."""
    return _broken or "numba is not installed"


def report() -> str:
    """What ``tridrop info`` says about the loops."""
    if not can_serve():
        return why_not()
    from importlib.metadata import version

    off = os.environ.get(CACHE_ENVIRONMENT) == "0"
    return (
        f"numba {version('numba')}, cache on disk {'off' if off else 'on'}, {threads.report()}; "
        "float64, a p in a tensor, alpha and Gaussian noise, and gates are computed by the "
        "reference"
    )


def kernels() -> Any:
    """The kernels by name; ImportError where numba cannot be imported."""
    found = _load() if _has_numba else None
    if found is None:
        raise ImportError(f"the loops of the cpu backend cannot be loaded: {why_not()}")
    return found


def _load() -> Any:
    global _loaded, _broken
    if _loaded is None and _broken is None:
        try:
            from .loops import (
                activations,
                compiling,
                decorators,
                elementwise,
                mask,
                norm,
                products,
                softmax,
            )
        except ImportError as error:  # numba refuses a NumPy that is too new for it
            _broken = f"numba cannot be imported: {error}"
            warnings.warn(f"the reference backend serves CPU tensors: {_broken}", stacklevel=2)
            return None
        compiling.watch(kept=decorators.CACHE)
        loops = {
            "keep_rows": mask.keep_rows,
            "keep_scores": mask.keep_scores,
            "softmax_forward": softmax.forward,
            "softmax_backward": softmax.backward,
            "forward": elementwise.forward,
            "backward": elementwise.backward,
            "norm_forward": norm.forward,
            "norm_backward": norm.backward,
            "multiply": products.multiply,
        }
        _loaded = SimpleNamespace(functions=activations.FORMS)
        for name, loop in loops.items():
            setattr(_loaded, name, _first_call(name, loop))
    return _loaded


def _first_call(name: str, loop: Any) -> Any:
    """The first call of a loop, which compiles it and puts its machine code in its place.

    numba looks up the types of the arguments of each call, which is a sixth of the time of a loop
    over [64, 64] numbers. A loop is always given the same types, so the code for these is called
    as it is.
    """

    def first(*arguments: Any) -> Any:
        from .loops.decorators import no_collections

        with no_collections():
            found = loop(*arguments)
        (compiled,) = loop.overloads.values()
        if getattr(_loaded, name) is first:
            setattr(_loaded, name, compiled.entry_point)
        return found

    return first
