"""The functions of Megatron-LM's megatron/core/fusions/fused_bias_dropout.py, as of August 2026.

Megatron-LM is neither needed nor changed: import a function from here instead of the library's own.
Masks are tridrop's, so that every call also takes ``seed`` by name, and :func:`tridrop.keep_mask`
gives its mask. Without a seed, one is drawn from torch's generator, or taken from an active
:func:`tridrop.rng`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..base.arguments import given
from ..functional import dropout_add
from ..spec import elementwise as spec


class BiasDropoutAdd(Protocol):
    """The type of the function that :func:`get_bias_dropout_add` returns."""

    def __call__(
        self,
        x_with_bias: tuple[Tensor, Tensor | None],
        residual: Tensor,
        prob: float | Tensor,
        *,
        seed: int | Tensor | None = None,
    ) -> Tensor: ...


def _bias_dropout_add(
    x_with_bias: tuple[Tensor, Tensor | None],
    residual: Tensor,
    prob: float | Tensor,
    training: bool,
    seed: int | Tensor | None,
) -> Tensor:
    if not isinstance(x_with_bias, (tuple, list)) or len(x_with_bias) != 2:
        raise TypeError(f"{given(x_with_bias, 'x_with_bias')}; give the pair (x, bias)")
    x, bias = x_with_bias
    spec.check_input(x)
    if bias is not None:
        spec.check_input(bias, "bias")
    spec.check_probability(prob, "prob", tensor_allowed=True)
    spec.check_residual(residual, x.shape, x)
    if bias is not None and bias.dim() != 1:
        rows = range(bias.dim() - 1)
        if all(bias.shape[i] == 1 or bias.stride(i) == 0 for i in rows):
            bias = bias[(0,) * len(rows)]  # older callers pass an expanded vector
        else:
            x, bias = x.to(residual.dtype) + bias.to(residual.dtype), None
    return dropout_add(x, residual, prob, training, bias=bias, seed=seed)


def bias_dropout_add_fused_train(
    x_with_bias: tuple[Tensor, Tensor | None],
    residual: Tensor,
    prob: float | Tensor,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``residual + dropout(x + bias)``: the end of a branch in Megatron-LM's transformer layer.

    It is :func:`tridrop.dropout_add`. The result has the residual's dtype, so that a float32
    residual stream (``fp32_residual_connection``) stays float32 with a bfloat16 branch.

    Args:
        x_with_bias: the pair (x, bias), with x of any shape ``[..., H]``. The same kernel adds the
            bias if it is a vector ``[H]``, or an expanded one. torch adds any other bias before;
            None means no bias.
        residual: a tensor of x's shape.
        prob: the probability of dropping.
        seed: as in :func:`tridrop.dropout`. The mask is ``tridrop.keep_mask(seed, x.shape, prob)``.

    Returns:
        A new tensor. (Megatron-LM's own function may write the result into x in evaluation.)

    >>> import torch
    >>> x, bias, residual = torch.ones(1, 4), torch.ones(4), torch.full((1, 4), 10.0)
    >>> bias_dropout_add_fused_train((x, bias), residual, 0.5, seed=1)
    tensor([[14., 10., 14., 10.]])
    """
    return _bias_dropout_add(x_with_bias, residual, prob, True, seed)


def bias_dropout_add_fused_inference(
    x_with_bias: tuple[Tensor, Tensor | None],
    residual: Tensor,
    prob: float | Tensor,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``residual + x + bias``: :func:`bias_dropout_add_fused_train` without its dropout.

    >>> import torch
    >>> bias_dropout_add_fused_inference((torch.ones(2), None), torch.full((2,), 10.0), 0.5)
    tensor([11., 11.])
    """
    return _bias_dropout_add(x_with_bias, residual, prob, False, seed)


def bias_dropout_add_unfused(training: bool) -> BiasDropoutAdd:
    """One of the two functions above, by ``training``. In tridrop this one is fused as well."""
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """The function ``f((x, bias), residual, prob)`` of Megatron-LM's transformer layer.

    Use it in the specification of a layer, as ``self_attn_bda`` and ``mlp_bda`` of
    ``TransformerLayerSubmodules``.

    Args:
        training: whether f drops.
        fused: is ignored; f is always fused.

    >>> import torch
    >>> f = get_bias_dropout_add(training=True, fused=True)
    >>> f((torch.ones(1, 4), None), torch.full((1, 4), 10.0), 0.5, seed=1)
    tensor([[12., 10., 12., 10.]])
    """
    return bias_dropout_add_unfused(training)
