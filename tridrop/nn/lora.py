"""LoRA as a module around a layer, for models that do not use PEFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import functional as F
from ..spec.elementwise import check_probability
from .modules import _Site


class LoRALinear(_Site):
    """A frozen layer and the trainable low-rank update of its weight (LoRA).

        out = base(x) + scaling * (dropout(x) @ A^T @ B^T + bias)

    with scaling = alpha / r, or alpha / sqrt(r) where ``rslora`` is set (Kalajdzievski 2023, arXiv
    2312.03732). Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022, arXiv
    2106.09685. Backward keeps x, which the base layer keeps anyway, and no dropped copy of it.

    Initial values are those of PEFT: A is initialised as torch.nn.Linear's weight, B and bias are
    zero, so that the layer begins as its base.

    Args:
        base: the layer to adapt, a torch.nn.Linear or any module from [..., in] to [..., out], for
            instance a quantised one. The constructor freezes it (``requires_grad`` is off then).
        r: the rank.
        alpha: the numerator of the scaling; None makes the scaling 1.
        p: the probability of dropping an element of x in the branch.
        rslora: divide alpha by sqrt(r).
        bias: give the branch a trainable bias.
        in_features, out_features: the sizes, where the base layer has no attributes of these names.
        device, dtype: of the new parameters. By default the device of the base's first parameter;
            and float64 if that is float64, else float32, also for half precision and quantised
            layers, as in PEFT.

    Attributes:
        lora_A, lora_B, lora_bias: [r, in], [out, r], and [out] or None.
        scaling: the factor of the branch; it may be set.
        merged: whether the base layer's weight contains the update; see :meth:`merge`.

    Raises:
        ValueError: a rank below 1, p outside [0, 1], unknown sizes.
        TypeError: ``base`` is not a module.

    >>> import tridrop
    >>> layer = tridrop.nn.LoRALinear(nn.Linear(6, 4), r=2, alpha=4, p=0.1)
    >>> x = torch.ones(3, 6)
    >>> bool((layer(x) == layer.base(x)).all()), [n for n, p in layer.named_parameters()
    ...                                           if p.requires_grad]
    (True, ['lora_A', 'lora_B'])
    """

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float | None = None,
        p: float = 0.0,
        *,
        rslora: bool = False,
        bias: bool = False,
        in_features: int | None = None,
        out_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise TypeError(f"base is a {type(base).__name__}; give the torch.nn.Module to adapt")
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r is {r!r}; the rank is an integer of 1 or more")
        check_probability(p)
        self.base = base.requires_grad_(False)
        self.in_features = _size(base, "in_features", in_features)
        self.out_features = _size(base, "out_features", out_features)
        self.r, self.alpha, self.p, self.rslora = r, alpha, p, rslora
        divisor = math.sqrt(r) if rslora else r
        self.scaling = 1.0 if alpha is None else alpha / divisor
        self.merged = False
        first = next(base.parameters(), None)
        if device is None and first is not None:
            device = first.device
        if dtype is None:
            double = first is not None and first.dtype == torch.float64
            dtype = torch.float64 if double else torch.float32

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.lora_A = empty(r, self.in_features)
        self.lora_B = empty(self.out_features, r)
        self.lora_bias = empty(self.out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new A and set B and the bias to zero, so that the layer equals its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.merged:
            return out
        return F.lora_linear(
            x,
            out,
            self.lora_A,
            self.lora_B,
            self.p,
            self.training,
            scaling=self.scaling,
            bias=self.lora_bias,
            seed=self._seed(x),
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B @ A: what :meth:`merge` adds to the base layer's weight."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merge(self) -> LoRALinear:
        """Add the update to the base layer's weight, so that inference costs no more than the base.

        The forward of a merged layer is that of the base, in training too. Raises TypeError if the
        base has no floating-point weight [out, in], and ValueError if the branch has a bias and the
        base has none.
        """
        return self._shift(1, True)

    def unmerge(self) -> LoRALinear:
        """Subtract the update again, which restores the weight up to rounding."""
        return self._shift(-1, False)

    @torch.no_grad()
    def _shift(self, sign: int, merged: bool) -> LoRALinear:
        if self.merged == merged:
            return self
        weight, bias = getattr(self.base, "weight", None), getattr(self.base, "bias", None)
        shape = (self.out_features, self.in_features)
        fits = isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape == shape
        if not fits:
            raise TypeError(
                f"a {type(self.base).__name__} has no floating-point weight {list(shape)} to merge "
                "into: dequantise it first, or leave the layer unmerged"
            )
        if self.lora_bias is not None and bias is None:
            raise ValueError(
                "the branch has a bias and the base layer none: give the base layer a bias of "
                "zeros, or leave the layer unmerged"
            )
        assert isinstance(weight, Tensor)
        weight.copy_(weight + sign * self.delta_weight())
        if self.lora_bias is not None:
            assert isinstance(bias, Tensor)
            bias.copy_(bias + sign * self.scaling * self.lora_bias)
        self.merged = merged
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, p={self.p}" + ", merged" * self.merged


def _size(base: nn.Module, name: str, given: int | None) -> int:
    size = getattr(base, name, None) if given is None else given
    if not isinstance(size, int):
        raise ValueError(f"a {type(base).__name__} has no attribute {name}: give {name}=")
    return size
