"""What a backend is: the functions that its module has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.attention import AttentionInputs, AttentionOptions
from ..spec.elementwise import NormOptions, Options
from ..spec.product import ProductOptions


class Backend(Protocol):
    """The functions of a backend module.

    ``x`` is the input, ``bias`` a vector of its last dimension's size, ``layer_scale`` one of the
    output's, ``residual`` of the output's shape; each but x may be None. ``seed`` is a seed tensor,
    or None where nothing is dropped. ``p`` is a 0-d tensor that takes the place of ``options.p``.
    """

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: Options,
    ) -> Tensor:
        """residual + drop_path(layer_scale * dropout(f(x + bias))), of any strides."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: Options,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, bias and layer_scale in these dtypes; None for those not wanted."""

    def norm_forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, stream, statistics): the formulas of ``backends/reference/norm.py``.

        statistics are mean and rstd of every row, fp32, [..., 2]. stream is None where it is x, or
        not kept.
        """

    def norm_backward(
        self,
        dout: Tensor,
        dstream: Tensor | None,
        stream: Tensor,
        statistics: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: NormOptions,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias, layer_scale, residual, weight, norm_bias; None where not wanted.

        ``x`` is given where layer_scale needs a gradient. ``stream`` is what forward returned, or x
        where the dropout came after the norm; then the residual's gradient is None.
        """

    def attention_forward(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """(out, lse): the formulas of ``backends/reference/attention.py``.

        out is as spec.attention.empty_output makes it; lse [B, H, Sq], fp32 (fp64 for fp64).
        """

    def attention_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        inputs: AttentionInputs,
        options: AttentionOptions,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, mask and sinks, like their tensors, or None."""

    def softmax_forward(
        self,
        scores: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        options: AttentionOptions,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(out, softmax, lse): the formulas of ``backends/reference/softmax.py``.

        scores are [..., queries, keys] of any strides, and mask broadcasts to them; softmax is None
        where it is not returned; lse is fp32, [..., queries], 0 where backward does without.
        """

    def softmax_backward(
        self,
        dout: Tensor | None,
        dsoftmax: Tensor | None,
        scores: Tensor,
        mask: Tensor | None,
        lse: Tensor,
        seed: Tensor | None,
        p: Tensor | None,
        options: AttentionOptions,
        dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of scores and mask in these dtypes; None for those not wanted."""

    def product_forward(
        self,
        x: Tensor,
        weight: Tensor,
        seeds: Tensor | None,
        p: Tensor | None,
        options: ProductOptions,
    ) -> Tensor:
        """gain * drop_i(x) @ weight_i^T, side by side, in the weight's dtype.

        The weight_i, of ``options.ranks`` rows, lie one below the other in ``weight``; ``seeds`` is
        [masks, 2].
        """

    def product_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        seeds: Tensor | None,
        p: Tensor | None,
        options: ProductOptions,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and weight in their dtypes; None for those not wanted."""

    def keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: Options, domain: str
    ) -> Tensor:
        """The mask of ``domain``: bool, True where kept."""

    def decision_bits(self, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The 32 bits that the mask of elements compares with T: int64, in [0, 2^32)."""

    def attention_keep_mask(
        self, seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: AttentionOptions
    ) -> Tensor:
        """The mask of attention from ``options.origin`` on: bool, [B, H, Sq, Sk]."""

    def why_not(self, device: torch.device, dtypes: list[torch.dtype]) -> str | None:
        """Why the backend cannot serve tensors of this device and dtypes; None where it can."""

    # By family, what prepares a call of this shape, these options and tensors like these, or gives
    # None where it cannot: see :func:`tridrop.backends.prepare`.
    PREPARES: dict[str, Callable[..., Any]]


class Prepared(Protocol):
    """One op, for calls that differ in data and in nothing else.

    Its functions are those of :class:`Backend` without ``p`` and the options.
    """

    def forward(self, *arguments: Any) -> Any:
        """The op."""

    def backward(self, *arguments: Any) -> Any:
        """Its gradients."""
