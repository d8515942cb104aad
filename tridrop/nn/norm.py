"""Dropout, add and norm as modules, with the weights of torch.nn's norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_flags, check_whole
from ..functional.linear import remade_add_norm
from ..spec.elementwise import check_probability
from .modules import _Site


class _DropoutAddNorm(_Site):
    """The base class of both modules, which differ in the function and its defaults."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    function: Callable[..., Tensor | tuple[Tensor, Tensor]]

    def __init__(
        self,
        normalized_shape: int,
        p: float = 0.5,
        *,
        drop_path: float = 0.0,
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        zero_centered_weight: bool = False,
        remake: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wanted_size = "the size of the last dimension, an int"
        normalized_shape = check_whole(normalized_shape, "normalized_shape", wanted=wanted_size)
        check_flags(
            elementwise_affine=elementwise_affine, bias=bias, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32, zero_centered_weight=zero_centered_weight,
            remake=remake,
        )  # fmt: skip
        check_probability(p)
        check_probability(drop_path, "drop_path")
        self.normalized_shape = (normalized_shape,)
        self.p = p
        self.drop_path = drop_path
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.prenorm = prenorm
        self.residual_in_fp32 = residual_in_fp32
        self.zero_centered_weight = zero_centered_weight
        self.remake = remake
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            empty = torch.empty(self.normalized_shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the affine part to the identity."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        layer_scale: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``bias`` is the bias of the linear before; the norm's own bias is ``self.bias``."""
        options: dict[str, Any] = {
            "bias": bias,
            "layer_scale": layer_scale,
            "drop_path": self.drop_path,
            "eps": self.eps,
            "residual_in_fp32": self.residual_in_fp32,
            "zero_centered_weight": self.zero_centered_weight,
            "seed": self._seed(x),
        }
        operands = (x, residual, self.weight, self.bias, self.p, self.training)
        if self.remake:
            found = remade_add_norm(type(self).function, *operands, **options)
            return found if self.prenorm else found[0]
        return type(self).function(*operands, prenorm=self.prenorm, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, p={self.p}, drop_path={self.drop_path}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, prenorm={self.prenorm}"
        )


class DropoutAddLayerNorm(_DropoutAddNorm):
    """:func:`tridrop.dropout_add_layer_norm` as a module; its weights are those of nn.LayerNorm.

    Args:
        normalized_shape: the size of the last dimension.
        p: the probability of dropping an element of the branch.
        drop_path: the probability of dropping a sample's branch.
        eps, elementwise_affine, bias: as in torch.nn.LayerNorm.
        prenorm: return (out, stream).
        residual_in_fp32, zero_centered_weight: as in the function.
        remake: a linear layer of a :class:`TransformerBlock` that takes the result does not keep it
            for backward, see :func:`tridrop.norm_linear`.

    >>> import torch
    >>> layer = DropoutAddLayerNorm(4, p=0.1, elementwise_affine=False).eval()
    >>> layer(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.zeros(1, 4), bias=torch.ones(4))
    tensor([[-1.0690, -0.5345,  0.0000,  1.6036]])
    """

    function = staticmethod(F.dropout_add_layer_norm)


class DropoutAddRMSNorm(_DropoutAddNorm):
    """:func:`tridrop.dropout_add_rms_norm` as a module; its weight is that of nn.RMSNorm.

    Arguments are as in :class:`DropoutAddLayerNorm`, but the norm has no bias; eps None, the
    default, stands for the machine epsilon, as in torch.nn.RMSNorm.

    >>> import torch
    >>> layer = DropoutAddRMSNorm(2, p=0.1, elementwise_affine=False).eval()
    >>> layer(torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    """

    function = staticmethod(F.dropout_add_rms_norm)

    def __init__(
        self, normalized_shape: int, p: float = 0.5, *, eps: float | None = None, **options: Any
    ) -> None:
        if "bias" in options:
            raise TypeError("DropoutAddRMSNorm has no bias: torch.nn.RMSNorm has none")
        super().__init__(normalized_shape, p, eps=eps, bias=False, **options)
