"""Counts what a training forward costs before and after a swap: launches, operators and memory.

Counts and bytes, unlike times, are the same on every run and need no quiet machine. The model is
left as it was, whatever happens.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..base.modules import all_modules, is_keras
from ..base.torch_private import OpOverload, TorchDispatchMode, is_traced, schema_of, tree_leaves
from .generators import Generators

# Operators of torch that draw random numbers for a dropout; the randint of a seed is not among
# them.
_DRAWS = {"bernoulli", "bernoulli_", "rand", "rand_like", "uniform_", "native_dropout",
          "_fused_dropout"}  # fmt: skip
_RATES = ("dropout_p", "dropout")  # the names of rates in torch's operators
# These compute nothing, although torch does not count them as views.
_FREE = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
         "new_empty_strided"}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one training forward took.

    Attributes:
        dropouts: launches that draw a mask, or random numbers for one: eager dropout, attention
            with a dropout inside, and tridrop's ops with a rate above 0. (Drawing a seed of 16
            bytes counts as an operator, not as a dropout.)
        operators: calls of operators on tensors, as torch dispatches them. Views and allocations,
            which compute nothing, are not counted.
        saved_bytes: the bytes that are kept for backward. Each storage counts once; parameters and
            buffers do not count.
        layers: the length of the model's longest list of layers of one class; 0 if there is none.
        layer_bytes: the part of saved_bytes that one of these layers keeps, on average: the
            storages that are first saved while a layer runs.
    """

    dropouts: int
    operators: int
    saved_bytes: int
    layers: int = 0
    layer_bytes: int = 0


