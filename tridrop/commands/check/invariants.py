"""Rows that state invariants of an op: moments, rates, shared decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# In standard errors. A correct op exceeds six of them once in 5 * 10^8 checks.
MAX_Z = 6.0


@dataclass(frozen=True)
class Trial:
    """What an invariant is measured on: ``seeds`` calls in a dtype on a device."""

    dtype: torch.dtype
    device: str
    seeds: int
    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(5), compare=False
    )

    def normal(self, *shape: int) -> Tensor:
        """New standard normal numbers in each call; the same on every device."""
        drawn = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return drawn.to(self.device, self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """Ones."""
        return torch.ones(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Found:
    """A measured figure, and the most that it may be."""

    check: str
    value: float
    limit: float
    detail: str = ""


@dataclass(frozen=True)
class Invariant:
    """A row: each figure that ``measure`` finds must be within its limit."""

    name: str
    op: str
    measure: Callable[[Trial], Iterator[Found]]


def z_of_mean(samples: Sequence[Tensor], expected: float) -> tuple[float, float]:
    """|mean - expected| of independent numbers, in standard errors; and the limit for it."""
    together = torch.cat([s.double().flatten() for s in samples])
    spread = float(together.std()) / math.sqrt(together.numel())
    z = abs(float(together.mean()) - expected) / max(spread, 1e-300)
    return math.inf if math.isnan(z) else z, MAX_Z


def uneven(kept: Tensor, dims: tuple[int, ...]) -> int:
    """How many decisions differ along ``dims``, which should share one."""
    return int((kept.any(dims) != kept.all(dims)).sum()) if dims else 0
