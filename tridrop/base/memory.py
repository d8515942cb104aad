"""Memory that is a tensor's own: what is looked at before loops and kernels go by addresses.

A tensor can lose its memory behind the back of its shape: a storage is resized, as FSDP frees what
it will gather again; a hook on saved tensors gives back what it likes; ``x.data`` is replaced.
Loops that believe the shape would read what is another's, as many of torch's own operators do. So
an address is given out by :func:`place` alone, and only of memory that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .torch_private import transformation

Matrix = tuple[int, int]  # how the kernels take one: (address, kind); an address of 0 is none

PLAIN = (Tensor, torch.nn.Parameter)  # the types that are what they hold
_DEVICES = ("cpu", "cuda")  # devices whose tensors are their storage


# How loops take a dtype, as in loops/storage.py, and the bytes of an element.
Stored = dict[torch.dtype, tuple[int, int]]
STORED: Stored = {torch.float32: (0, 4), torch.bfloat16: (1, 2), torch.float16: (2, 2)}
SEEDS: Stored = {torch.int64: (0, 8)}


def place(t: Tensor, count: int, name: str, stored: Stored = STORED) -> tuple[Tensor, Matrix]:
    """``t``, or a contiguous copy, and where ``count`` elements of it lie: (address, kind).

    Raises as :func:`whole`; TypeError for a dtype that is not among ``stored``, and ValueError
    where there are fewer elements.
    """
    try:
        kind, size = stored[t.dtype]
        at = t.data_ptr()
        if (
            at
            and t.is_contiguous()
            and (t.storage_offset() + count) * size <= t.untyped_storage().nbytes()
        ):
            return t, (at, kind)
    except KeyError:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in stored)
        raise TypeError(f"{name} is {_words(t)}; give {known}") from None
    except RuntimeError:  # a kind of tensor that has no address: whole() says what it is
        pass
    t = whole(t, name).detach().contiguous()
    if t.device.type != "cpu":
        raise ValueError(f"{name} is on {t.device}; loops for CPUs take tensors on the CPU")
    if t.numel() < count:
        raise ValueError(f"{name} is {_words(t)}, {t.numel()} elements, and the call takes {count}")
    return t, (t.data_ptr(), kind)


def whole(t: Tensor, name: str) -> Tensor:
    """``t``, whose memory is there, whatever its strides; zeros that have none, as zeros.

    Raises:
        TypeError: a tensor that is not strided.
        ValueError: its storage was freed or is too small for its shape and strides.
    """
    try:  # what nearly all are, in few questions
        if (
            t.is_contiguous()
            and t.data_ptr()
            and t.storage_offset() == 0
            and t.nbytes <= t.untyped_storage().nbytes()
        ):
            return t
    except RuntimeError:  # a kind of tensor that has no address, or no storage
        pass
    if t.layout is not torch.strided:
        raise TypeError(f"{name} is {_words(t)} in layout {t.layout}; give a strided tensor")
    if t._is_zerotensor():
        return t.clone()
    if t.device.type not in _DEVICES or t.numel() == 0:
        return t
    last = t.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)
    )
    need, have = (last + 1) * t.itemsize, t.untyped_storage().nbytes()
    if need > have or t.data_ptr() == 0:
        raise ValueError(
            f"{name} is {_words(t)}, which needs a storage of {need} bytes, and its storage has "
            f"{have}: it was freed or made smaller, as by untyped_storage().resize_(). Call the "
            "op, and its backward, while the tensor has its memory"
        )
    return t


def readable(seed: Tensor | None) -> bool:
    """Whether the host can read the seed: a CPU tensor with data, not one of a transformation."""
    return (
        (seed is None or (type(seed) is Tensor and seed.device.type == "cpu"))
        # Inside torch.func's transformations what torch.empty makes has no storage either.
        and transformation() is None
    )


def all_whole(arguments: tuple[Any, ...], names: Sequence[str]) -> tuple[Any, ...]:
    """The arguments, whose tensors are :func:`whole`."""
    try:
        for a in arguments:  # what nearly all are, in few questions, and in one loop
            if a is not None and not (
                a.is_contiguous()
                and a.data_ptr()
                and not a.storage_offset()
                and a.nbytes <= a.untyped_storage().nbytes()
                if type(a) in PLAIN
                else not isinstance(a, Tensor)
            ):
                break
        else:
            return arguments
    except RuntimeError:  # a kind of tensor that has no address, or no storage
        pass
    return tuple(
        [
            # isinstance() takes a while to say no
            a if a is None or not isinstance(a, Tensor) else whole(a, name)
            for a, name in zip(arguments, names, strict=True)
        ]
    )


def _words(t: Tensor) -> str:
    return f"a {str(t.dtype).removeprefix('torch.')} tensor of shape {list(t.shape)}"


class Given(NamedTuple):
    """What a tensor was when something was prepared for it."""

    place: int  # among those that were saved with it
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: Any  # True for a CPU, which takes less time to ask than the device itself
    name: str


def given(names: Iterable[str], tensors: Iterable[Tensor | None]) -> tuple[Given, ...]:
    """What those of the tensors are now that there are."""
    return tuple(
        Given(i, t.shape, t.dtype, t.is_cpu or t.device, name)
        for i, (name, t) in enumerate(zip(names, tensors, strict=True))
        if t is not None
    )


def still(t: Tensor | None, then: Given) -> Tensor:
    """``t`` where it is what it was; ValueError, which says what it is now, where it is not."""
    if t is None:
        _refuse(then, "nothing")
    if t.shape != then.shape or t.dtype != then.dtype:
        _refuse(then, _words(t))
    if (t.is_cpu or t.device) != then.device:
        _refuse(then, f"{_words(t)} on {t.device}")
    return t.resolve_neg() if t.is_neg() else t


def _refuse(then: Given, now: str) -> NoReturn:
    was = f"a {str(then.dtype).removeprefix('torch.')} tensor of shape {list(then.shape)}"
    on = "cpu" if then.device is True else then.device
    raise ValueError(
        f"backward is given {then.name} as {now}; forward saved {was} on {on}. Either its .data "
        "was replaced between forward and backward, or a hook on saved tensors gave back another: "
        "both must leave shape, dtype and device as they were"
    )
