"""Dropped weights that are saved for backward by any op of torch, and not kept: drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.memory import Given, given, still
from ..base.torch_private import saved_tensor_hooks, transformation


@dataclass
class Drawn:
    """A dropped weight: ``draw(weight)`` made ``value``, and makes it again in backward."""

    weight: Tensor
    value: Tensor
    draw: Callable[[Tensor], Tensor]
    version: int = 0  # of the weight when it was dropped
    given: tuple[Given, ...] = ()  # what it was then
    waiting: int = 0  # views of it that a graph has saved and backward has not asked for
    again: Tensor | None = None

    def view(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """A view of the dropped weight, drawn once for all that wait for it."""
        if self.weight._version != self.version:
            raise RuntimeError(
                "a weight whose dropped copy backward draws again was changed in place since its "
                f"forward (version {self.version}, now {self.weight._version}): call backward "
                "before optimizer.step()"
            )
        again = self.again
        if again is None:
            weight = still(self.weight, self.given[0])
            with torch.no_grad():
                again = self.draw(weight)
        self.waiting -= 1
        self.again = again if self.waiting > 0 else None
        return again.as_strided(size, stride, offset)


@contextmanager
def redrawn(weights: Sequence[Drawn]) -> Iterator[None]:
    """Inside, what torch saves of the ``value`` of these weights is their rule and not the numbers.

    Other tensors go to the hooks around, such as those of a checkpoint. Under torch.compile and
    torch.func nothing is done: what a compiled graph saves is its partitioner's choice, and
    torch.func takes no hooks.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformation() is not None:
        yield
        return
    known = {}
    for drawn in weights:
        drawn.version = drawn.weight._version
        drawn.given = given(("weight",), (drawn.weight,))
        known[drawn.value.untyped_storage().data_ptr()] = drawn
    around = saved_tensor_hooks(False)

    def pack(t: Tensor) -> Any:
        drawn = known.get(t.untyped_storage().data_ptr()) if t.numel() else None
        if drawn is None:
            return None, t if around is None else around[0](t)
        drawn.waiting += 1
        return drawn, (t.shape, t.stride(), t.storage_offset())

    def unpack(packed: Any) -> Tensor:
        drawn, what = packed
        if drawn is not None:
            return drawn.view(*what)
        return what if around is None else around[1](what)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    for drawn in weights:
        del drawn.value  # the graph keeps the rule alone
