"""Sums behind dropout layers in functional models of Keras, and norms behind those, made one op.

A functional model has no text to read::

    x = keras.layers.Add()([x, keras.layers.Dropout(0.1)(h)])      # or x + Dropout(0.1)(h)
    x = keras.layers.LayerNormalization()(x)

Keras keeps its calls as nodes of a graph, and runs one after the other. A dropout layer whose value
goes into one sum, and nowhere else, is not called in its turn: when the sum's turn comes, or that
of a norm which is the first to take the sum, one op computes all of them; or each is called then,
where one op would not give the same. Other models that share the layers run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
from keras.src.backend import get_keras_mask
from keras.src.models.functional import Functional
from keras.src.ops.function import Function
from keras.src.ops.numpy import Add as AddOperation
from torch import Tensor

from .. import functional as F
from .keras_calls import GRAPH, at_once, fits, only_computes
from .present import At, is_original

AddLayer: Any = keras.layers.Add
Norm: Any = keras.layers.LayerNormalization
_RUN = "_run_through_graph"
# What must be as it was for a sum or a norm to be computed here.
PLACES = (
    At(AddLayer, "call"), At(AddLayer, "_merge_function"), At(AddOperation, "call"),
    At(Norm, "call"),
)  # fmt: skip


def runs_a_graph(base: Any) -> bool:
    """Whether models of a class run their graph as Keras' functional ones do."""
    return (
        issubclass(base, Functional)
        and base.call is Functional.call
        and getattr(base, _RUN) is getattr(Function, _RUN)
        and is_original(Function, _RUN)
    )


def place_of(base: type) -> At:
    return At(base, _RUN)


# ----------------------------------------------------------------------------------- what is read


