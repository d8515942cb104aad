"""The functions of flash-attention's flash_attn/ops/triton/layer_norm.py, as of August 2026.

Flash-attention is neither needed nor changed. Masks and ``seed`` are as in ``megatron.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import arguments as spec_values
from ..contract.mask import fold_in
from ..contract.seeds import seed_for
from ..functional import (
    dropout,
    dropout_add,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    keep_mask,
)
from ..spec import elementwise as spec


def _copied(target: Tensor | None, name: str, value: Tensor) -> Tensor:
    """``value``; or, if a target is given, the target after copying ``value`` into it."""
    if target is None:
        return value
    if target.shape != value.shape:
        raise ValueError(
            f"{name} has shape {tuple(target.shape)}; it must have x's shape, {tuple(value.shape)}"
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
        out1 = norm(stream) * weight1 + bias1        only if weight1 is given

    It calls :func:`tridrop.dropout_add_layer_norm` (or ``dropout_add_rms_norm``), which is one
    kernel. Each of rowscale, x1 and weight1 costs one more operation.

    There is no ``training``: pass ``dropout_p=0.0`` in evaluation. Unlike in flash-attention, the
    stream is rounded to its dtype before it is normalised, rowscale * x is rounded to x's dtype,
    and residual + dropout(x1) to the stream's; rowscale has a gradient; a given residual_out is
    always written.

    Args:
        x: the branch, ``[..., D]``.
        weight, bias, weight1, bias1: vectors of size D, or None.
        residual, x1: tensors of x's shape, or None.
        eps: is added to the variance.
        dropout_p: the probability of dropping an element of x, and of x1.
        rowscale: one factor per row, of shape ``x.shape[:-1]``; not with x1. For stochastic depth,
            ``drop_path`` in :func:`tridrop.dropout_add_layer_norm` needs no such tensor.
        prenorm: also return the stream. It has the residual's dtype. Without a residual it has
            float32 if ``residual_in_fp32``, else x's dtype.
        zero_centered_weight: multiply by ``1 + weight``, ``1 + weight1``.
        is_rms_norm: RMSNorm instead of LayerNorm.
        return_dropout_mask: also return the masks of x and of x1, as bool tensors of x's shape. A
            mask is None if dropout_p = 0, and that of x1 without x1.
        out_dtype: the dtype of out and out1; x's by default.
        out, residual_out: tensors into which out and the stream are copied. These are then
            returned, in their own dtypes.
        seed: as in :func:`tridrop.dropout`. x's mask is ``tridrop.keep_mask(seed, x.shape,
            dropout_p)``, x1's that of ``tridrop.fold_in(seed, 1)``.

    Returns:
        out, or a tuple of out and, in this order, out1 if weight1 is given, the stream if prenorm,
        and both masks if return_dropout_mask.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout_add_layer_norm`; also for rowscale with x1,
            bias1 without weight1, and a tensor with a wrong shape.

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
        raise ValueError(
            "bias1 is given without weight1: give weight1 too, torch.ones(D) if there is none"
        )
    if rowscale is not None:
        if x1 is not None:
            raise ValueError(
                "rowscale is given with x1: multiply x and x1 by their factors before the call"
            )
        if rowscale.numel() != x.shape[:-1].numel():
            raise ValueError(
                f"rowscale has shape {tuple(rowscale.shape)}; it must be {tuple(x.shape[:-1])}, "
                "one factor per row of x"
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
    # Copied last, since the given tensors may be x or residual, which must have been read before.
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
