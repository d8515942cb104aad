"""A row of the table of cases: the inputs of an op, the fused call, and what it should equal.

The eager composition takes its random part as an argument, ``drop(domain, value)``. With the
exported masks it gives what the op must equal; with the identity it gives the op's expected value.
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
    """Gives the same row at another shape of the result, and another p."""

    def __call__(self, shape: tuple[int, ...], p: float, *, apart: bool = False) -> Case:
        """``apart``: both results as a tuple, for a row that otherwise ``joins`` them."""


@dataclass(frozen=True)
class Case:
    """A row: ``call`` must equal ``eager`` under the masks that ``masks`` exports."""

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
    """the dtype of the residual, if it differs from that of the other operands"""
    linear: bool = True
    """whether the result is linear in the masks, so that its expected value has a formula"""
    probe: Callable[[Inputs, Any], Tensor] | None = None
    """(inputs, seed) -> a result that is zero exactly where something is dropped; default: call"""
    backward_shows_mask: bool = True
    """whether a constant gradient reaches x exactly where the element is kept"""
    saved_extra: int = 0
    """the bytes of statistics that backward may keep"""
    out_like: str = "residual"
    """the operand whose dtype the result has; x, if the row lacks that operand"""
    main: str = "x"
    """the operand whose gradient shows the mask"""
    kept: tuple[str, ...] = ()
    """operands that backward may keep although eager PyTorch need not"""
    mask_over: tuple[int, ...] | None = None
    """the shape of the masks, if it is not that of the result: of scores, or of an operand"""
    gaussian: bool = False
    """whether the random part is normal noise of mean 1, which drops nothing"""
    plain: Callable[[Inputs], Tensor] | None = None
    """the op at p = 0, if that is not ``eager`` with the identity"""
    visible: Callable[[str], Tensor] | None = None
    """(device) -> where the result shows the mask, if not everywhere; elsewhere it is zero"""
    multiplies: bool = False
    """whether the kernels multiply matrices, which Triton's interpreter cannot do in bf16"""
    joins: bool = False
    """whether the op returns two results, and the row checks their sum"""
    at: At | None = None
    """gives the row at another shape, for benchmarks; None if its options contain a shape"""
    by_hand: Callable[[Inputs, Drop], Any] | None = None
    """eager, as written in models that do not use torch's function"""
    of_torch: Callable[[Inputs, float], Tensor] | None = None
    """(inputs, p) -> the result of torch's own fused function, if there is one"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.shapes["residual"] if "residual" in self.shapes else self.shapes["out"]

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the masks."""
        return self.shape if self.mask_over is None else self.mask_over

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        """Normal inputs. They are drawn in fp64 on the host, so that every device gets the same."""
        tensors = {}
        for name, shape in self.shapes.items():
            if name != "out":
                drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
                wanted = self.residual_dtype if name == "residual" else None
                tensors[name] = drawn.to(device, wanted or dtype)
        return tensors

    def drawn_shape(self, domain: str) -> list[int]:
        """The shape of the random numbers of a domain, with 1 for dimensions that share them."""
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
        """The random part, made from the exported masks."""

        def drop(domain: str, value: Tensor) -> Tensor:
            kind = "gaussian" if self.gaussian else "mask"
            factor = noise.scale(kind, threshold(self.rates[domain]))
            if self.gaussian:
                return value * (1 + factor * masks[domain].to(value.dtype))
            kept = value * factor
            return torch.where(masks[domain], kept, torch.zeros_like(kept))

        return drop

    def masks(self, seed: Any, device: str) -> dict[str, Tensor]:
        """The exported mask of each domain; for Gaussian noise, the normal numbers."""
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
