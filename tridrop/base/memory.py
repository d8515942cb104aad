"""The checks of a tensor's memory that come before loops and kernels use its address.

A tensor can lose its memory while its shape stays: FSDP resizes a storage to free what it will
gather again; a hook on saved tensors returns another tensor; ``x.data`` is replaced. A loop that
trusts the shape would then read memory that is not the tensor's, as many of torch's own operators
do. So addresses are given out by :func:`place` alone, or found by a kernel that looks in the same
way (backends/cpu/loops/operands.py), and only of memory that the tensor has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import mul
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .torch_private import transformation

Matrix = tuple[int, int]  # what loops take: (address, dtype code); the address 0 means absent

PLAIN = (Tensor, torch.nn.Parameter)  # the types of tensors that are nothing but their data
_DEVICES = ("cpu", "cuda")  # devices on which a tensor's data is in its storage


# The number by which loops/storage.py knows a dtype, and the bytes of an element.
Stored = dict[torch.dtype, tuple[int, int]]
STORED: Stored = {torch.float32: (0, 4), torch.bfloat16: (1, 2), torch.float16: (2, 2)}
SEEDS: Stored = {torch.int64: (0, 8)}


def place(t: Tensor, count: int, name: str, stored: Stored = STORED) -> tuple[Tensor, Matrix]:
    """``t``, or a contiguous copy of it, and the place of its elements: (address, dtype code).

    Raises as :func:`whole` does, TypeError for a dtype that is not among ``stored``, and ValueError
    where ``t`` has fewer than ``count`` elements.
    """
    try:
        code, size = stored[t.dtype]
        at = t.data_ptr()
        if (
            at
            and t.is_cpu
            and t.is_contiguous()
            and not t.is_neg()
            and (t.storage_offset() + count) * size <= t.untyped_storage().nbytes()
        ):
            return t, (at, code)
    except KeyError:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in stored)
        raise TypeError(f"{name} is {_words(t)}; give {dtypes}") from None
    except RuntimeError:  # some tensors have no address: whole() says what they are
        pass
    t = whole(t, name).detach().resolve_neg().contiguous()
    if t.device.type != "cpu":
        raise ValueError(f"{name} is on {t.device}; loops for CPUs take tensors on the CPU")
    if t.numel() < count:
        raise ValueError(f"{name} is {_words(t)}, {t.numel()} elements, and the call takes {count}")
    return t, (t.data_ptr(), code)


def _end(t: Tensor) -> int:
    """The number of elements from the start of the storage to the end of ``t``'s last element."""
    strides = t.stride()
    return int(t.storage_offset() + sum(map(mul, t.shape, strides)) - sum(strides)) + 1


def _has_memory(t: Tensor) -> bool:
    """Whether ``t`` has an address, and its storage all of its elements.

    It may be False for an empty tensor, and raises RuntimeError for a tensor without an address.
    """
    if not t.data_ptr():
        return False
    if t.is_contiguous() and not t.storage_offset():  # the usual case, in the shortest way
        return t.nbytes <= t.untyped_storage().nbytes()
    return _end(t) * t.itemsize <= t.untyped_storage().nbytes()


def whole(t: Tensor, name: str) -> Tensor:
    """``t``, after a check that its storage holds all of its elements, whatever its strides.

    The zeros that torch makes without memory are copied to memory.

    Raises:
        TypeError: a tensor that is not strided.
        ValueError: the storage was freed, or is too small for the shape and strides.
    """
    try:  # what nearly all tensors pass
        if _has_memory(t):
            return t
    except RuntimeError:  # some tensors have no address, or no storage
        pass
    if t.layout is not torch.strided:
        raise TypeError(f"{name} is {_words(t)} in layout {t.layout}; give a strided tensor")
    if t._is_zerotensor():
        return t.clone()
    if t.device.type not in _DEVICES or t.numel() == 0:
        return t
    need, have = _end(t) * t.itemsize, t.untyped_storage().nbytes()
    if need > have or t.data_ptr() == 0:
        raise ValueError(
            f"{name} is {_words(t)}, which needs a storage of {need} bytes, and its storage has "
            f"{have}: it was freed or made smaller, as by untyped_storage().resize_(). Call the "
            "op, and its backward, while the tensor has its memory"
        )
    return t


def readable(seed: Tensor | None) -> bool:
    """Whether the host can read the seed: it is a CPU tensor with data, or None."""
    return (
        (seed is None or (type(seed) is Tensor and seed.is_cpu))
        # Inside torch.func's transformations even the result of torch.empty has no storage.
        and transformation() is None
    )


def all_have_memory(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among the arguments are plain ones, each with all of its elements."""
    try:
        for a in arguments:
            if a is not None and not (
                _has_memory(a) if type(a) in PLAIN else not isinstance(a, Tensor)
            ):
                return False
    except RuntimeError:  # some tensors have no address, or no storage
        return False
    return True


def all_whole(arguments: tuple[Any, ...], names: Sequence[str]) -> tuple[Any, ...]:
    """The arguments, after :func:`whole` of each tensor among them."""
    if all_have_memory(arguments):
        return arguments
    return tuple(
        [
            # None is asked for first: isinstance() takes longer
            a if a is None or not isinstance(a, Tensor) else whole(a, name)
            for a, name in zip(arguments, names, strict=True)
        ]
    )


def _words(t: Tensor) -> str:
    return f"a {str(t.dtype).removeprefix('torch.')} tensor of shape {list(t.shape)}"


class Facts(NamedTuple):
    """The shape, dtype and device that a tensor had when it was saved for backward."""

    place: int  # its index among the tensors that were saved together
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: Any  # True for the CPU: `is_cpu` takes less time than `device`
    name: str


def facts_of(names: Iterable[str], tensors: Iterable[Tensor | None]) -> tuple[Facts, ...]:
    """The facts of those tensors that are not None."""
    return tuple(
        Facts(i, t.shape, t.dtype, t.is_cpu or t.device, name)
        for i, (name, t) in enumerate(zip(names, tensors, strict=True))
        if t is not None
    )


def as_saved(t: Tensor | None, saved: Facts) -> Tensor:
    """``t`` if its shape, dtype and device are those that were saved; else ValueError."""
    if t is None:
        _refuse(saved, "nothing")
    if t.shape != saved.shape or t.dtype != saved.dtype:
        _refuse(saved, _words(t))
    if t.layout is not torch.strided:
        _refuse(saved, f"{_words(t)} in layout {t.layout}")
    if (t.is_cpu or t.device) != saved.device:
        _refuse(saved, f"{_words(t)} on {t.device}")
    return t.resolve_neg() if t.is_neg() else t


def _refuse(saved: Facts, now: str) -> NoReturn:
    was = f"a {str(saved.dtype).removeprefix('torch.')} tensor of shape {list(saved.shape)}"
    on = "cpu" if saved.device is True else saved.device
    raise ValueError(
        f"backward is given {saved.name} as {now}; forward saved {was} on {on}. Either its .data "
        "was replaced between forward and backward, or a hook on saved tensors gave back another: "
        "both must leave shape, dtype and device as they were"
    )
