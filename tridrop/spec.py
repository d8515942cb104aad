"""What an op may be asked for, and every error message about it.

Nothing here computes on data. Public functions call the ``check_*`` and ``resolve_*`` functions
before they draw a seed; the result of the checks is an :class:`Options`, which both backends take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.fx import Proxy

from . import noise
from .mask import Shard, scale, threshold

# name -> (the function of one argument, whether the input holds two halves: f(first) * second)
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "none": ("none", False),
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
}

# The contract's coordinates of attention, and how many of each there are.
ATTENTION_LIMITS = {"batch": 1 << 32, "head": 1 << 28, "query": 1 << 32, "key": 1 << 35}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """The options of one call of the elementwise family, after validation.

    ``shared`` lists the dimensions along which the mask of the elements is shared; ``p`` and
    ``drop_path`` are drop probabilities in [0, 1]; ``noise`` is one of ``noise.KINDS``.
    """

    activation: str = "none"
    p: float = 0.0
    drop_path: float = 0.0
    shared: tuple[int, ...] = ()
    shard: Shard | None = None
    noise: str = "mask"

    @property
    def function(self) -> str:
        """The activation as a function of one argument."""
        return ACTIVATIONS[self.activation][0]

    @property
    def gated(self) -> bool:
        """Whether the input's last dimension holds two halves: ``function(first) * second``."""
        return ACTIVATIONS[self.activation][1]

    def thresholds(self) -> tuple[int, int]:
        """The thresholds of the element mask and of the drop_path mask; 0 means there is none."""
        return threshold(self.p), threshold(self.drop_path)

    def scales(self) -> tuple[float, float]:
        """What the kept elements and the kept samples are multiplied by; see ``noise.scale``."""
        elements, path = self.thresholds()
        return noise.scale(self.noise, elements), scale(path)


@dataclass(frozen=True)
class NormOptions(Options):
    """The options of one call of the norm family. ``activation`` is always "none".

    ``after`` is whether the dropout follows the norm, residual + dropout(norm(x)), or goes before
    it, norm(residual + dropout(x)); ``keep_stream`` whether the stream is returned or saved.
    """

    norm: str = "layer_norm"
    eps: float = 1e-5
    zero_centered: bool = False
    after: bool = False
    keep_stream: bool = True
    stream_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts operands on ``device`` to; None where it is off.

    Asked by the device's type and not by torch.amp.is_autocast_available, which torch.compile
    cannot trace before torch 2.13: of the devices that run anything, only meta has no autocast.
    """
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_probability(p: float | Tensor, name: str = "p", *, tensor_allowed: bool = False) -> None:
    """Raise unless ``p`` is a probability: a number in [0, 1] or, where allowed, a 0-d tensor."""
    if isinstance(p, Tensor):
        if not tensor_allowed:
            raise TypeError(f"{name} is a tensor; give a Python number")
        if p.dim() != 0 or not p.is_floating_point():
            raise TypeError(
                f"{name} is a tensor of dtype {p.dtype} and shape {tuple(p.shape)}; "
                "a tensor p is 0-d and floating-point, such as torch.tensor(0.1)"
            )
        if p.requires_grad:
            raise ValueError(
                f"{name} requires grad, but dropout has no gradient for its rate: "
                f"pass {name}.detach()"
            )
        return
    # The first two before Real, which NumPy's numbers are, and which takes longer to ask.
    if isinstance(p, bool) or not isinstance(p, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is {p!r} of type {type(p).__name__}; give a number in [0, 1]")
    if not 0 <= p <= 1:  # also true for NaN
        raise ValueError(f"{name} = {p}; the probability of dropping must lie in [0, 1]")


def check_training(training: bool) -> None:
    """Raise unless ``training`` is True or False, as torch does."""
    if training is not True and training is not False:
        raise TypeError(
            f"training is {training!r} of type {type(training).__name__}; give True or False"
        )


def drops(p: float | Tensor, training: bool) -> bool:
    """Whether a call with a checked ``p`` drops anything; it draws a seed just then."""
    check_training(training)
    return training and (isinstance(p, Tensor) or p > 0)


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise unless ``x`` is a tensor of a supported floating-point dtype."""
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):
            raise TypeError(
                f"{name} is a torch.fx.Proxy: torch.fx.symbolic_trace cannot look into this call. "
                "Trace the model as it was before the swap, after tridrop.unswap(model), or with a "
                "torch.fx.Tracer whose is_leaf_module keeps the module that makes the call whole"
            )
        raise TypeError(f"{name} is of type {type(x).__name__}; give a torch.Tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, whose elements have no coordinates in one mask: pad it "
            f"with torch.nested.to_padded_tensor({name}, 0.0), or give its values, "
            f"torch.cat({name}.unbind())"
        )
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; dropout scales by 1 / (1 - p) and needs "
            f"float16, bfloat16, float32 or float64: use {name}.float()"
        )


def check_vector(v: Tensor | None, name: str, size: int, x: Tensor) -> None:
    """Raise unless ``v`` is None or a floating-point vector of ``size`` on the device of x."""
    if v is None:
        return
    check_input(v, name)
    if tuple(v.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(v.shape)}; it must be ({size},)")
    check_device(v, name, x)


def check_device(v: Tensor, name: str, x: Tensor) -> None:
    """Raise unless ``v`` is on the device of ``x``."""
    if v.device != x.device:
        raise ValueError(f"{name} is on {v.device} but x is on {x.device}: move one of them")


def check_residual(
    residual: Tensor, shape: Sequence[int], x: Tensor, name: str = "residual"
) -> None:
    """Raise unless ``residual`` is a floating-point tensor of ``shape`` on the device of x."""
    check_input(residual, name)
    check_device(residual, name, x)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(residual.shape)}; it must be {tuple(shape)}, the shape of "
            "the branch: expand it first"
        )


