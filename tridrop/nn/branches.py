"""The branches of torch's transformer layers, with each dropout fused with the ops next to it.

With ``remake`` the linear layers keep no input that backward can make again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from .. import functional as F
from ..functional.linear import linear, remade_activation, remade_add_norm, remade_layer_norm
from ..spec import elementwise as spec


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks listen to calls of the module, which therefore must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of x, with a recipe if the norm is torch's: linear layers then do not keep it."""
    if type(norm) is nn.LayerNorm and not has_hooks(norm) and x.shape[-1:] == norm.normalized_shape:
        return remade_layer_norm(x, norm.weight, norm.bias, norm.eps)
    out: Tensor = norm(x)
    return out


def fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The activation's name in :func:`tridrop.activation_dropout`; None if it is not there."""
    if activation is relu or activation is torch.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None


def attend(
    attention: nn.Module,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    out: Tensor = attention(
        query, memory, memory,
        attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal,
    )[0]  # fmt: skip
    return out


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), without the bias of linear2."""
    drop, name = layer.dropout, fused_name(layer.activation)
    if name is None:
        hidden = drop(layer.activation(layer.linear1(x)))
    else:
        hidden = linear(x, layer.linear1.weight)
        function = remade_activation if layer.remake else F.activation_dropout
        hidden = function(
            hidden, drop.p, drop.training,
            activation=name, bias=layer.linear1.bias, seed=drop._seed(hidden),
        )  # fmt: skip
    return linear(hidden, layer.linear2.weight)


def add(x: Tensor, residual: Tensor, last: nn.Linear, drop: Any) -> Tensor:
    """The end of a pre-norm layer, whose ``last`` linear still lacks its bias."""
    return F.dropout_add(
        x, residual, drop.p, drop.training, bias=last.bias, seed=drop._seed(x)
    )  # fmt: skip


def add_norm(
    x: Tensor,
    residual: Tensor,
    drop: Any,
    norm: nn.LayerNorm,
    last: nn.Linear | None = None,
    *,
    remake: bool,
) -> Tensor:
    """The end of a post-norm branch, whose ``last`` linear still lacks its bias."""
    # The op's result has the branch's dtype. torch's result has the stream's dtype even under
    # autocast, where the branch is narrower, and on accelerators it is float32 then.
    dtype = residual.dtype
    if x.device.type != "cpu" and spec.autocast_dtype(x.device) is not None:
        dtype = torch.promote_types(dtype, torch.float32)
    x = x.to(dtype)
    operands = (x, residual, norm.weight, norm.bias, drop.p, drop.training)
    bias = None if last is None else last.bias
    options: dict[str, Any] = {"bias": bias, "eps": norm.eps, "seed": drop._seed(x)}
    if remake:
        return remade_add_norm(F.dropout_add_layer_norm, *operands, **options)[0]
    out = F.dropout_add_layer_norm(*operands, **options)
    assert isinstance(out, Tensor)  # no stream was asked for
    return out


def add_and_norm(
    x: Tensor, residual: Tensor, drop: Any, norm: nn.LayerNorm, *, remake: bool
) -> tuple[Tensor, Tensor]:
    """The end of a pre-norm branch, and the norm before the next branch: (normed, stream)."""
    operands = (x, residual, norm.weight, norm.bias, drop.p, drop.training)
    options: dict[str, Any] = {"eps": norm.eps, "seed": drop._seed(x)}
    if remake:
        return remade_add_norm(F.dropout_add_layer_norm, *operands, **options)
    out = F.dropout_add_layer_norm(*operands, prenorm=True, **options)
    assert isinstance(out, tuple)
    return out
