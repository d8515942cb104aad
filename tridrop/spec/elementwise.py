"""The options of the elementwise and norm families, and the checks that all families share.

Nothing here computes on data. Public functions call the ``check_*`` and ``resolve_*`` functions
before they draw a seed; the result of the checks is an :class:`Options`, which the backends take.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..base.arguments import (
    check_finite,
    check_flag,
    check_sequence,
    check_tensor,
    check_whole,
    given,
)
from ..contract import noise
from ..contract.mask import Shard, scale, threshold

# name -> (the function of one argument, whether the input holds two halves: f(first) * second).
# This is the list of names for users too: docstrings and README.md name it.
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "none": ("none", False),
    "relu": ("relu", False),
    "gelu": ("gelu", False),  # x * cdf(x), exact
    "gelu_tanh": ("gelu_tanh", False),  # gelu with tanh in the place of erf
    "silu": ("silu", False),  # x * sigmoid(x)
    "quick_gelu": ("quick_gelu", False),  # CLIP's x * sigmoid(1.702 x)
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
}


def check_functions(table: Collection[str], where: str) -> None:
    """Raise unless ``table`` has an entry for each function of :data:`ACTIVATIONS`, and no other.

    Each backend calls this before it computes anything, so that a missing function is an error that
    names the table, and never the numbers of another function.
    """
    functions = {function for function, _ in ACTIVATIONS.values()}
    for missing, has, lacks in ((functions - {*table}, "spec.ACTIVATIONS", where),
                                ({*table} - functions, where, "spec.ACTIVATIONS")):  # fmt: skip
        if missing:
            names = ", ".join(sorted(missing))
            raise NotImplementedError(
                f"{has} has the functions {names}, and {lacks} has no entry for them: "
                "CONTRIBUTING.md lists the tables of an activation"
            )


# The coordinates of attention in the mask contract, and how many values each can have.
ATTENTION_LIMITS = {"batch": 1 << 32, "head": 1 << 28, "query": 1 << 32, "key": 1 << 35}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """The options of one call of the elementwise family, after validation.

    ``shared`` lists the dimensions along which the mask of the elements is shared; ``p`` and
    ``drop_path`` are the probabilities of dropping an element and a sample; ``noise`` is one of
    ``noise.NOISES``.
    """

    activation: str = "none"
    p: float = 0.0
    drop_path: float = 0.0
    shared: tuple[int, ...] = ()
    shard: Shard | None = None
    noise: str = "mask"

    @property
    def function(self) -> str:
        """The name of the activation's function of one argument."""
        return ACTIVATIONS[self.activation][0]

    @property
    def gated(self) -> bool:
        """Whether the input's last dimension holds two halves: ``function(first) * second``."""
        return ACTIVATIONS[self.activation][1]

    def thresholds(self) -> tuple[int, int]:
        """The thresholds of the element mask and the drop_path mask; 0 means that there is none."""
        return threshold(self.p), threshold(self.drop_path)

    def scales(self) -> tuple[float, float]:
        """The factors of the kept elements and of the kept samples; see ``noise.scale``."""
        elements, path = self.thresholds()
        return noise.scale(self.noise, elements), scale(path)


@dataclass(frozen=True)
class NormOptions(Options):
    """The options of one call of the norm family. ``activation`` is always "none".

    With ``after`` the dropout follows the norm, residual + dropout(norm(x)); else it goes before
    the norm, norm(residual + dropout(x)). ``keep_stream`` says whether the stream is a result.
    """

    norm: str = "layer_norm"
    eps: float = 1e-5
    zero_centered: bool = False
    after: bool = False
    keep_stream: bool = True
    stream_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which torch.autocast casts operands on ``device``; None where it is off.

    The device's type decides and not torch.amp.is_autocast_available, which torch.compile cannot
    trace before torch 2.13. Of the devices that tridrop serves, only meta has no autocast.
    """
    name = device.type
    if name == "meta" or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)


def check_probability(p: float | Tensor, name: str = "p", *, tensor_allowed: bool = False) -> None:
    """Raise unless ``p`` is a probability: a number in [0, 1] or, where allowed, a 0-d tensor."""
    if isinstance(p, Tensor):
        if not tensor_allowed:
            raise TypeError(f"{name} is a tensor; give a Python number")
        check_tensor(p, name)
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
    # float and int come first, since the check for Real, which NumPy's numbers need, takes longer.
    if isinstance(p, bool) or not isinstance(p, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{given(p, name)}; give a number in [0, 1]")
    if not 0 <= p <= 1:  # also true for NaN
        raise ValueError(f"{name} = {p}; the probability of dropping must lie in [0, 1]")


def check_rate(p: float | Tensor, device: torch.device, name: str = "p") -> None:
    """Raise where ``p`` is a tensor on another accelerator than the data.

    A tensor on the CPU always works: it becomes a number.
    """
    if isinstance(p, Tensor) and p.device != device and p.device.type != "cpu":
        raise ValueError(
            f"{name} is on {p.device} but the data is on {device}: give a number, or a tensor "
            "there or on the CPU"
        )


def check_eps(eps: float, name: str = "eps") -> float:
    """``eps`` as a float; ValueError unless it is finite and 0 or more."""
    number = check_finite(eps, name)
    if number < 0:
        raise ValueError(f"{name} = {eps}; it must be a number of 0 or more")
    return number


def drops(p: float | Tensor, training: bool) -> bool:
    """Whether a call with a checked ``p`` drops anything, and so draws a seed."""
    check_flag(training, "training")
    return training and (isinstance(p, Tensor) or p > 0)


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise unless ``x`` is a tensor of a supported floating-point dtype."""
    check_tensor(x, name)
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