def check_out_dtype(dtype: torch.dtype, *operands: Tensor | None) -> None:
    """Raise unless ``dtype`` is one that a result computed from these operands can have."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"out_dtype is {dtype!r} of type {type(dtype).__name__}; give a torch.dtype"
        )
    if dtype not in FLOATS:
        raise ValueError(
            f"out_dtype = {dtype}; give float16, bfloat16, float32, float64, or None for x's dtype"
        )
    if dtype == torch.float64 and not any(
        t is not None and t.dtype == torch.float64 for t in operands
    ):
        raise ValueError(
            "out_dtype = torch.float64, but no operand is: the result is computed in float32. "
            "Call x.double() before, or .double() on the result"
        )


def check_drop_path(drop_path: float, shape: Sequence[int]) -> None:
    """Raise unless ``drop_path`` is a probability, and 0 where there are no samples to drop."""
    check_probability(drop_path, "drop_path")
    if drop_path and len(shape) < 2:
        raise ValueError(
            f"drop_path = {drop_path} drops samples, the first dimension, but x has shape "
            f"{tuple(shape)}: give it two dimensions or more"
        )


def check_activation(activation: str | None) -> str:
    """The name of the activation, "none" for None; ValueError for an unknown one."""
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; known: None, {', '.join(ACTIVATIONS)}")
    return activation


def output_shape(x: Tensor, activation: str) -> tuple[int, ...]:
    """The shape of ``activation(x)``; ValueError where a gated one cannot halve x."""
    if not ACTIVATIONS[activation][1]:
        return tuple(x.shape)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"activation = {activation!r} halves the last dimension, "
            f"but x has shape {tuple(x.shape)}"
        )
    return (*x.shape[:-1], x.shape[-1] // 2)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a mask as a tuple; ValueError unless it has non-negative integers."""
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(
            f"shape is {shape!r} of type {type(shape).__name__}; give a tuple with the size of "
            "each dimension"
        )
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"shape = {tuple(shape)}: give non-negative integers")
    return tuple(shape)


def check_attention_coordinates(whole: Sequence[int]) -> None:
    """Raise unless ``whole``, (batch, heads, queries, keys), has coordinates in the mask contract.

    Of a shard this is the global shape.
    """
    if len(whole) != 4:
        raise ValueError(
            f"shape {tuple(whole)} has {len(whole)} dimensions; a mask of attention has four: "
            "(batch, heads, queries, keys)"
        )
    for (name, limit), size in zip(ATTENTION_LIMITS.items(), whole, strict=True):
        if size > limit:
            raise ValueError(
                f"shape {tuple(whole)} is too large: the {name} coordinates of attention masks "
                f"lie in [0, 2^{limit.bit_length() - 1}). Split that dimension into calls with "
                "seeds of their own, tridrop.fold_in(seed, part)"
            )


def resolve_noise_shape(
    noise_shape: Sequence[int | None] | None, shape: Sequence[int]
) -> tuple[int, ...]:
    """The dimensions along which the mask is shared, from a ``noise_shape`` as in Keras and TF."""
    if noise_shape is None:
        return ()
    if isinstance(noise_shape, (str, bytes)) or not isinstance(noise_shape, Sequence):
        raise TypeError(
            f"noise_shape is {noise_shape!r} of type {type(noise_shape).__name__}; "
            "give a tuple with an entry a dimension"
        )
    if len(noise_shape) != len(shape):
        raise ValueError(
            f"noise_shape = {tuple(noise_shape)} has {len(noise_shape)} entries for a tensor of "
            f"shape {tuple(shape)}: give 1 (shared) or the size (or None) for each dimension"
        )
    shared = []
    for dim, (entry, size) in enumerate(zip(noise_shape, shape, strict=True)):
        if entry is None or (entry == size and size != 1):
            continue
        if isinstance(entry, bool) or entry != 1:
            raise ValueError(
                f"noise_shape[{dim}] = {entry}, but the tensor has shape {tuple(shape)}: each "
                "entry is 1 (one draw shared along the dimension), the size, or None for the size"
            )
        shared.append(dim)
    return tuple(shared)


def resolve_shard(
    shard: Shard | tuple[Sequence[int], Sequence[int]] | None,
    shape: Sequence[int],
    flattened: bool = True,
) -> Shard | None:
    """A checked :class:`Shard`, from one or from a pair (global_shape, origin).

    ``flattened`` is whether coordinates come from row-major indices, which must fit 63 bits.
    """
    if shard is None:
        return None
    if isinstance(shard, Shard):
        whole, origin = tuple(shard.global_shape), tuple(shard.origin)
    elif isinstance(shard, (tuple, list)) and len(shard) == 2:
        whole, origin = tuple(shard[0]), tuple(shard[1])
    else:
        raise TypeError(
            f"shard is {shard!r} of type {type(shard).__name__}; "
            "give tridrop.Shard(global_shape, origin)"
        )
    if not len(whole) == len(origin) == len(shape):
        raise ValueError(
            f"shard has global_shape {whole} and origin {origin} for a tensor of shape "
            f"{tuple(shape)}: all three need the same number of dimensions"
        )
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in whole + origin):
        raise TypeError(f"shard has global_shape {whole} and origin {origin}; give integers")
    for dim, (size, start, local) in enumerate(zip(whole, origin, shape, strict=True)):
        if start < 0 or start + local > size:
            raise ValueError(
                f"shard does not fit: in dimension {dim} the local size {local} at origin {start} "
                f"passes the global size {size}"
            )
    if flattened and math.prod(whole) >= 1 << 63:
        raise ValueError(f"shard.global_shape = {whole} has 2^63 elements or more")
    return Shard(whole, origin)
