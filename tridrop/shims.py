"""Functions with the names, arguments and results of other libraries, on top of tridrop's ops.

- Of Megatron-LM, megatron/core/fusions/fused_bias_dropout.py: :func:`get_bias_dropout_add` and the
  functions that it returns.
- Of flash-attention, flash_attn/ops/triton/layer_norm.py: :func:`layer_norm_fn` and
  :func:`rms_norm_fn`.

Both as of August 2026. None of the libraries is needed, and none is changed: put a function where
the library's own was imported. Masks are tridrop's, so every call takes ``seed`` as well, by name,
and :func:`tridrop.keep_mask` gives the mask that it draws. Without a seed one is drawn from torch's
generator, or taken from an active :func:`tridrop.rng`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .base import arguments as spec_values
from .contract.mask import fold_in
from .contract.seeds import seed_for
from .functional import (
    dropout,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    keep_mask,
)
from .spec import elementwise as spec

__all__ = [
    "bias_dropout_add_fused_inference",
    "bias_dropout_add_fused_train",
    "bias_dropout_add_unfused",
    "get_bias_dropout_add",
    "layer_norm_fn",
    "rms_norm_fn",
]


class BiasDropoutAdd(Protocol):
    """What :func:`get_bias_dropout_add` returns."""

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
        raise TypeError(f"{spec_values.given(x_with_bias, 'x_with_bias')}; give the pair (x, bias)")
    x, bias = x_with_bias
    spec.check_input(x)
    if bias is not None:
        spec.check_input(bias, "bias")
    spec.check_probability(prob, "prob", tensor_allowed=True)
    spec.check_residual(residual, x.shape, x)
    if bias is not None and bias.dim() != 1:
        rows = range(bias.dim() - 1)
        if all(bias.shape[i] == 1 or bias.stride(i) == 0 for i in rows):
            bias = bias[(0,) * len(rows)]  # a vector, expanded: as older callers pass it
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
    residual stream (``fp32_residual_connection``) stays float32 beside a bfloat16 branch.

    Args:
        x_with_bias: the pair (x, bias): x of any shape ``[..., H]``; bias None or a vector ``[H]``,
            which is added in the same kernel. A bias that is no vector, and not one expanded, is
            added before, by torch.
        residual: of x's shape.
        prob: the probability of dropping.
        seed: as in :func:`tridrop.dropout`. The mask is ``tridrop.keep_mask(seed, x.shape, prob)``.

    Returns:
        A new tensor: Megatron-LM's own may write the result of an evaluation into x.

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

    >>> bias_dropout_add_fused_inference((torch.ones(2), None), torch.full((2,), 10.0), 0.5)
    tensor([11., 11.])
    """
    return _bias_dropout_add(x_with_bias, residual, prob, False, seed)


def bias_dropout_add_unfused(training: bool) -> BiasDropoutAdd:
    """The same two functions by ``training``; here "unfused" is fused as well."""
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """The function ``f((x, bias), residual, prob)`` of Megatron-LM's transformer layer.

    A layer's specification takes it in place of Megatron-LM's, as ``self_attn_bda`` and ``mlp_bda``
    of ``TransformerLayerSubmodules``.

    Args:
        training: whether f drops.
        fused: of no consequence; f is fused either way.

    >>> f = get_bias_dropout_add(training=True, fused=True)
    >>> f((torch.ones(1, 4), None), torch.full((1, 4), 10.0), 0.5, seed=1)
    tensor([[12., 10., 12., 10.]])
    """
    return bias_dropout_add_unfused(training)


