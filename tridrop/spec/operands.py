"""The tensors that an op takes, by name: one tuple per family and direction.

Operator schemas, autograd functions and backends all take these fields in this order. None stands
for an absent tensor. ``seed`` is a seed tensor, or None where nothing is dropped; ``p``, the last
field, is a 0-d tensor that takes the place of ``options.p``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ..base.memory import Facts, all_have_memory, all_whole
from .attention import AttentionInputs

Operands = Any  # one of the tuples below, or AttentionInputs
_O = TypeVar("_O", bound="tuple[Any, ...]")

# as_operands(Norm, tensors) is Norm(*tensors), for all fields, in half the time.
as_operands = tuple.__new__


class Elementwise(NamedTuple):
    """residual + drop_path(layer_scale * dropout(f(x + bias))).

    ``bias`` is a vector along x's last dimension. ``layer_scale`` is a vector along the result's
    last dimension, or a gate: one such vector per sample, [B, C]. ``residual`` has the result's
    shape.
    """

    x: Tensor
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    residual: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class ElementwiseBackward(NamedTuple):
    """The tensors from which the gradients of :class:`Elementwise` are computed."""

    grad: Tensor
    x: Tensor | None = None
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class Norm(NamedTuple):
    """The operands of dropout, add and norm; ``weight`` and ``norm_bias`` are the norm's own."""

    x: Tensor
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None
    norm_bias: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class NormBackward(NamedTuple):
    """Forward normalised ``stream``; ``statistics`` are its mean and rstd, fp32, [..., 2].

    ``x`` and ``bias`` are present where layer_scale needs a gradient.
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
    """``scores`` [..., queries, keys], of any strides, and an attention mask that broadcasts."""

    scores: Tensor
    mask: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


class SoftmaxBackward(NamedTuple):
    """``lse`` is the log-sum-exp that forward returned: fp32, [..., queries]."""

    dout: Tensor | None
    dsoftmax: Tensor | None
    scores: Tensor
    mask: Tensor | None
    lse: Tensor
    seed: Tensor | None = None
    p: Tensor | None = None


class AttentionBackward(NamedTuple):
    """``out`` and ``lse`` are forward's results; from ``query`` on, :class:`AttentionInputs`."""

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
    """The matrices of several products are stacked along the rows of ``weight``.

    ``seeds`` is [masks, 2].
    """

    x: Tensor
    weight: Tensor
    seeds: Tensor | None = None
    p: Tensor | None = None


class ProductBackward(NamedTuple):
    """The tensors from which the gradients of :class:`Product` are computed."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    seeds: Tensor | None = None
    p: Tensor | None = None


def inputs_of(operands: AttentionBackward) -> AttentionInputs:
    """The operands of the forward."""
    return AttentionInputs._make(operands[4:])


def checked(operands: _O) -> _O:
    """The operands; ValueError where a tensor has lost its memory: see ``base.memory.whole``."""
    if all_have_memory(operands):
        return operands
    names = operands._fields  # type: ignore[attr-defined]
    gain = getattr(operands, "layer_scale", None)
    if gain is not None and gain.dim() > 1:  # the public argument is called gate
        names = tuple("gate" if name == "layer_scale" else name for name in names)
    return operands._make(all_whole(operands, names))  # type: ignore[attr-defined]


class Prepared(Protocol):
    """An op that is prepared for calls which differ in their data alone."""

    def forward(self, operands: Any) -> Any:
        """The results of these operands."""

    def backward(self, operands: Any, wanted: Any) -> Any:
        """The gradients; ``wanted`` has a dtype or None, or a bool, for each of them."""

    def held_to(self, saved: tuple[Facts, ...]) -> tuple[Prepared, tuple[Facts, ...]]:
        """The same op for calls whose tensors were saved with these facts.

        Its ``backward`` raises ValueError where a tensor is no longer as it was saved. Also returns
        the facts with which it does not compare, so that the caller must.
        """


class WithOptions(NamedTuple):
    """An op of a backend that prepares nothing: two functions, and the options of a call."""

    run: Callable[..., Any]
    differentiate: Callable[..., Any]
    options: Any

    def forward(self, operands: Any) -> Any:
        """See :class:`Prepared`."""
        return self.run(checked(operands), self.options)

    def backward(self, operands: Any, wanted: Any) -> Any:
        """See :class:`Prepared`."""
        return self.differentiate(checked(operands), self.options, wanted)

    def held_to(self, saved: tuple[Facts, ...]) -> tuple[Prepared, tuple[Facts, ...]]:
        """See :class:`Prepared`."""
        return self, saved


class Functions(NamedTuple):
    """A family as two functions: of ``(operands, options)`` and ``(operands, options, wanted)``."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def partial(self, **options: Any) -> Functions:
        """Both functions with these keyword arguments."""
        return Functions(partial(self.forward, **options), partial(self.backward, **options))

    def prepare(self, options: Any) -> Prepared:
        """Both functions for calls with ``options``."""
        return WithOptions(self.forward, self.backward, options)


def keeping_options(families: Mapping[str, Functions]) -> Callable[..., Prepared]:
    """``prepare`` for a backend that prepares nothing but options: see ``backends/protocol.py``."""

    def prepare(
        family: str, shape: tuple[int, ...], options: Any, operands: Operands, wanted: Sequence[Any]
    ) -> Prepared:
        return families[family].prepare(options)

    return prepare
