"""The elementwise family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import backends, ops
from ..base import arguments as spec_values
from ..contract import seeds
from ..contract.mask import Shard
from ..contract.seeds import seed_for
from ..distributed import agree
from ..distributed.dtensor import is_dtensor
from ..ops import Fused, apply
from ..spec import elementwise as spec
from ..spec.elementwise import Options
from ..spec.operands import Elementwise
from . import known

ShardLike = Shard | tuple[Sequence[int], Sequence[int]]

_FAMILY = known.Family("elementwise", Fused, ops.pack, Elementwise)

_O = TypeVar("_O", bound=Options)


def in_batch(shape: Sequence[int], shard: Shard | None = None, dim: int | None = 0) -> Shard | None:
    """The shard of a tensor of ``shape`` whose samples may be a slice of a batch.

    ``dim`` is the dimension of the samples, or None for a tensor without samples, such as a weight.
    """
    if shard is not None or not shape or not seeds.in_batch():
        return shard
    origin, whole = [0] * len(shape), list(shape)
    if dim is not None:
        origin[dim] = seeds.batch_origin(shape[dim])
        whole[dim] += origin[dim]
    return Shard(tuple(whole), tuple(origin))


def seed_of(x: Tensor, seed: int | Tensor | None) -> Tensor:
    """The seed of a call on ``x``. Processes that share a DTensor agree on a drawn seed."""
    drawn = seed_for(x.device, seed)
    if seed is None and is_dtensor(x) and not seeds.active():
        return agree(drawn, x.device_mesh)  # type: ignore[attr-defined]
    return drawn


def rated(p: float | Tensor, training: bool, options: _O) -> tuple[_O, Tensor | None, bool]:
    """(the options with their rates, p if it is a tensor, whether anything is dropped)."""
    spec_values.check_flag(training, "training")
    if not training:
        return replace(options, drop_path=0.0), None, False
    if isinstance(p, Tensor):
        return options, p, True
    options = replace(options, p=float(p))
    return options, None, options.p > 0 or options.drop_path > 0


def settle(
    x: Tensor, p: float | Tensor, training: bool, seed: int | Tensor | None, options: _O
) -> tuple[_O, Tensor | None, Tensor | None]:
    """(the options with their rates, p if it is a tensor, the seed if anything is dropped)."""
    spec.check_rate(p, x.device)
    options, p_tensor, drops = rated(p, training, options)
    if not drops:
        return options, p_tensor, None
    if seeds.in_batch():
        shape = spec.output_shape(x, options.activation)
        options = replace(options, shard=in_batch(shape, options.shard))
    return options, p_tensor, seed_of(x, seed)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with views of repeated ones: Dynamo does not take a tensor twice in one call."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    found: list[Tensor | None] = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in found)
        found.append(t.view_as(t) if repeated and t is not None else t)
    return found


def fused(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    p: float | Tensor,
    training: bool,
    seed: int | Tensor | None,
    options: Options,
    key: known.Key | None = None,
) -> Tensor:
    """The call after its checks; ``options`` holds everything but p, which may be a tensor.

    ``key`` is the call's key, or None where the call cannot become a known one.
    """
    spec.check_vector(bias, "bias", x.shape[-1] if x.dim() else 1, x)
    operands = (x, bias, layer_scale, residual)
    out: Tensor
    if key is not None:
        options, _, drops = rated(p, training, options)
        shape = spec.output_shape(x, options.activation)
        found = known.learn(_FAMILY, key, shape, options, drops, *operands)
        out = known.call(_FAMILY, found, seed, *operands)
        return out
    options, p_tensor, drawn = settle(x, p, training, seed, options)
    packed = ops.pack(options, backends.name_for(x.device))
    out = apply(Fused, *distinct(*operands), drawn, p_tensor, packed)
    return out


def dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero elements of ``x`` with probability ``p`` and scale the others to keep its expectation.

        out = where(keep, x * scale, 0),    scale = 1 / (1 - p)

    with p rounded to a multiple of 2^-32 and ``scale`` the reciprocal of that exact keep rate
    (Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR
    2014). Backward draws the mask again and stores none.

    Args:
        x: any shape and strides; float16, bfloat16, float32, or float64 (reference backend).
        p: the probability of dropping, in [0, 1]. Give schedules a 0-d floating-point tensor: a new
            value in it causes neither recompilation nor synchronisation. On an accelerator the
            value cannot be checked; a value outside [0, 1] makes the result NaN.
        training: False returns ``x`` itself, as p = 0 does, and draws nothing.
        noise_shape: as in Keras and TensorFlow: for each dimension its size (or None), or 1 for one
            decision shared along it. ``(B, 1, C)`` drops whole channels of ``[B, T, C]``;
            ``(B, 1, 1)`` is stochastic depth.
        shard: where ``x`` lies in a larger tensor: ``tridrop.Shard(global_shape, origin)``. The
            masks of the shards are then pieces of the larger tensor's mask.
        seed: an int or a seed tensor fixes the mask. None takes a seed from an active
            :func:`tridrop.rng`, or else draws one from torch's generator of x's device.

    Returns:
        A tensor of x's shape and dtype. Its strides are those of torch's dropout, which are x's if
        x is dense (channels last stays channels last). A dropped element is exactly 0, even where x
        is NaN or infinite.

    Raises:
        ValueError: p outside [0, 1], a noise_shape or shard that does not fit x.
        TypeError: x of another dtype, p or seed of another type.

    >>> import torch
    >>> dropout(torch.ones(8), 0.5, seed=1)
    tensor([2., 0., 2., 0., 2., 0., 2., 2.])
    >>> dropout(torch.ones(2, 4), 0.5, noise_shape=(2, 1), seed=3)
    tensor([[2., 2., 2., 2.],
            [0., 0., 0., 0.]])
    """
    key = known.key_of(("dropout",), p, noise_shape, shard, x) if training is True else None
    found = known.recall(key)
    if found is not None:
        return known.call(_FAMILY, found, seed, x, None, None, None)
    spec.check_probability(p, tensor_allowed=True)
    drops = spec.drops(p, training)
    if not drops and isinstance(x, Tensor) and x.is_nested:
        return x
    spec.check_input(x)
    shared = spec.resolve_noise_shape(noise_shape, x.shape)
    where = spec.resolve_shard(shard, x.shape)
    if not drops:
        return x
    options = Options(shared=shared, shard=where)
    return fused(x, None, None, None, p, True, seed, options, key)