def _copied(target: Tensor | None, name: str, value: Tensor) -> Tensor:
    """``value``, or the given tensor with it written in."""
    if target is None:
        return value
    if target.shape != value.shape:
        raise ValueError(
            f"{name} has shape {tuple(target.shape)}; it must be {tuple(value.shape)}, x's"
        )
    return target.copy_(value)


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float | Tensor = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """flash-attention's ``layer_norm_fn``: dropout, add and norm, in its argument order.

        stream = residual + dropout(rowscale * x) + dropout(x1)
        out  = norm(stream) * weight + bias
        out1 = norm(stream) * weight1 + bias1        with weight1 alone

    It is :func:`tridrop.dropout_add_layer_norm` (or ``dropout_add_rms_norm``), one kernel, unless
    rowscale, x1 or weight1 is given: each of these is one operation more.

    There is no ``training`` here: pass ``dropout_p=0.0`` in evaluation. Other than in
    flash-attention, the stream is rounded to its dtype before it is normalised, rowscale * x to
    x's, and residual + dropout(x1) to the stream's; rowscale has a gradient; a given residual_out
    is written.

    Args:
        x: the branch, ``[..., D]``.
        weight, bias, weight1, bias1: vectors of size D, or None.
        residual, x1: of x's shape, or None.
        eps: added to the variance.
        dropout_p: the probability of dropping an element of x, and of x1.
        rowscale: one factor per row, of ``x.shape[:-1]``; not with x1. Stochastic depth by rowscale
            is ``drop_path`` in :func:`tridrop.dropout_add_layer_norm`, without a tensor.
        prenorm: also return the stream. It has the residual's dtype, or without one float32 with
            ``residual_in_fp32``, else x's.
        zero_centered_weight: multiply by ``1 + weight``, ``1 + weight1``.
        is_rms_norm: RMSNorm instead of LayerNorm.
        return_dropout_mask: also return the masks of x and of x1, bool, of x's shape: None for
            dropout_p = 0, or without x1.
        out_dtype: the dtype of out and out1; x's by default.
        out, residual_out: tensors to copy out and the stream into; they are then what is returned,
            in their own dtypes.
        seed: as in :func:`tridrop.dropout`. x's mask is ``tridrop.keep_mask(seed, x.shape,
            dropout_p)``, x1's that of ``tridrop.fold_in(seed, 1)``.

    Returns:
        out alone, or the tuple (out, out1, stream, mask, mask1) without what was not asked for:
        out1 with weight1, stream with prenorm, both masks with return_dropout_mask.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout_add_layer_norm`; rowscale with x1, bias1
            without weight1, a tensor of another shape.

    >>> x, residual = torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.zeros(1, 4)
    >>> layer_norm_fn(x, torch.ones(4), None, residual)
    tensor([[-1.0690, -0.5345,  0.0000,  1.6036]])
    >>> out, stream, mask, _ = layer_norm_fn(
    ...     x, torch.ones(4), None, residual, dropout_p=0.5, prenorm=True,
    ...     return_dropout_mask=True, seed=1,
    ... )
    >>> stream, mask
    (tensor([[2., 0., 6., 0.]]), tensor([[ True, False,  True, False]]))
    """
    spec.check_input(x)
    spec.check_probability(dropout_p, "dropout_p", tensor_allowed=True)
    spec_values.check_flags(
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
        return_dropout_mask=return_dropout_mask,
    )  # fmt: skip
    for name, t in (("rowscale", rowscale), ("out", out), ("residual_out", residual_out)):
        if t is not None:
            spec_values.check_tensor(t, name)
            spec.check_device(t, name, x)
    if bias1 is not None and weight1 is None:
        raise ValueError("bias1 is given without weight1: give weight1, torch.ones(D) for none")
    if rowscale is not None:
        if x1 is not None:
            raise ValueError("rowscale is given with x1: multiply x and x1 by their factors before")
        if rowscale.numel() != x.shape[:-1].numel():
            raise ValueError(
                f"rowscale has shape {tuple(rowscale.shape)}; it must be {tuple(x.shape[:-1])}, a "
                "factor for each row of x"
            )
        x = (x * rowscale.reshape(*x.shape[:-1], 1)).to(x.dtype)
    drops = isinstance(dropout_p, Tensor) or dropout_p > 0
    drawn = seed_for(x.device, seed) if drops else None
    other = None if drawn is None else fold_in(drawn, 1)
    in_fp32 = residual_in_fp32 and residual is None  # a residual keeps its dtype

    stream = residual
    if x1 is not None:
        spec.check_residual(x1, x.shape, x, "x1")
        if residual is not None:
            stream = dropout_add(x1, residual, dropout_p, seed=other)
        else:
            dtype = torch.float32 if in_fp32 else x.dtype
            stream = dropout(x1, dropout_p, seed=other).to(dtype)
    norm = dropout_add_rms_norm if is_rms_norm else dropout_add_layer_norm
    wanted = out.dtype if out is not None else x.dtype if out_dtype is None else out_dtype
    keeps = prenorm or weight1 is not None or residual_out is not None
    first, *kept = _tuple(
        norm(
            x, stream, weight, bias, dropout_p, eps=eps, prenorm=keeps, residual_in_fp32=in_fp32,
            zero_centered_weight=zero_centered_weight, out_dtype=wanted, seed=drawn,
        )
    )  # fmt: skip
    results: list[Tensor | None] = [first]
    if weight1 is not None:
        results += _tuple(
            norm(
                kept[0], None, weight1, bias1, 0.0, eps=eps, out_dtype=wanted,
                zero_centered_weight=zero_centered_weight,
            )
        )  # fmt: skip
    # The given tensors last: they may be x or residual, which have been read by now.
    results[0] = _copied(out, "out", first)
    if keeps:
        given = _copied(residual_out, "residual_out", kept[0])
        results += [given] if prenorm else []
    if return_dropout_mask:
        seeds = (drawn, other if x1 is not None else None)
        results += [None if s is None else keep_mask(s, x.shape, dropout_p) for s in seeds]
    return results[0] if len(results) == 1 else tuple(results)  # type: ignore[return-value]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float | Tensor = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor | None, ...]:
    """flash-attention's ``rms_norm_fn``: :func:`layer_norm_fn` with ``is_rms_norm=True``.

    >>> rms_norm_fn(torch.tensor([[1.0, 7.0]]), torch.ones(2), None)
    tensor([[0.2000, 1.4000]])
    """
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, zero_centered_weight, True, return_dropout_mask, out_dtype, out,
        residual_out, seed=seed,
    )  # fmt: skip