@dataclass(frozen=True)
class Measurement:
    """The costs of one training forward of a model, on the same inputs, before and after the swap.

    The figures depend on the device and the shapes of the inputs: on a CPU, torch takes several
    operators for a dropout that is one operator on a GPU.
    """

    before: Cost
    after: Cost

    def ratios(self) -> dict[str, float | None]:
        """After divided by before; None if there was nothing before.

        >>> Measurement(Cost(7, 100, 5000), Cost(7, 60, 2500)).ratios()
        {'dropouts': 1.0, 'operators': 0.6, 'saved_bytes': 0.5}
        """
        before, after = asdict(self.before), asdict(self.after)
        names = [n for n in _LABELS if n != "layer_bytes" or self.before.layers]
        return {n: after[n] / before[n] if before[n] else None for n in names}

    def to_dict(self) -> dict[str, Any]:
        """The figures and their ratios, of plain types."""
        return {**asdict(self), "ratios": self.ratios()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A row of text per figure: its name, before, after, and the ratio."""
        before, after, ratios = asdict(self.before), asdict(self.after), self.ratios()
        lines = []
        for name, ratio in ratios.items():
            text = _in_bytes if name.endswith("bytes") else str
            shown = "" if ratio is None else f"{ratio:.2f}"
            label = _LABELS[name].format(self.before.layers)
            lines.append((label, text(before[name]), text(after[name]), shown))
        return lines

    def __str__(self) -> str:
        return ", ".join(
            f"{label} {before} -> {after}" + (f" (x {ratio})" if ratio else "")
            for label, before, after, ratio in self.rows()
        )


_LABELS = {
    "dropouts": "dropout launches",
    "operators": "operators",
    "saved_bytes": "saved for backward",
    "layer_bytes": "of it per layer, of {}",
}


def _in_bytes(n: int) -> str:
    size, units = float(n), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{n} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


# Called after each operator: with it, its arguments, and the states of torch's generators before.
Observer = Callable[[OpOverload, Sequence[Any], Mapping[str, Any], list[Tensor]], None]


def cost_of(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] = {},
    watch: Callable[[Generators], AbstractContextManager[Observer]] | None = None,
) -> Cost:
    """The cost of one training forward. Modes, buffers and random generators are restored after it.

    A model in training mode runs in the modes that its modules have; one in eval mode is put into
    training mode for the forward. ``watch`` is entered around the forward, and the observer that it
    gives is called after each operator.
    """
    saved = _Saved(layers_of(model))
    of_model = [*model.parameters(), *model.buffers()]
    tensors = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
    generators = Generators(model, tensors)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(generators.kept())
        stack.enter_context(_modes_and_buffers_kept(model))
        if "torch._dynamo" in sys.modules:  # count the operators that compiled parts consist of
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not model.training:
            model.train()
        with ExitStack() as running:
            running.enter_context(saved.hooks())
            observer = None if watch is None else running.enter_context(watch(generators))
            counter = running.enter_context(_Counter(generators, observer))
            mode = {"training": True} if is_keras(model) else {}  # Keras models have no mode
            outputs = model(*args, **{**mode, **kwargs})
        saved.add_attributes(outputs)
        count = len(saved.layers)
        by_layer = saved.size(of_model, inside=True) // max(1, count)
        return Cost(counter.dropouts, counter.operators, saved.size(of_model), count, by_layer)


class _Counter(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    # flex_attention, cond and their kin, which take functions, come through here as well.
    supports_higher_order_operators = True

    def __init__(self, generators: Generators, observer: Observer | None) -> None:
        super().__init__()
        self.generators, self.observer = generators, observer
        self.dropouts = 0
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        profile = sys.getprofile()
        sys.setprofile(None)  # calls made here and inside operators are not the model's
        try:
            return self.dispatched(func, args, kwargs or {}, profile)
        finally:
            sys.setprofile(profile)

    def dispatched(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], profile: Any
    ) -> Any:
        if not isinstance(func, OpOverload):
            self.operators += 1  # with what it does besides calling the functions
            return func(*(self.seen(x, profile) for x in args), **kwargs)
        states = [] if self.observer is None else self.generators.torch_state()
        result = func(*args, **kwargs)
        touched = tree_leaves((args, kwargs, result))
        if any(map(is_traced, touched)):  # the functions are traced, for their gradient
            return result
        if self.observer is not None:
            self.observer(func, args, kwargs, states)
        self.dropouts += _drops(func, args, kwargs)
        computes = not func.is_view and func.overloadpacket.__name__ not in _FREE
        self.operators += computes and any(isinstance(x, Tensor) for x in touched)
        return result

    def seen(self, argument: Any, profile: Any) -> Any:
        """An argument of an operator that takes functions; a function is seen while it runs."""
        if not isinstance(argument, (FunctionType, MethodType, functools.partial, nn.Module)):
            return argument

        def call(*args: Any, **kwargs: Any) -> Any:
            inner = sys.getprofile()
            sys.setprofile(profile)
            try:
                with self:
                    return argument(*args, **kwargs)
            finally:
                sys.setprofile(inner)

        return call


def _drops(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers for a dropout."""
    return func.overloadpacket.__name__ in _DRAWS or any(
        True if p is None else p > 0 for p in rates_of(func, args, kwargs)
    )


def given_to(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator by name, including the defaults of omitted ones."""
    schema = schema_of(func)
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **{a.name: x for a, x in zip(schema, args, strict=False)}, **kwargs}


def rates_of(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[float | None]:
    """The rates that an operator takes; None for a rate in a tensor on another device."""
    given = given_to(func, args, kwargs)
    if func.overloadpacket.__name__ == "dropout":  # which is seen where autograd is past
        return [float(given["p"]) if given["train"] else 0.0]
    names = ("p", "p_tensor", "drop_path") if func.namespace == "tridrop" else _RATES
    found: list[float | None] = []
    for p in (given[name] for name in names if name in given):
        if isinstance(p, Tensor):
            found.append(float(p) if p.device.type == "cpu" else None)
        elif isinstance(p, Real):
            found.append(float(p))
    return found


class _Saved:
    """Collects the tensors that autograd keeps for backward."""

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self.tensors: list[Tensor] = []  # alive until counted, so that no two have the same address
        self.layers = {id(layer) for layer in layers}
        # for each tensor, whether a layer was running when it was saved
        self.within: list[bool] = []

    def hooks(self) -> AbstractContextManager[None]:
        def pack(tensor: Tensor) -> Tensor:
            # Not the tensor itself: a node that holds its own output would never be freed.
            if is_traced(tensor):
                return tensor
            self.tensors.append(tensor.detach())
            self.within.append(bool(self.layers) and self.in_layer())
            return self.tensors[-1]

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def in_layer(self) -> bool:
        """Whether a method of a layer is running. (A hook would keep the layer from fusing.)"""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            if names and id(frame.f_locals.get(names[0])) in self.layers:
                return True
            frame = frame.f_back
        return False

    def add_attributes(self, outputs: Any) -> None:
        """Add what autograd Functions keep as attributes, which saved-tensor hooks do not see."""
        tensors = [x for x in tree_leaves(_plain(outputs)) if isinstance(x, Tensor)]
        todo, seen = [x.grad_fn for x in tensors if x.grad_fn is not None], set()
        while todo:
            node: Any = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            found = tree_leaves(list(getattr(node, "__dict__", {}).values()))
            self.tensors += [x.detach() for x in found if isinstance(x, Tensor)]
            todo += [parent for parent, _ in node.next_functions if parent is not None]

    def size(self, without: Sequence[Tensor], inside: bool = False) -> int:
        """The bytes of all storages except those of ``without``; with ``inside``, of those that
        were first saved inside a layer."""
        sizes: dict[Any, int] = {}
        for i, x in enumerate(self.tensors):
            if x.layout != torch.strided:
                continue
            storage = x.untyped_storage()
            counts = not inside or (i < len(self.within) and self.within[i])
            sizes.setdefault(
                (storage.device, storage.data_ptr()), storage.nbytes() if counts else 0
            )
        for tensor in without:
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                sizes.pop((storage.device, storage.data_ptr()), None)
        return sum(sizes.values())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model's longest list of two or more modules of one class."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            layers = list(module.children())
            same_class = len({type(layer) for layer in layers}) == 1
            if same_class and len(layers) > max(1, len(found)):
                found = layers
    return found


def _plain(outputs: Any) -> Any:
    """Outputs for tree_leaves, which does not look into a library's own mapping: as a dict."""
    return dict(outputs) if isinstance(outputs, Mapping) else outputs


@contextmanager
def _modes_and_buffers_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in all_modules(model)]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in all_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    states = [(state, state.value.detach().clone()) for state in _states(model)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer
            # Compared by content, since a batch norm writes without increasing the version counter.
            if not torch.equal(buffer, content):
                with torch.no_grad():
                    buffer.copy_(content)
        for state, content in states:
            state.assign(content)


def _states(model: nn.Module) -> Iterator[Any]:
    """The variables of Keras layers that calls write: statistics, and states of seed generators."""
    for layer in filter(is_keras, all_modules(model)):
        found: Any = layer
        yield from found._non_trainable_variables
        yield from (generator.state for generator in found._seed_generators)


@contextmanager
def changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Apply ``change`` (a swap or an unswap) to a model, and undo it exactly at the end.

    The inverse operation would not undo it exactly, since sites may have been renumbered by hand.
    """
    holders: list[Any] = [*all_modules(model), *_configurations(model)]
    before = [(holder, type(holder), copy.copy(holder.__dict__)) for holder in holders]
    undo: list[tuple[Any, type, dict[str, Any], set[str]]] = []
    try:
        try:
            change(model)
        finally:
            for holder, kind, old in before:
                new = holder.__dict__
                names = {n for n in {*old, *new} if n not in old or old[n] is not new.get(n, new)}
                if names or type(holder) is not kind:
                    undo.append((holder, kind, old, names))
        yield
    finally:
        for holder, kind, old, names in undo:
            if type(holder) is not kind:
                holder.__class__ = kind
            for name in names:
                if name in old:
                    holder.__dict__[name] = old[name]
                else:
                    holder.__dict__.pop(name, None)


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of a transformers model, which name its attention functions."""
    found: dict[int, Any] = {}
    todo = [module.__dict__.get("config") for module in model.modules()]
    while todo:
        config = todo.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            todo += list(config.__dict__.values())
    return list(found.values())
