"""Times providers in rounds, in which they take turns; operands are not in the cache."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..check.case import Inputs
from .machine import Machine, Thunk

FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "both")
COPY = "copy"
LEAST_ROUNDS = 3
MOST_CALLS = 20
TURN_SECONDS = 0.05
Key = tuple[str, float, str]  # provider, p, mode


def results(found: Any) -> tuple[Tensor, ...]:
    """The result or results of a call, as a tuple."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


class Operands:
    """The inputs of a call, and normal random gradients for its results."""

    def __init__(self, tensors: Inputs) -> None:
        self.leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        self._grads: dict[tuple[torch.dtype, ...], list[Tensor]] = {}

    def grads(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """The incoming gradients, drawn once for each dtype that providers return."""
        key = tuple(out.dtype for out in outs)
        if key not in self._grads:
            self._grads[key] = [torch.randn_like(out) for out in outs]
        return self._grads[key]

    def backward(self, outs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, which are not accumulated."""
        leaves = list(self.leaves.values())
        return torch.autograd.grad(outs, leaves, self.grads(outs), allow_unused=True)


class Rotation:
    """Sets of operands to use in turn. Together they exceed twice the cache, so that a set has left
    the cache when its turn comes again."""

    def __init__(self, first: Inputs, cache_bytes: int) -> None:
        size = max(1, sum(t.nbytes for t in first.values()))
        more = max(1, 2 * cache_bytes // size)
        self.sets = [Operands(first)]
        self.sets += [
            Operands({name: torch.randn_like(t) for name, t in first.items()}) for _ in range(more)
        ]
        self.calls = min(MOST_CALLS, math.ceil(2 * cache_bytes / size) or 1)
        """calls per turn: their operands amount to about twice the cache"""
        self._cycle = itertools.cycle(self.sets)

    def take(self, calls: int) -> Iterator[Operands]:
        """The operands of the next ``calls`` calls."""
        return itertools.islice(self._cycle, calls)


@dataclass(frozen=True)
class Subject:
    """A provider at a rate, with operands that it shares with other subjects."""

    provider: str
    p: float
    call: Callable[[Inputs], Any]
    rotation: Rotation
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    calls: int = 1
    """calls per turn"""

    def lasting(self, seconds: float) -> Subject:
        """The same with a suitable number of calls per turn, if a call takes ``seconds``."""
        affordable = max(1, int(TURN_SECONDS / max(seconds, 1e-9)))
        return replace(self, calls=min(self.rotation.calls, affordable))

    def thunks(self, mode: str) -> list[Thunk]:
        """The calls of the next turn. For backward, their forwards run here, untimed."""
        taken = self.rotation.take(self.calls)
        if mode == FORWARD:
            return [partial(self.call, operands.leaves) for operands in taken]
        if mode == BOTH:
            return [partial(self.step, operands) for operands in taken]
        found: list[Thunk] = []
        with self.context():
            for operands in taken:
                outs = results(self.call(operands.leaves))
                operands.grads(outs)
                found.append(partial(operands.backward, outs))
        return found

    def step(self, operands: Operands) -> tuple[Tensor | None, ...]:
        """Forward and backward."""
        return operands.backward(results(self.call(operands.leaves)))


class Copy:
    """A device copy that moves as many bytes as a row has to move in each mode."""

    provider, p = COPY, 0.0

    def __init__(self, moved: dict[str, int], device: str, cache_bytes: int) -> None:
        self.context = nullcontext
        self._cycles = {}
        self._calls = {}
        for mode, size in moved.items():
            half = max(1, size // 8)  # fp32 numbers, one read and one written
            pairs = max(2, 2 * cache_bytes // (8 * half) + 1)
            buffers = [
                (torch.empty(half, device=device), torch.randn(half, device=device))
                for _ in range(pairs)
            ]
            self._cycles[mode] = itertools.cycle(buffers)
            self._calls[mode] = min(MOST_CALLS, math.ceil(cache_bytes / (4 * half)) or 1)

    def thunks(self, mode: str) -> list[Thunk]:
        """The copies of the next turn."""
        taken = itertools.islice(self._cycles[mode], self._calls[mode])
        return [partial(target.copy_, source) for target, source in taken]


Timed = Subject | Copy


def rounds(
    machine: Machine,
    subjects: Sequence[Timed],
    modes: Sequence[str],
    count: int,
    host: dict[Key, float],
    budget: float,
) -> dict[Key, list[float]]:
    """Seconds per call of every subject and mode, one figure per round.

    Args:
        machine: times the calls.
        subjects: the subjects that take turns. Each is the first of a round equally often.
        modes: some of "forward", "backward" and "both".
        count: the number of rounds; fewer, but at least three, if they would take longer than
            ``budget`` seconds.
        host: the seconds that the host needs for a call, where they are known.
        budget: see ``count``.
    """
    found: dict[Key, list[float]] = defaultdict(list)
    start = time.perf_counter()
    for i in range(count):
        turn = i % len(subjects)
        for mode in modes:
            for subject in (*subjects[turn:], *subjects[:turn]):
                key = (subject.provider, subject.p, mode)
                calls = subject.thunks(mode)
                with subject.context():
                    found[key].append(machine.seconds(calls, host.get(key, 0.0)))
                del calls
        if i + 1 >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
    return found


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the 20 % and 80 % quantiles."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]
