"""Odd values: of options, and of tensors.

All are harmless to torch itself. Left out are tensors whose memory is no longer what it was
(storages resized, ``data`` replaced): tests of their own have them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Number(int):
    """A subclass of int."""


class _Level(IntEnum):
    ONE = 1


class _NoHash:
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "_NoHash()"


class _NoTruth:
    def __bool__(self) -> bool:
        raise ValueError("no truth value")

    def __repr__(self) -> str:
        return "_NoTruth()"


class _Plain(Tensor):
    """A subclass of Tensor that changes nothing."""


# Each is made anew for each call. Huge integers are so large that no memory of that size is even
# tried for.
SCALARS: list[Callable[[], Any]] = [
    *(
        (lambda value=value: value)
        for value in (
            None, True, False, 0, 1, -1, 2, 3, 7, sys.maxsize, -sys.maxsize - 1, sys.maxsize - 1,
            1 << 62, 1 << 63, 1 << 64, -(1 << 63) - 1, 1 << 200,
            0.0, -0.0, 0.1, 0.5, 1.0, 1.5, -0.5, 1e-9, 1e300, 5e-324, float("nan"), float("inf"),
            float("-inf"), 1j, complex(0.5), complex("nan"),
            Fraction(0), Fraction(1, 2), Fraction(1), Decimal("0.5"), Decimal("NaN"),
            np.float16(0.5), np.float32(0.5), np.float64(0.5), np.float64("nan"), np.int8(1),
            np.int64(0), np.int64(1), np.uint64(1 << 63), np.True_, np.False_, np.complex64(1),
            _Number(1), _Level.ONE,
            "", "0.5", "gelu", "relu", "cpu", "meta", "kept", "rows", b"x",
            (), (1,), (0, 1), (1, 1), (None, None), (2, 0), ("a", "b"), ((1,), (0,)),
            int, torch.float32, torch.float64, torch.int64, torch.device("cpu"),
            torch.device("meta"), len, Ellipsis, NotImplemented, slice(1), range(3),
        )
    ),
    list, dict, set, object, _NoHash, _NoTruth, lambda: [1], lambda: [0.5], lambda: {1: 2},
    lambda: {"p": 0.1}, lambda: bytearray(b"x"), lambda: np.array(0.5), lambda: np.array([0.0, 1]),
    lambda: np.ones((2, 3), np.float32), lambda: torch.tensor(0.5), lambda: torch.tensor(1),
    lambda: torch.tensor(True), lambda: torch.tensor(float("nan")), lambda: torch.tensor([0.5]),
    lambda: torch.tensor(1.5), lambda: torch.tensor(0.5, dtype=torch.float64),
    lambda: torch.tensor(0.5, requires_grad=True), lambda: torch.tensor(0.5, device="meta"),
    lambda: torch.tensor([3, 4]), lambda: torch.ones(2, 3), lambda: torch.tensor(0.5j),
    lambda: torch.Generator(), lambda: torch.nn.Identity(), lambda: torch.Size([1]),
    lambda: torch.zeros(0), lambda: iter([1, 2]), lambda: (i for i in (1, 2)),
]  # fmt: skip


def _at_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        if t.numel():
            t.view(-1)[t.numel() // 3] = value
        return t

    return change


def _everywhere(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


def _row(value: float) -> Callable[[Tensor], Tensor]:
    """The first index of the first dimension."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        if t.dim() and t.numel():
            t[0] = value
        return t

    return change


def _both(t: Tensor) -> Tensor:
    return _at_one(float("inf"))(_row(float("-inf"))(t))


# What a right tensor still is afterwards: the same question with other numbers.
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a nan": _at_one(float("nan")),
    "an inf": _at_one(float("inf")),
    "a -inf": _at_one(float("-inf")),
    "nan in a row": _row(float("nan")),
    "inf in a row": _row(float("inf")),
    "-inf in a row": _row(float("-inf")),
    "both infinities": _both,
    "nan everywhere": _everywhere(float("nan")),
    "inf everywhere": _everywhere(float("inf")),
    "-inf everywhere": _everywhere(float("-inf")),
    "zeros": torch.zeros_like,
    "minus zeros": _everywhere(-0.0),
}


def _spread(t: Tensor) -> Tensor:
    """Every second element of the last dimension of a larger tensor."""
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def _turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _imaginary(t: Tensor) -> Tensor:
    """A view that is negated lazily: the imaginary part of a conjugate."""
    return torch.complex(t.float(), -t.float()).conj().imag


# The same numbers, laid out otherwise.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": _spread,
    "turned": _turned,
    "expanded": _expanded,
    "negated lazily": lambda t: torch._neg_view(-t),
    "of a conjugate": _imaginary,
    "at an odd offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    "a parameter": lambda t: torch.nn.Parameter(t.detach(), requires_grad=t.is_floating_point()),
    "of a subclass": lambda t: t.as_subclass(_Plain),
    "requires grad": lambda t: t.detach().clone().requires_grad_(),
}

# What is no longer right, or perhaps.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    **{f"to {dtype}": (lambda t, dtype=dtype: t.to(dtype)) for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32,
        torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    )},
    "on meta": lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "sparse rows": lambda t: t.detach().reshape(t.shape[0] if t.dim() else 1, -1).to_sparse_csr(),
    "mkldnn": lambda t: t.detach().float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(
        [t.detach().float().reshape(-1), t.detach().float().reshape(-1)[: t.numel() // 2]]
    ),
    "jagged": lambda t: torch.nested.nested_tensor(
        [t.detach().float().reshape(-1, 1), t.detach().float().reshape(-1, 1)[: t.numel() // 2]],
        layout=torch.jagged,
    ),
    "no rows": lambda t: t[:0] if t.dim() else t.reshape(1)[:0],
    "no columns": lambda t: t[..., :0] if t.dim() else t.reshape(1)[:0],
    "one number": lambda t: t.reshape(-1)[0] if t.numel() else torch.zeros(()),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.dim() and t.shape[0] else torch.zeros(()),
    "four dimensions more": lambda t: t[None, None, None, None],
    "flat": lambda t: t.reshape(-1),
    "shorter": lambda t: t[:-1] if t.dim() else t,
    "narrower": lambda t: t[..., :-1] if t.dim() else t,
    "wider": lambda t: torch.cat([t, t], -1) if t.dim() else t,
    "an array": lambda t: t.detach().float().numpy(),
    "a list": lambda t: t.detach().float().tolist(),
    "in a tuple": lambda t: (t,),
    "nothing": lambda t: None,
}  # fmt: skip
