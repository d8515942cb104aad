"""What an op may be asked for, and every error message about it.

Nothing here computes on data. Public functions call the ``check_*`` and ``resolve_*`` functions
before they draw a seed; the result of the checks is an :class:`Options`, which both backends take.
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

# name -> (the function of one argument, whether the input holds two halves: f(first) * second)
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "none": ("none", False),
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
    "quick_gelu": ("quick_gelu", False),
    "reglu": ("relu", True),
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
}


def check_functions(table: Collection[str], where: str) -> None:
    """Raise unless ``table`` has an entry for each function of :data:`ACTIVATIONS`, and no other.

    A backend asks before it computes anything: a function that it lacks is an error that names the
    table, never another function's numbers.
    """
    known = {function for function, _ in ACTIVATIONS.values()}
    for missing, has, lacks in ((known - {*table}, "spec.ACTIVATIONS", where),
                                ({*table} - known, where, "spec.ACTIVATIONS")):  # fmt: skip
        if missing:
            names = ", ".join(sorted(missing))
            raise NotImplementedError(
                f"{has} has the functions {names}, and {lacks} has no entry for them: "
                "CONTRIBUTING.md lists the tables of an activation"
            )


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
    # The first two before Real, which NumPy's numbers are, and which takes longer to ask.
    if isinstance(p, bool) or not isinstance(p, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{given(p, name)}; give a number in [0, 1]")
    if not 0 <= p <= 1:  # also true for NaN
        raise ValueError(f"{name} = {p}; the probability of dropping must lie in [0, 1]")


def check_rate(p: float | Tensor, device: torch.device, name: str = "p") -> None:
    """Raise unless a ``p`` that is a tensor can be read beside data on ``device``.

    One on the CPU can always be: it becomes a number.
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
    """Whether a call with a checked ``p`` drops anything; it draws a seed just then."""
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
    """Raise unless ``v`` is on the device of ``x``, which messages call ``other``."""
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
    """Raise unless ``gate`` has a floating-point gain per sample and channel of a branch.

    The branch has ``shape`` and is on the device of x.
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
            f"{forms}, a gain per sample and channel: expand it first"
        )


def check_out_dtype(dtype: torch.dtype, *operands: Tensor | None) -> None:
    """Raise unless ``dtype`` is one that a result computed from these operands can have."""
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
    if not isinstance(activation, str):
        raise TypeError(f"{given(activation, 'activation')}; give None or a name, such as 'gelu'")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; known: None, {', '.join(ACTIVATIONS)}")
    return str(activation)


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
    check_sequence(shape, "shape", "a tuple with the size of each dimension")
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"shape = {tuple(shape)}: give non-negative integers")
    if not torch.compiler.is_compiling() and _beyond(shape):
        raise ValueError(f"shape = {tuple(shape)} has 2^63 elements or more")
    return tuple(check_whole(n, "shape") for n in shape)


def _beyond(shape: Sequence[int]) -> bool:
    """Whether a size, or their product, is not an int64."""
    sizes = [n for n in shape if not isinstance(n, torch.SymInt)]
    return max(math.prod(sizes), *sizes, 0) >= 1 << 63


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
    """A checked :class:`Shard`, from one or from a pair (global_shape, origin).

    ``flattened`` is whether coordinates come from row-major indices, which must fit 63 bits.
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