def activation_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    activation: str | None,
    bias: Tensor | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``dropout(f(x + bias))`` in one kernel: the middle of a transformer's feed-forward part.

    Gated activations (Dauphin et al. 2017; Shazeer, "GLU variants improve transformer", 2020) halve
    the last dimension, ``[..., 2 * D] -> [..., D]``:

        a, b = (x + bias).chunk(2, dim=-1);    out = dropout(f(a) * b)

    The activation is on the first half, as in Megatron-LM, Transformer Engine, vLLM and
    transformers' fused ``gate_up_proj``; torch.nn.functional.glu has it on the second.

    Args:
        x: any shape and strides; float16, bfloat16, float32, or float64 (reference backend).
        p: the probability of dropping, as in :func:`dropout`.
        training: False stands for p = 0.
        activation: None, or a name in ``tridrop.spec.elementwise.ACTIVATIONS``, which says of each
            whether it is gated: for instance "gelu" (exact), "gelu_tanh", and gated "swiglu".
        bias: a vector of x's last size, of any floating-point dtype.
        noise_shape, shard, seed: as in :func:`dropout`, for the shape of the result.

    Returns:
        A tensor of x's dtype, whose dimensions lie in memory in x's order. It is computed in fp32
        and rounded once.

    Raises:
        ValueError, TypeError: as :func:`dropout`; a bias of another shape, an unknown activation,
            an odd last size for a gated one.

    >>> import torch
    >>> x = torch.tensor([-1.0, 1.0, 2.0, 3.0])
    >>> activation_dropout(x, 0.5, activation="relu", seed=1)
    tensor([0., 0., 4., 0.])
    """
    key = None
    if type(training) is bool:
        settings = ("activation_dropout", training, activation)
        key = known.key_of(settings, p, noise_shape, shard, x, bias)
    found = known.recall(key)
    if found is not None:
        return known.call(_FAMILY, found, seed, x, bias, None, None)
    spec.check_input(x)
    spec.check_probability(p, tensor_allowed=True)
    name = spec.check_activation(activation)
    shape = spec.output_shape(x, name)
    shared = spec.resolve_noise_shape(noise_shape, shape)
    where = spec.resolve_shard(shard, shape)
    options = Options(name, shared=shared, shard=where)
    return fused(x, bias, None, None, p, training, seed, options, key)


def _by_sample(gate: Tensor) -> Tensor:
    """[B, 1, ..., C] as [B, C], which is one layer_scale per sample to the backends."""
    return gate if gate.dim() < 3 else gate.flatten(0, -2)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    gate: Tensor | None = None,
    drop_path: float = 0.0,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The end of a residual branch in one kernel.

        out = residual + drop_path(layer_scale * dropout(f(x + bias)))

    ``drop_path`` is stochastic depth (Huang et al. 2016): it drops a whole sample, an index of the
    first dimension, with that probability and scales the others by the reciprocal of the keep
    rate. ``layer_scale`` is one gain per channel (Touvron et al., CaiT, 2021). The two masks share
    the seed and are independent.

    ``gate`` is one gain per sample and channel, in the place of ``layer_scale``. It gives the gated
    residual ``residual + gate * dropout(x)`` of diffusion transformers, which compute the gate from
    the conditioning (adaLN-Zero: Peebles and Xie, "Scalable diffusion models with transformers",
    2023). Its gradient is a sum over the dimensions between samples and channels, in fp32 and in an
    order that depends on sizes alone.

    Args:
        x: the branch, any shape and strides.
        residual: of the result's shape (x's, or half as wide for a gated activation). It may have
            another dtype than x; the result has the residual's, so that an fp32 stream stays fp32.
        p: the probability of dropping an element, as in :func:`dropout`.
        training: False stands for p = 0 and drop_path = 0.
        bias: a vector of x's last size. ``layer_scale``: a vector of the result's last size.
        gate: for a result of shape [B, ..., C], [B, C] or [B, 1, ..., C]; any floating-point dtype.
            On a CPU a call with a gate is computed by torch's operators, not by compiled loops.
        activation: as in :func:`activation_dropout`.
        drop_path: the probability of dropping a sample, in [0, 1]; x needs two dimensions or more.
        noise_shape, shard, seed: as in :func:`dropout`, for the shape of the result.

    Returns:
        A tensor of the residual's dtype with the strides of torch's ``residual + branch``, computed
        in fp32 and rounded once. The residual's gradient is the incoming gradient itself, which
        takes no kernel.

    Raises:
        ValueError, TypeError: as :func:`activation_dropout`; a residual or gate of another shape or
            device, a gate beside a layer_scale.

    >>> import torch
    >>> dropout_add(torch.ones(4), torch.full((4,), 10.0), 0.5, seed=1)
    tensor([12., 10., 12., 10.])
    >>> gate = torch.tensor([[0.0], [5.0]])
    >>> dropout_add(torch.ones(2, 3, 1), torch.ones(2, 3, 1), 0.5, gate=gate, seed=1)[..., 0]
    tensor([[ 1.,  1.,  1.],
            [11., 11.,  1.]])
    """
    key, gain = None, layer_scale
    if type(drop_path) is float and type(training) is bool:
        settings = ("dropout_add", training, activation, drop_path)
        key = known.key_of(settings, p, noise_shape, shard, x, residual, bias, layer_scale, gate)
        if gate is not None and key is not None:
            gain = _by_sample(gate)
    found = known.recall(key)
    if found is not None:
        return known.call(_FAMILY, found, seed, x, bias, gain, residual)
    spec.check_input(x)
    spec.check_probability(p, tensor_allowed=True)
    name = spec.check_activation(activation)
    shape = spec.output_shape(x, name)
    spec.check_residual(residual, shape, x)
    spec.check_drop_path(drop_path, shape)
    spec.check_vector(layer_scale, "layer_scale", shape[-1] if shape else 1, x)
    if gate is not None:
        spec.check_gate(gate, shape, x)
        if layer_scale is not None:
            raise ValueError("gate and layer_scale are both given: give gate=gate * layer_scale")
        gain = _by_sample(gate)
    shared = spec.resolve_noise_shape(noise_shape, shape)
    where = spec.resolve_shard(shard, shape)
    options = Options(name, drop_path=float(drop_path), shared=shared, shard=where)
    return fused(x, bias, gain, residual, p, training, seed, options, key)
