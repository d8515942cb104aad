"""Values that wait until it is known what they can be fused with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    """One branch on its way into the residual stream, in the order in which the ops compute it:

    residual + drop_path(scale * dropout(norm | softmax | activation(x + bias)))
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.bias: Tensor | None = None
        self.activation: str | None = None
        self.function: Callable[[Tensor], Tensor] | None = None  # of which that is the name
        self.memory = False  # whether the activation is to be made again in backward
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
        """Keep the value, and nothing that it was made of."""
        self.x = self.done = out
        self.bias = self.scale = self.residual = self.norm = self.function = None

    def drops(self) -> bool:
        """Whether anything is drawn for it."""
        return isinstance(self.p, Tensor) or self.p > 0 or self.path > 0


def value(x: Any) -> Any:
    """The tensor, computed now if it was waiting."""
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
        return _finish(activated(b.function, b.x) if b.memory else b.function(b.x), b)
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


# Activations whose backward in torch keeps what they are given. (That of relu keeps its result,
# which costs nothing beside a linear layer that keeps it too.)
_KEEPS_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def activated(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An activation without a dropout, with the rule to make it again.

    One that a library writes out in Python keeps several tensors: in its place is one op.
    """
    name = activation_name(function)
    again = _KEEPS_INPUT.get(name or "")
    training = isinstance(function, nn.Module) and function.training
    if name == "gelu_tanh" and training and again is not None:
        function = again
    elif name == "quick_gelu" and training:
        return remade_activation(x, 0.0, True, activation=name)
    return function(x) if again is None else remade_value(function, x, recompute=again)


def _finish(out: Tensor, b: Pending) -> Tensor:
    """What is left to do behind an op that does not do it: samples dropped, the residual added."""
    if b.path:
        out = drop_samples(out, b.path, b.seed)
    return out if b.residual is None else b.residual + out


def _softmax(b: Pending) -> Tensor:
    """In the wider of the dtypes of scores and result, as torch computes it."""
    assert b.softmax is not None
    scores = b.x.to(promoted(b.x.dtype, b.softmax))
    if not b.drops():
        return torch.softmax(scores, -1).to(b.softmax)
    return F.softmax_dropout(scores, b.p, True, seed=b.seed).to(b.softmax)


def drop_samples(x: Tensor, p: float, seed: Tensor | None, scaled: bool = True) -> Tensor:
    """Samples dropped with the mask that dropout_add draws for them, which is kept: it is small."""
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
    """Whether one op adds it, with the dtype and shape that torch's addition has."""
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
    """A norm's epsilon; torch's RMSNorm takes that of the dtype by default."""
    eps = kind.eps if kind.eps is not None else kind.get(module, "eps")
    return float(torch.finfo(stream.dtype).eps if eps is None else eps)


def normalises_last(kind: Kind, module: nn.Module, stream: Tensor) -> bool:
    """Whether a norm is over the last dimension, in the stream's dtype."""
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
    kind = x.device.type
    return kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind)


# Tensors of torch's own, and those by which torch.export stands for them.
_OWN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def fits(x: Any) -> bool:
    """Whether the ops take it: a tensor of torch's own, not of a subclass that does more."""
    known = type(x) in _OWN or is_distributed(x)
    return known and x.dtype in FLOATS and not x.is_nested and x.dim() > 0
