"""Pending values, which are computed once it is clear what they can be fused with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import functional as F
from ..base.torch_private import FakeTensor, FunctionalTensor
from ..contract import seeds
from ..contract.mask import Shard, threshold
from ..contract.mask import scale as scale_of
from ..distributed.dtensor import is_distributed
from ..functional.linear import remade_activation, remade_dropout, remade_value
from ..spec.elementwise import FLOATS
from .kinds import Kind, activation_name


class Pending:
    """A branch of the residual stream that is not computed yet. The ops compute, in this order:

    residual + drop_path(scale * dropout(norm | softmax | activation(x + bias)))
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.bias: Tensor | None = None
        self.activation: str | None = None
        self.function: Callable[[Tensor], Tensor] | None = None  # the activation itself
        self.memory = False  # whether backward recomputes the activation
        self.norm: tuple[Kind, nn.Module] | None = None
        self.softmax: torch.dtype | None = None  # the dtype of its result
        self.p: float | Tensor = 0.0
        self.seed: Tensor | None = None
        self.dropped = False
        self.scale: Tensor | None = None
        self.path = 0.0
        self.residual: Tensor | None = None
        self.done: Tensor | None = None

    def finish(self, out: Tensor) -> None:
        """Keep the result, and drop the references to what it was computed from."""
        self.x = self.done = out
        self.bias = self.scale = self.residual = self.norm = self.function = None

    def drops(self) -> bool:
        """Whether anything is drawn for it."""
        return isinstance(self.p, Tensor) or self.p > 0 or self.path > 0


def value(x: Any) -> Any:
    """The tensor; a pending value is computed now."""
    if not isinstance(x, Pending):
        return x
    if x.done is None:
        x.finish(_compute(x))
    return x.done


def _compute(b: Pending) -> Tensor:
    residual = b.residual
    if b.norm is not None:
        return _norm_first(b)
    if b.softmax is not None:
        return _softmax(b)
    if b.function is not None and b.bias is None and not b.drops():
        return _finish(activated(b.function, b.x, b.memory), b)
    plain = b.bias is None and b.activation is None and b.scale is None
    if plain and not b.drops():
        return _finish(b.x, b)
    if residual is not None and addable(b, residual):
        return F.dropout_add(
            b.x, residual, b.p, True,
            bias=b.bias, activation=b.activation, layer_scale=b.scale, drop_path=b.path,
            seed=b.seed,
        )  # fmt: skip
    if b.bias is not None or b.activation is not None:
        function = remade_activation if b.memory else F.activation_dropout
        out = function(b.x, b.p, True, activation=b.activation, bias=b.bias, seed=b.seed)
    else:
        out = remade_dropout(b.x, b.p, b.seed)
    if b.scale is not None:
        out = out * b.scale
    return _finish(out, b)


# Activations whose backward in torch keeps their input. (That of relu keeps its result, which costs
# nothing, since the linear layer that follows keeps it too.)
_KEEPS_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
# Activations that libraries write out in Python, as up to eight operators, several of which keep a
# tensor for backward. One op computes them in training.
_WRITTEN_OUT = ("gelu_tanh", "quick_gelu")


def activated(function: Callable[[Tensor], Tensor], x: Tensor, memory: bool) -> Tensor:
    """An activation without a dropout, whose result backward can recompute if ``memory``."""
    name = activation_name(function)
    training = isinstance(function, nn.Module) and function.training
    if name in _WRITTEN_OUT and training and not is_compiling():
        one_op = remade_activation if memory else F.activation_dropout
        return one_op(x, 0.0, True, activation=name)
    recompute = _KEEPS_INPUT.get(name or "") if memory else None
    return function(x) if recompute is None else remade_value(function, x, recompute=recompute)


def _finish(out: Tensor, b: Pending) -> Tensor:
    """Drop samples and add the residual, after an op that does not do this itself."""
    if b.path:
        out = drop_samples(out, b.path, b.seed)
    return out if b.residual is None else b.residual + out


