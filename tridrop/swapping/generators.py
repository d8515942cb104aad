"""The random generators that a forward may draw from: saves, restores and compares their states."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.modules import all_modules


class Generators:
    """Every generator that a model can draw from.

    These are torch's generators of the CPU and of each accelerator that tensors are on, the global
    ones of NumPy and Python, and those that modules have as attributes.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor] = ()) -> None:
        # A function that reads the state of a generator, and one that sets it.
        Pair = tuple[Callable[[], Any], Callable[[Any], Any]]
        self.of_torch: list[Pair] = [(torch.get_rng_state, torch.set_rng_state)]
        self.of_python: list[tuple[Any, Any]] = [(random.getstate, random.setstate)]
        self.of_numpy: list[Any] = []
        of_model = [*model.parameters(), *model.buffers()]
        for device in sorted({x.device for x in (*of_model, *tensors)} | _in_use(), key=str):
            if device.type not in ("cpu", "meta"):
                self.of_torch.append(_of_device(device))
        numpy: Any = sys.modules.get("numpy.random")
        if numpy is not None:
            self.of_numpy.append(numpy.get_state.__self__)
        for value in _attribute_values(model):
            if isinstance(value, torch.Generator):
                self.of_torch.append((value.get_state, value.set_state))
            elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
                self.of_python.append((value.getstate, value.setstate))
            elif numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState)):
                self.of_numpy.append(value)

    def torch_state(self) -> list[Tensor]:
        """The states of torch's generators."""
        return [read() for read, _ in self.of_torch]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the states of all generators at the end."""
        pairs = [*self.of_torch, *self.of_python, *map(_of_numpy, self.of_numpy)]
        states = [read() for read, _ in pairs]
        try:
            yield
        finally:
            for (_, write), state in zip(pairs, states, strict=True):
                write(state)


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether two states of torch's generators differ."""
    return not all(map(torch.equal, before, after))


def _in_use() -> set[torch.device]:
    """All CUDA devices, if the program uses CUDA: a forward may draw on any of them."""
    if not torch.cuda.is_initialized():
        return set()
    return {torch.device("cuda", i) for i in range(torch.cuda.device_count())}


def _of_device(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    module: Any = torch.get_device_module(device.type)
    if device.type == "mps":  # it has one generator, and its functions take no device
        return module.get_rng_state, module.set_rng_state
    return (
        lambda: module.get_rng_state(device),
        lambda state: module.set_rng_state(state, device),
    )


def _of_numpy(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    # the state of a RandomState includes a second normal number
    if hasattr(generator, "get_state"):
        return generator.get_state, generator.set_state
    bits = generator.bit_generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)


def _attribute_values(model: nn.Module) -> Iterator[Any]:
    """The values of the attributes of a model's modules, and those in lists and dicts there."""
    seen: set[int] = set()
    for module in all_modules(model):
        todo = [v for n, v in module.__dict__.items() if n not in _TORCHS]
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                todo += value.values()
            elif isinstance(value, (list, tuple, set)):
                todo += value
            else:
                yield value


_TORCHS = frozenset(nn.Module().__dict__)  # the attributes that every module of torch has
