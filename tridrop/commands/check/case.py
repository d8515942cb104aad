"""A row of the table of cases: what an op is given, the fused call, and what it should equal.

The eager composition takes its random part as an argument, ``drop(domain, value)``: given the
exported masks it is what the op must equal, given the identity it is the op's expected value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import functional
from ...contract import noise
from ...contract.mask import threshold
from ...spec.attention import four

Inputs = dict[str, Tensor]
Drop = Callable[[str, Tensor], Tensor]


def unmasked(domain: str, value: Tensor) -> Tensor:
    """The random part replaced by its expected value."""
    return value


class At(Protocol):
    """A row again at another shape, the result's, and another p."""

    def __call__(self, shape: tuple[int, ...], p: float, *, apart: bool = False) -> Case:
        """``apart``: both results of a row that ``joins`` them, as a tuple."""


@dataclass(frozen=True)
class Case:
    """A row: ``call`` is held to ``eager`` under the masks that ``masks`` exports."""

    name: str
    op: str
    p: float
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Inputs, Any, float, bool], Any]
    """(inputs, seed, p, training) -> result"""
    eager: Callable[[Inputs, Drop], Any]
    rates: dict[str, float] = field(default_factory=dict)
    """domain -> probability of dropping"""
    noise_shape: tuple[int | None, ...] | None = None
    residual_dtype: torch.dtype | None = None
    """the residual stream's dtype where it is not that of the other operands"""
    linear: bool = True
    """whether the result is linear in the masks, so that its expected value is known"""
    probe: Callable[[Inputs, Any], Tensor] | None = None
    """(inputs, seed) -> a result that is zero just where something is dropped, if call's is not"""
    backward_shows_mask: bool = True
    """whether a constant gradient reaches x just where the element is kept"""
    saved_extra: int = 0
    """bytes of statistics that backward may keep"""
    out_like: str = "residual"
    """the operand whose dtype the result has, where it is given; x otherwise"""
    main: str = "x"
    """the operand whose gradient shows the mask"""
    kept: tuple[str, ...] = ()
    """operands that backward may keep and eager PyTorch need not"""
    mask_over: tuple[int, ...] | None = None
    """the shape of the masks where it is not the result's: scores, or an operand"""
    gaussian: bool = False
    """whether the random part is normal noise of mean 1, which drops nothing"""
    plain: Callable[[Inputs], Tensor] | None = None
    """the op at p = 0, where that is not ``eager`` given the identity"""
    visible: Callable[[str], Tensor] | None = None
    """(device) -> where a result shows the mask, if not everywhere; it is zero elsewhere"""
    multiplies: bool = False
    """whether the kernels multiply matrices, which the interpreter cannot in bf16"""
    joins: bool = False
    """whether the op returns two results, of which the row is the sum"""
    at: At | None = None
    """the row at another shape, for the benchmarks; None where its options name a shape"""
    by_hand: Callable[[Inputs, Drop], Any] | None = None
    """eager, as models write it that do not use torch's function"""
    of_torch: Callable[[Inputs, float], Tensor] | None = None
    """(inputs, p) -> result of torch's own fused function, where it has one"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.shapes["residual"] if "residual" in self.shapes else self.shapes["out"]

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the masks."""
        return self.shape if self.mask_over is None else self.mask_over

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        """Normal inputs of the dtype: drawn in fp64 on the host, the same for every device."""
        tensors = {}
        for name, shape in self.shapes.items():
            if name != "out":
                drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
                wanted = self.residual_dtype if name == "residual" else None
                tensors[name] = drawn.to(device, wanted or dtype)
        return tensors

    def drawn_shape(self, domain: str) -> list[int]:
        """The shape of the random numbers of a domain: 1 where they are shared."""
        if domain == "attention":
            return list(self.mask_shape)
        if domain == "drop_path":
            return [self.shape[0], *(1 for _ in self.shape[1:])]
        noise = self.noise_shape or (None,) * len(self.mask_shape)
        return [s if n is None else n for n, s in zip(noise, self.mask_shape, strict=True)]

    def eager_dropout(self, generator: torch.Generator) -> Drop:
        """The random part as eager PyTorch draws it, from a generator."""

        def drop(domain: str, value: Tensor) -> Tensor:
            shape, rate = self.drawn_shape(domain), self.rates[domain]
            keep = torch.rand(shape, generator=generator, dtype=torch.float64) >= rate
            return value * (keep / (1 - rate)).to(value.device, value.dtype)

        return drop

    def without_dropout(self, inputs: Inputs) -> Any:
        """The op at p = 0, in eager PyTorch."""
        return self.eager(inputs, unmasked) if self.plain is None else self.plain(inputs)

    def drop_with(self, masks: dict[str, Tensor]) -> Drop:
        """The random part, from what ``masks`` exports."""

        def drop(domain: str, value: Tensor) -> Tensor:
            kind = "gaussian" if self.gaussian else "mask"
            factor = noise.scale(kind, threshold(self.rates[domain]))
            if self.gaussian:
                return value * (1 + factor * masks[domain].to(value.dtype))
            kept = value * factor
            return torch.where(masks[domain], kept, torch.zeros_like(kept))

        return drop

    def masks(self, seed: Any, device: str) -> dict[str, Tensor]:
        """The exported mask of each domain; of Gaussian noise the normal numbers."""
        return {domain: self._mask(domain, seed, device) for domain in self.rates}

    def _mask(self, domain: str, seed: Any, device: str) -> Tensor:
        rate = self.rates[domain]
        if domain == "attention":
            keep = functional.attention_keep_mask(seed, four(self.mask_shape), rate, device=device)
            return keep.reshape(self.mask_shape)
        if self.gaussian:
            return functional.normal_noise(
                seed, self.shape, noise_shape=self.noise_shape, device=device
            )
        return functional.keep_mask(
            seed,
            self.mask_shape if domain == "elements" else self.shape,
            rate,
            noise_shape=self.noise_shape if domain == "elements" else None,
            device=device,
            domain=domain,
        )