def _softmax(b: Pending) -> Tensor:
    """A softmax, computed in the wider dtype of scores and result, as torch does."""
    assert b.softmax is not None
    scores = b.x.to(promoted(b.x.dtype, b.softmax))
    if not b.drops():
        return torch.softmax(scores, -1).to(b.softmax)
    return F.softmax_dropout(scores, b.p, True, seed=b.seed).to(b.softmax)


def drop_samples(x: Tensor, p: float, seed: Tensor | None, scaled: bool = True) -> Tensor:
    """Drop samples with the mask that dropout_add draws. It is small, and is kept."""
    if seed is None:
        seed = seeds.seed_for(x.device, None)
    if not x.numel():
        return x
    if x.dim() > 1:
        origin = seeds.batch_origin(len(x)) if seeds.in_batch() else 0
        whole = Shard((origin + len(x), *x.shape[1:]), (origin, *(0,) * (x.dim() - 1)))
        first = (len(x), *(1,) * (x.dim() - 1))
        keep = F.keep_mask(seed, first, p, domain="drop_path", shard=whole)
    else:
        keep = F.keep_mask(seed, x.shape, p)
    gain = scale_of(threshold(p)) if scaled else 1.0
    return torch.where(keep, x * gain, torch.zeros((), dtype=x.dtype, device=x.device))


def promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """torch's promotion of two dtypes, which torch.export would record as an operator."""
    return one if one == other else torch.promote_types(one, other)


def addable(b: Pending, residual: Tensor) -> bool:
    """Whether one op can add the residual, with the dtype and shape that torch's addition gives."""
    return (
        fits(residual)
        and residual.shape == b.x.shape
        and residual.device == b.x.device
        and promoted(b.x.dtype, residual.dtype) == residual.dtype
        and (b.path == 0 or b.x.dim() > 1)
    )


def _norm_first(b: Pending) -> Tensor:
    assert b.norm is not None
    kind, module = b.norm
    if not b.drops():
        out: Tensor = module(b.x)
        return out if b.residual is None else b.residual + out
    fits = b.residual is None or (addable(b, b.residual) and b.residual.dtype == b.x.dtype)
    options: dict[str, Any] = {
        "eps": eps_of(kind, module, b.x),
        "zero_centered_weight": kind.zero_centered,
        "seed": b.seed,
    }
    if fits:
        options |= {"residual": b.residual, "drop_path": b.path}
    weight = kind.get(module, "weight")
    if kind.name == "rms_norm":
        out = F.rms_norm_dropout(b.x, weight, b.p, True, **options)
    else:
        out = F.layer_norm_dropout(b.x, weight, kind.get(module, "bias"), b.p, True, **options)
    return out if fits else _finish(out, b)


def eps_of(kind: Kind, module: nn.Module, stream: Tensor) -> float:
    """The epsilon of a norm. By default torch's RMSNorm takes that of the dtype."""
    eps = kind.eps if kind.eps is not None else kind.get(module, "eps")
    return float(torch.finfo(stream.dtype).eps if eps is None else eps)


def normalises_last(kind: Kind, module: nn.Module, stream: Tensor) -> bool:
    """Whether a norm is over the last dimension only, in the dtype of the residual stream."""
    weight = kind.get(module, "weight")
    shape = getattr(module, "normalized_shape", None)
    if weight is None and shape is None:
        return False
    sizes = tuple(shape) if shape is not None else tuple(weight.shape)
    if sizes != tuple(stream.shape[-1:]):
        return False
    if weight is None or weight.dtype == stream.dtype:
        return True
    return kind.name == "layer_norm" and autocasts(stream)


def autocasts(x: Tensor) -> bool:
    """Whether autocast makes torch's norms and softmaxes compute and return float32."""
    device_type = x.device.type
    return device_type not in ("cpu", "meta") and torch.is_autocast_enabled(device_type)


# torch's own tensors, and those that stand for them under torch.export.
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def fits(x: Any) -> bool:
    """Whether the ops take a value: a tensor of torch, not of a subclass with another behaviour."""
    plain = type(x) in _PLAIN_TENSORS or is_distributed(x)
    return plain and x.dtype in FLOATS and not x.is_nested and x.dim() > 0
