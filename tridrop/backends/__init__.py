"""Which backend serves a call: explicit > environment > CUDA tensor with triton > reference.

A backend is a module with the functions of :class:`Backend`. Backends do not import each other, and
nothing outside ``backends/triton`` imports triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..memory import all_whole
from ..spec import NormOptions, Options
from ..spec_attention import AttentionInputs, AttentionOptions
from ..spec_product import ProductOptions

NAMES = ("triton", "reference")
ENVIRONMENT = "TRIDROP_BACKEND"


class Backend(Protocol):
    """The functions of a backend module.

    ``x`` is the input, ``bias`` a vector of its last dimension's size, ``layer_scale`` one of the
    output's, ``residual`` of the output's shape; each but x may be None. ``seed`` is a seed tensor,
    or None where nothing is dropped. ``p`` is a 0-d tensor that takes the place of ``options.p``.
    """

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: Options,
    ) -> Tensor:
        """residual + drop_path(layer_scale * dropout(f(x + bias))), of any strides."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: Options,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, bias and layer_scale in these dtypes; None for those not wanted."""

    def norm_forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, stream, statistics): the formulas of ``backends/reference/norm.py``.

        statistics are mean and rstd of every row, fp32, [..., 2]. stream is None where it is x, or
        not kept.
        """

    def norm_backward(
        self,
        dout: Tensor,
        dstream: Tensor | None,
        stream: Tensor,
        statistics: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: NormOptions,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias, layer_scale, residual, weight, norm_bias; None where not wanted.

        ``x`` is given where layer_scale needs a gradient. ``stream`` is what forward returned, or x
        where the dropout came after the norm; then the residual's gradient is None.
        """

    def attention_forward(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """(out, lse): the formulas of ``backends/reference/attention.py``.

        out is as spec_attention.empty_output makes it; lse [B, H, Sq], fp32 (fp64 for fp64).
        """

    def attention_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        inputs: AttentionInputs,
        options: AttentionOptions,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, mask and sinks, like their tensors, or None."""

    def softmax_forward(
        self,
        scores: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: AttentionOptions,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, softmax, lse): the formulas of ``backends/reference/softmax.py``.

        scores are [..., queries, keys] of any strides, and mask broadcasts to them; softmax is None
        where it is not returned; lse is fp32, [..., queries], 0 where backward does without.
        """

    def softmax_backward(
        self,
        dout: Tensor | None,
        dsoftmax: Tensor | None,
        scores: Tensor,
        mask: Tensor | None,
        lse: Tensor,
        seed: Tensor | None,
        p: Tensor | None,
        options: AttentionOptions,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of scores and mask in these dtypes; None for those not wanted."""

    def product_forward(
        self,
        x: Tensor,
        weight: Tensor,
        seeds: Tensor | None,
        p: Tensor | None,
        options: ProductOptions,
    ) -> Tensor:
        """gain * drop_i(x) @ weight_i^T, side by side, in the weight's dtype.

        The weight_i, of ``options.ranks`` rows, lie one below the other in ``weight``; ``seeds`` is
        [masks, 2].
        """

    def product_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        seeds: Tensor | None,
        p: Tensor | None,
        options: ProductOptions,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and weight in their dtypes; None for those not wanted."""

    def keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: Options, domain: str
    ) -> Tensor:
        """The mask of ``domain``: bool, True where kept."""

    def decision_bits(self, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The 32 bits that the mask of elements compares with T: int64, in [0, 2^32)."""

    def attention_keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: AttentionOptions
    ) -> Tensor:
        """The mask of attention from ``options.origin`` on: bool, [B, H, Sq, Sk]."""

    def why_not(self, device: torch.device, dtypes: list[torch.dtype]) -> str | None:
        """Why the backend cannot serve tensors of this device and dtypes; None where it can."""

    def prepare(self, shape: tuple[int, ...], options: Options, *tensors: Tensor | None) -> Any:
        """An elementwise op or a norm, prepared for calls like this one; None for no more than its
        options: see :func:`prepare`."""


class Prepared(Protocol):
    """One op, for calls that differ in data and in nothing else.

    Its functions are those of :class:`Backend` without ``p`` and the options.
    """

    def forward(self, *arguments: Any) -> Any:
        """The op."""

    def backward(self, *arguments: Any) -> Any:
        """Its gradients."""


class _Held(NamedTuple):
    """A backend that can prepare nothing but its options: of an elementwise op."""

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
    """Run the calls inside the block on the backend ``name``: "triton" or "reference".

    It goes before ``TRIDROP_BACKEND`` in the environment and before the default, which is Triton
    for CUDA tensors where triton is installed, and the reference otherwise. A choice that cannot be
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
    if name is None:
        name = "triton" if device.type == "cuda" and _has_triton else "reference"
    return name


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
    found: Prepared | None = None
    if family in ("elementwise", "norm"):
        found = module.prepare(shape, options, *tensors)
    return _HELD[family](module, options) if found is None else found


def report() -> list[dict[str, Any]]:
    """What ``tridrop info`` says of each backend: its name, whether it is available, and why."""
    rows: list[dict[str, Any]] = [
        {"name": "reference", "available": True, "why": "plain torch, on any device"}
    ]
    if not _has_triton:
        why = "triton is not installed"
        return [*rows, {"name": "triton", "available": False, "why": why}]
    module = cast(Any, load("triton"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = module.why_not(device, [torch.float32])
    why = reason or f"{module.target()}, on {device.type} tensors"
    return [*rows, {"name": "triton", "available": reason is None, "why": why}]
