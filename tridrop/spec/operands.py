"""The tensors that an op is given, by name: one tuple per family and direction.

Schemas of operators, autograd functions and backends all have these fields in this order. What is
None is absent. ``seed`` is a seed tensor, None where nothing is dropped; ``p``, the last field, is
a 0-d tensor that takes the place of ``options.p``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ..base.memory import all_whole
from .attention import AttentionInputs

Operands = Any  # one of the tuples below, or AttentionInputs
_O = TypeVar("_O", bound="tuple[Any, ...]")


class Elementwise(NamedTuple):
    """residual + drop_path(layer_scale * dropout(f(x + bias))).

    ``bias`` is a vector of the size of x's last dimension, ``layer_scale`` one of the result's, or
    one per sample, [B, C]: a gate; ``residual`` has the result's shape.
    """

    x: Tensor
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    residual: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class ElementwiseBackward(NamedTuple):
    """What the gradients of :class:`Elementwise` are functions of."""

    grad: Tensor
    x: Tensor | None = None
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class Norm(NamedTuple):
    """The same for dropout, add and norm; ``weight`` and ``norm_bias`` are the norm's vectors."""

    x: Tensor
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None
    norm_bias: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class NormBackward(NamedTuple):
    """``stream`` is what forward normalised; ``statistics`` its mean and rstd, fp32, [..., 2].

    ``x`` and ``bias`` are given where layer_scale needs a gradient.
    """

    dout: Tensor
    dstream: Tensor | None
    stream: Tensor
    statistics: Tensor
    x: Tensor | None = None
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    weight: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class Softmax(NamedTuple):
    """``scores`` [..., queries, keys] of any strides, and a ``mask`` that broadcasts to them."""

    scores: Tensor
    mask: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class SoftmaxBackward(NamedTuple):
    """``lse`` is what forward returned: fp32, [..., queries]."""

    dout: Tensor | None
    dsoftmax: Tensor | None
    scores: Tensor
    mask: Tensor | None
    lse: Tensor
    seed: Tensor | None = None
    p: Tensor | None = None


class AttentionBackward(NamedTuple):
    """``out`` and ``lse`` are what forward returned; then as :class:`AttentionInputs`."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    sinks: Tensor | None = None
    cu_query: Tensor | None = None
    cu_key: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class Product(NamedTuple):
    """The matrices of several products lie one below the other in ``weight``.

    ``seeds`` is [masks, 2].
    """

    x: Tensor
    weight: Tensor
    seeds: Tensor | None = None
    p: Tensor | None = None


class ProductBackward(NamedTuple):
    """What the gradients of :class:`Product` are functions of."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    seeds: Tensor | None = None
    p: Tensor | None = None


def inputs_of(operands: AttentionBackward) -> AttentionInputs:
    """The tensors that forward was given."""
    return AttentionInputs._make(operands[4:])


def checked(operands: _O) -> _O:
    """The operands, whose tensors have their memory: see :func:`tridrop.base.memory.whole`."""
    names = operands._fields  # type: ignore[attr-defined]
    gain = getattr(operands, "layer_scale", None)
    if gain is not None and gain.dim() > 1:  # as its argument is called
        names = tuple("gate" if name == "layer_scale" else name for name in names)
    found = all_whole(operands, names)
    return operands if found is operands else operands._make(found)  # type: ignore[attr-defined]


class Prepared(Protocol):
    """An op that is ready for calls which differ in data and in nothing else."""

    def forward(self, operands: Any) -> Any:
        """The results of these operands."""

    def backward(self, operands: Any, wanted: Any) -> Any:
        """The gradients; ``wanted`` tells which: their dtypes or None, or for each a bool."""


class WithOptions(NamedTuple):
    """Two functions and the options of a call: an op of a backend that prepares nothing more."""

    run: Callable[..., Any]
    differentiate: Callable[..., Any]
    options: Any

    def forward(self, operands: Any) -> Any:
        """As :class:`Prepared` says."""
        return self.run(checked(operands), self.options)

    def backward(self, operands: Any, wanted: Any) -> Any:
        """As :class:`Prepared` says."""
        return self.differentiate(checked(operands), self.options, wanted)


class Functions(NamedTuple):
    """A family as functions ``(operands, options)`` and ``(operands, options, wanted)``."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def partial(self, **options: Any) -> Functions:
        """Both with these keyword arguments."""
        return Functions(partial(self.forward, **options), partial(self.backward, **options))

    def prepare(self, options: Any) -> Prepared:
        """The two, for calls with ``options``."""
        return WithOptions(self.forward, self.backward, options)


def keeping_options(families: Mapping[str, Functions]) -> Callable[..., Prepared]:
    """``prepare`` of a backend that prepares nothing more: see ``backends/protocol.py``."""

    def prepare(
        family: str, shape: tuple[int, ...], options: Any, operands: Operands, wanted: Sequence[Any]
    ) -> Prepared:
        return families[family].prepare(options)

    return prepare