def check_device(v: Tensor, name: str, x: Tensor, other: str = "x") -> None:
    """Raise unless ``v`` is on the device of ``x``, whose name in messages is ``other``."""
    if v.device != x.device:
        raise ValueError(f"{name} is on {v.device} but {other} is on {x.device}: move one of them")


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


def check_gate(gate: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """Raise unless ``gate`` is floating-point and has one gain per sample and channel.

    ``shape`` is that of the branch that it scales, which is on the device of x.
    """
    check_input(gate, "gate")
    check_device(gate, "gate", x)
    if len(shape) < 2:
        raise ValueError(
            f"gate scales samples, the first dimension, but x has shape {tuple(shape)}: give it "
            "two dimensions or more"
        )
    pair, spread = (shape[0], shape[-1]), (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    if tuple(gate.shape) not in (pair, spread):
        forms = f"{pair}" if len(shape) == 2 else f"{pair} or {spread}"
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; for a branch of shape {tuple(shape)} it must be "
            f"{forms}, one gain per sample and channel: expand it first"
        )


def check_out_dtype(dtype: torch.dtype, *operands: Tensor | None) -> None:
    """Raise unless ``dtype`` is a dtype that a result of these operands can have."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{given(dtype, 'out_dtype')}; give a torch.dtype")
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
    """Raise unless ``drop_path`` is a probability, and ``shape`` has samples to drop if not 0."""
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
    if not isinstance(activation, str):
        raise TypeError(f"{given(activation, 'activation')}; give None or a name, such as 'gelu'")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; known: None, {', '.join(ACTIVATIONS)}")
    return str(activation)


def output_shape(x: Tensor, activation: str) -> tuple[int, ...]:
    """The shape of ``activation(x)``; ValueError where a gated activation cannot halve x."""
    if not ACTIVATIONS[activation][1]:
        return tuple(x.shape)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"activation = {activation!r} halves the last dimension, "
            f"but x has shape {tuple(x.shape)}"
        )
    return (*x.shape[:-1], x.shape[-1] // 2)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a mask as a tuple; ValueError unless it consists of non-negative integers."""
    check_sequence(shape, "shape", "a tuple with the size of each dimension")
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"shape = {tuple(shape)}: give non-negative integers")
    if not torch.compiler.is_compiling() and _beyond(shape):
        raise ValueError(f"shape = {tuple(shape)} has 2^63 elements or more")
    return tuple(check_whole(n, "shape") for n in shape)


def _beyond(shape: Sequence[int]) -> bool:
    """Whether a size, or the product of all sizes, exceeds int64."""
    sizes = [n for n in shape if not isinstance(n, torch.SymInt)]
    return max(math.prod(sizes), *sizes, 0) >= 1 << 63


def check_attention_coordinates(whole: Sequence[int]) -> None:
    """Raise unless ``whole``, (batch, heads, queries, keys), has coordinates in the mask contract.

    For a shard, ``whole`` is its global shape.
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
    check_sequence(noise_shape, "noise_shape", "a tuple with one entry per dimension")
    if len(noise_shape) != len(shape):
        raise ValueError(
            f"noise_shape = {tuple(noise_shape)} has {len(noise_shape)} entries for a tensor of "
            f"shape {tuple(shape)}: give 1 (shared) or the size (or None) for each dimension"
        )
    shared = []
    for dim, (entry, size) in enumerate(zip(noise_shape, shape, strict=True)):
        if entry is None:
            continue
        whole = isinstance(entry, (int, torch.SymInt)) and not isinstance(entry, bool)
        if whole and entry == size and size != 1:
            continue
        if not whole or entry != 1:
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
    """A checked :class:`Shard`, from a Shard or from a pair (global_shape, origin).

    ``flattened`` says that coordinates are row-major indices, which must fit 63 bits.
    """
    if shard is None:
        return None
    if isinstance(shard, Shard):
        pair: Sequence[Sequence[int]] = (shard.global_shape, shard.origin)
    elif isinstance(shard, (tuple, list)) and len(shard) == 2:
        pair = shard
    else:
        raise TypeError(f"{given(shard, 'shard')}; give tridrop.Shard(global_shape, origin)")
    for name, part in zip(("global_shape", "origin"), pair, strict=True):
        check_sequence(part, f"shard's {name}", "a tuple with one entry per dimension")
    whole, origin = (tuple(part) for part in pair)
    if not len(whole) == len(origin) == len(shape):
        raise ValueError(
            f"shard has global_shape {whole} and origin {origin} for a tensor of shape "
            f"{tuple(shape)}: all three need the same number of dimensions"
        )
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in whole + origin):
        raise TypeError(f"shard has global_shape {whole} and origin {origin}; give integers")
    whole, origin = (tuple(check_whole(n, "shard") for n in part) for part in (whole, origin))
    for dim, (size, start, local) in enumerate(zip(whole, origin, shape, strict=True)):
        if start < 0 or start + local > size:
            raise ValueError(
                f"shard does not fit: in dimension {dim} the local size {local} at origin {start} "
                f"passes the global size {size}"
            )
    if flattened and math.prod(whole) >= 1 << 63:
        raise ValueError(f"shard.global_shape = {whole} has 2^63 elements or more")
    return Shard(whole, origin)