class Read(NamedTuple):
    """A dropout layer, the sum it goes into, and the norm that takes the sum, if one does.

    ``users`` are the other operations that take the sum, which then waits for the norm.
    """

    layer: Any
    sum: Any
    norm: Any
    users: tuple[Any, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return ("add",) if self.norm is None else ("add", "norm")


def sums(model: Any) -> Iterator[Read]:
    """What a graph calls once, for one side of a sum, and that sum."""
    if not all(is_original(place.owner, place.name) for place in PLACES):
        return
    depths = sorted(model._nodes_by_depth.items(), reverse=True)  # in the order in which they run
    nodes = [(depth, node) for depth, each in depths for node in each if not node.is_input]
    calls: dict[int, int] = {}
    users: dict[int, list[Any]] = {id(tensor): [None] for tensor in model._outputs}
    for depth, node in nodes:
        calls[id(node.operation)] = calls.get(id(node.operation), 0) + 1
        for tensor in node.input_tensors:
            users.setdefault(id(tensor), []).append((depth, node))
    for _, node in nodes:
        behind = users.get(id(node.outputs[0]), [None])
        if calls[id(node.operation)] != 1 or len(behind) != 1 or behind[0] is None:
            continue
        added = behind[0][1]
        if _is_sum(added):
            norm, others = None, ()
            if calls[id(added.operation)] == 1:
                norm, others = _norm_of(users.get(id(added.outputs[0]), [None]), calls)
            yield Read(node.operation, added.operation, norm, others)


def _is_sum(node: Any) -> bool:
    """Whether a call is the sum of two tensors of the graph."""
    return (
        type(node.operation) in (AddLayer, AddOperation)
        and len(node.input_tensors) == 2
        and not node.arguments.kwargs
    )


def _norm_of(users: list[Any], calls: dict[int, int]) -> tuple[Any, tuple[Any, ...]]:
    """The norm among the users of a sum, where it runs before all others, and these."""
    if None in users:  # the sum is a result of the model
        return None, ()
    (first, norm), *others = sorted(users, key=lambda user: -user[0])
    alone = all(depth < first for depth, _ in others)
    layer = norm.operation
    known = type(layer) is Norm and _is_over_rows(layer, len(norm.outputs[0].shape))
    if known and calls[id(layer)] == 1 and alone:
        return layer, tuple(node.operation for _, node in others)
    return None, ()


def _is_over_rows(layer: Any, rank: int) -> bool:
    """Whether a norm is one of the last dimension, by mean and variance."""
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return [axis % rank for axis in axes] == [rank - 1] and not layer.rms_scaling


class Taken:
    """The numbers of what a model's graph does not call in its turn."""

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.sums: dict[int, bool] = {}  # and whether it waits for a norm
        self.norms: set[int] = set()
        self.users: set[int] = set()

    def add(self, read: Read) -> None:
        self.layers.add(id(read.layer))
        self.sums[id(read.sum)] = read.norm is not None
        if read.norm is not None:
            self.norms.add(id(read.norm))
            self.users.update(map(id, read.users))


# ------------------------------------------------------------------------------------ what is run


class _Waiting:
    """A value that is yet to be computed; to Keras' trees it is a leaf."""

    def value(self) -> Any:
        raise NotImplementedError


class _Dropped(_Waiting):
    """A call of a dropout layer."""

    def __init__(self, layer: Any, x: Any, options: dict[str, Any]) -> None:
        self.layer, self.x, self.options = layer, x, options

    def value(self) -> Any:
        return self.layer(self.x, **self.options)


class _Sum(_Waiting):
    """A dropout and a sum that are one op, which waits for a norm."""

    stream: Tensor | None = None

    def __init__(self, layer: Any, x: Tensor, residual: Tensor) -> None:
        self.layer, self.x, self.residual = layer, x, residual

    def value(self) -> Any:
        if self.stream is None:
            self.stream = at_once(self.layer, self.x, self.residual)
        return self.stream


def _value(x: Any) -> Any:
    return x.value() if isinstance(x, _Waiting) else x


class _Later:
    """A dropout layer to Keras while it collects the arguments of a call."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._call_context_args = layer._call_context_args  # so that it passes training on

    def __call__(self, x: Any, **options: Any) -> _Dropped:
        return _Dropped(self.layer, _value(x), options)


def run_through_graph(
    self: Any,
    inputs: Any,
    operation_fn: Callable[[Any], Any] = lambda op: op,
    call_fn: Any = None,
) -> Any:
    """What runs the graph of a swapped functional model."""
    taken: Taken = self.__dict__[GRAPH]
    symbolic = any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten(inputs))

    def chosen(operation: Any) -> Any:
        number = id(operation)
        if number in taken.layers:
            return operation_fn(_Later(operation))
        call = operation_fn(operation)
        if number in taken.sums:
            waits = taken.sums[number]
            return lambda *sides: _add(operation, call, sides, waits)
        if number in taken.norms:
            return lambda *args, **options: _normed(operation, call, *args, **options)
        if number in taken.users:
            values = keras.tree.map_structure
            return lambda *args, **options: call(*values(_value, args), **values(_value, options))
        return call

    here = call_fn is None and not symbolic  # else nothing is computed
    return Function._run_through_graph(self, inputs, chosen if here else operation_fn, call_fn)


def _add(operation: Any, call: Any, sides: tuple[Any, ...], waits: bool) -> Any:
    """``call(*sides)``, with a dropout that waits in it; as one op where it may."""
    listed = isinstance(operation, AddLayer)
    pair = [_value(x) if isinstance(x, _Sum) else x for x in (sides[0] if listed else sides)]
    dropped = next((x for x in pair if isinstance(x, _Dropped)), None)
    residual = _value(pair[pair[0] is dropped])
    if dropped is not None and dropped.options == {"training": True}:
        layer, x = dropped.layer, dropped.x
        if fits(layer, x, residual) and _plain(operation, x) and not _masked(x, residual):
            return _Sum(layer, x, residual) if waits else at_once(layer, x, residual)
    pair = [_value(x) for x in pair]
    return call(pair) if listed else call(*pair)


def _normed(layer: Any, call: Any, x: Any, **options: Any) -> Any:
    """``call(x)`` of a norm, with a sum that waits in it; as one op where it may."""
    waits = isinstance(x, _Sum) and x.stream is None and not options
    if waits and _plain(layer, x.x) and _is_over_rows(layer, x.x.dim()):
        out, x.stream = _at_once(x.layer, x, layer)
        return out
    return call(_value(x), **options)


def _at_once(layer: Any, x: _Sum, norm: Any) -> Any:
    """A dropout layer's call, the sum and the norm; ``layer`` is first, as in ``at_once``."""
    weight, bias = (None if v is None else v.value for v in (norm.gamma, norm.beta))
    return F.dropout_add_layer_norm(
        x.x, x.residual, weight, bias, layer.rate, eps=norm.epsilon, prenorm=True,
        seed=layer.next_seed(x.x),
    )  # fmt: skip


def _plain(operation: Any, x: Tensor) -> bool:
    """Whether a sum's or a norm's call is what it computes and no more, in x's dtype."""
    if isinstance(operation, AddOperation):
        return "call" not in operation.__dict__
    dtype = keras.backend.standardize_dtype(x.dtype)
    return only_computes(operation) and bool(dtype == operation.compute_dtype)


def _masked(*tensors: Any) -> bool:
    return any(get_keras_mask(t) is not None for t in tensors)
