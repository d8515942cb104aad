"""Dropout, add and norm, in both orders, for LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, ops
from ..base import arguments as spec_values
from ..ops import FusedNorm, apply
from ..spec import elementwise as spec
from ..spec.elementwise import NormOptions
from ..spec.operands import Norm
from . import known
from .elementwise import ShardLike, distinct, rated, settle

_FAMILY = known.Family("norm", FusedNorm, ops.pack_norm, Norm)


def _fused_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    p: float | Tensor,
    training: bool,
    *,
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path: float,
    noise_shape: Sequence[int | None] | None,
    shard: ShardLike | None,
    seed: int | Tensor | None,
    norm: str,
    eps: float | None,
    zero_centered: bool,
    after: bool,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The checked call: (out, stream)."""
    operands = (x, bias, layer_scale, residual, weight, norm_bias)
    # Backward reads the stream; where there is no backward, only the next block does.
    keep_stream = prenorm is True or torch.is_grad_enabled()
    key = None
    numbers = type(drop_path) is float and (eps is None or type(eps) is float)
    if (
        numbers
        and (training is True or training is False)
        and (prenorm is False or prenorm is True)
        and (residual_in_fp32 is False or residual_in_fp32 is True)
        and (zero_centered is False or zero_centered is True)
    ):
        choices = (training, zero_centered, keep_stream, residual_in_fp32)
        settings = (norm, after, drop_path, eps, out_dtype, choices)
        key = known.key_of(settings, p, noise_shape, shard, *operands)
    found = known.recall(key)
    if found is not None:
        return known.call(_FAMILY, found, seed, *operands)[:2]
    spec.check_input(x)
    spec_values.check_flag(prenorm, "prenorm")
    spec_values.check_flag(residual_in_fp32, "residual_in_fp32")
    spec_values.check_flag(zero_centered, "zero_centered_weight")
    if x.dim() == 0:
        raise ValueError("x has no dimension to normalise over: give it one or more")
    if residual is not None:
        spec.check_residual(residual, x.shape, x)
    vectors = {"weight": weight, "norm_bias": norm_bias, "bias": bias, "layer_scale": layer_scale}
    for name, vector in vectors.items():
        spec.check_vector(vector, name, x.shape[-1], x)
    spec.check_probability(p, tensor_allowed=True)
    spec.check_drop_path(drop_path, x.shape)
    where = spec.resolve_shard(shard, x.shape)
    if where is not None and where.global_shape[-1] != x.shape[-1]:
        raise ValueError(
            f"shard cuts the last dimension ({x.shape[-1]} of {where.global_shape[-1]}), which the "
            "norm needs whole: split another dimension"
        )
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    eps = spec.check_eps(eps)
    stream_dtype = x.dtype if residual is None else residual.dtype
    if out_dtype is None:
        out_dtype = stream_dtype if after else x.dtype
    else:
        spec.check_out_dtype(out_dtype, x, residual, *vectors.values())
    options = NormOptions(
        drop_path=float(drop_path),
        shared=spec.resolve_noise_shape(noise_shape, x.shape),
        shard=where,
        norm=norm,
        eps=eps,
        zero_centered=zero_centered,
        after=after,
        keep_stream=keep_stream,
        stream_dtype=torch.float32 if residual_in_fp32 else stream_dtype,
        out_dtype=out_dtype,
    )
    if key is not None:
        options, _, drops = rated(p, training, options)
        found = known.learn(_FAMILY, key, tuple(x.shape), options, drops, *operands)
        return known.call(_FAMILY, found, seed, *operands)[:2]
    options, p_tensor, drawn = settle(x, p, training, seed, options)
    packed = ops.pack_norm(options, backends.name_for(x.device))
    results: tuple[Tensor, ...] = apply(FusedNorm, *distinct(*operands), drawn, p_tensor, packed)
    return results[0], results[1]


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path: float = 0.0,
    eps: float | None = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The end of a residual branch and the norm that follows it, in one kernel.

        stream = residual + drop_path(layer_scale * dropout(x + bias))
        out = (stream - mean) / sqrt(var + eps) * weight + norm_bias

    over the last dimension (Ba, Kiros, Hinton, "Layer normalization", 2016). ``stream`` is rounded
    to its dtype before it is normalised. Backward keeps the stream, two numbers per row and the
    seed, but neither a mask nor a normalised copy.

    Args:
        x: the branch, ``[..., D]``, of any strides.
        residual: of x's shape, or None for none.
        weight, norm_bias: vectors of size D, or None.
        p, training, noise_shape, shard, seed: as in :func:`tridrop.dropout`. A shard may not cut
            the last dimension.
        bias, layer_scale, drop_path: as in :func:`tridrop.dropout_add`.
        eps: added to the variance; None for the machine epsilon of x's dtype.
        prenorm: return (out, stream), for blocks whose residual goes around the norm.
        residual_in_fp32: make the stream float32 whatever the dtypes of x and the residual.
        zero_centered_weight: multiply by ``1 + weight``.
        out_dtype: the dtype of out, x's by default. The values are the same, rounded once; the
            dtypes of the stream and the gradients do not change.

    Returns:
        out, of x's dtype or ``out_dtype``; with ``prenorm`` also the stream, of the residual's
        dtype (x's without a residual, float32 with ``residual_in_fp32``). The dtypes of the vectors
        do not matter. It is computed in fp32, or in fp64 if an operand is fp64.

    Raises:
        ValueError, TypeError: operands whose shape, dtype or device does not fit; an ``out_dtype``
            that is not floating-point, or wider than the arithmetic; p, drop_path, eps,
            noise_shape or shard as in :func:`tridrop.dropout_add`.

    >>> x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> dropout_add_layer_norm(x, None, None, None, p=0.0)
    tensor([[-1.0690, -0.5345,  0.0000,  1.6036]])
    """
    out, stream = _fused_norm(
        x, residual, weight, norm_bias, p, training,
        bias=bias, layer_scale=layer_scale, drop_path=drop_path, noise_shape=noise_shape,
        shard=shard, seed=seed, norm="layer_norm", eps=eps, zero_centered=zero_centered_weight,
        after=False, prenorm=prenorm, residual_in_fp32=residual_in_fp32, out_dtype=out_dtype,
    )  # fmt: skip
    return (out, stream) if prenorm else out


def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path: float = 0.0,
    eps: float | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dropout_add_layer_norm` with RMSNorm (Zhang, Sennrich, 2019).

        out = stream / sqrt(mean(stream^2) + eps) * weight + norm_bias

    ``eps`` None, the default as in torch.nn.RMSNorm, stands for the machine epsilon of x's dtype.

    >>> x = torch.tensor([[1.0, 7.0]])
    >>> dropout_add_rms_norm(x, None, None, p=0.0)
    tensor([[0.2000, 1.4000]])
    """
    out, stream = _fused_norm(
        x, residual, weight, norm_bias, p, training,
        bias=bias, layer_scale=layer_scale, drop_path=drop_path, noise_shape=noise_shape,
        shard=shard, seed=seed, norm="rms_norm", eps=eps, zero_centered=zero_centered_weight,
        after=False, prenorm=prenorm, residual_in_fp32=residual_in_fp32, out_dtype=out_dtype,
    )  # fmt: skip
    return (out, stream) if prenorm else out


def layer_norm_dropout(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    drop_path: float = 0.0,
    eps: float | None = 1e-5,
    zero_centered_weight: bool = False,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``residual + drop_path(dropout(layer_norm(x)))``: the norm comes first.

    Without a residual this is the end of an embedding; with one, the sandwich order of T5Gemma and
    others. Arguments are as in :func:`dropout_add_layer_norm`. The result has the residual's dtype,
    or x's without a residual. Backward keeps x, two numbers per row and the seed.

    >>> x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> layer_norm_dropout(x, None, None, 0.5, seed=1)
    tensor([[-2.1381,  0.0000,  0.0000,  0.0000]])
    """
    out, _ = _fused_norm(
        x, residual, weight, norm_bias, p, training,
        drop_path=drop_path, noise_shape=noise_shape, shard=shard, seed=seed, norm="layer_norm",
        eps=eps, zero_centered=zero_centered_weight, after=True,
    )  # fmt: skip
    return out


def rms_norm_dropout(
    x: Tensor,
    weight: Tensor | None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    drop_path: float = 0.0,
    eps: float | None = None,
    zero_centered_weight: bool = False,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``residual + drop_path(dropout(rms_norm(x)))``; see :func:`layer_norm_dropout`.

    >>> rms_norm_dropout(torch.tensor([[1.0, 7.0]]), None, 0.5, seed=1)
    tensor([[0.4000, 0.0000]])
    """
    out, _ = _fused_norm(
        x, residual, weight, None, p, training,
        drop_path=drop_path, noise_shape=noise_shape, shard=shard, seed=seed, norm="rms_norm",
        eps=eps, zero_centered=zero_centered_weight, after=True,
    )  # fmt: skip
    return out
