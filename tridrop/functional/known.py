"""Known calls: a call that differs from an earlier one in its data alone is not checked again.

A model calls an op with the same shapes, dtypes and options in every step. Everything that the
checks and the backend look at makes up a key; calls with equal keys need the checks only once. The
first call with a key continues like the later ones. On a CPU the checks, and not the arithmetic,
take most of the time of a small call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..base.arguments import check_tensor
from ..base.memory import PLAIN
from ..base.torch_private import watched
from ..contract import seeds
from ..ops import Function, apply, unbound
from ..ops.library import Known

Key = tuple[Any, ...]

_MOST = 1024  # known calls at a time: for instance lengths of sentences times sites
_known: dict[Key, Known] = {}


def key_of(
    settings: Key,
    p: float | Tensor,
    noise_shape: Sequence[int | None] | None,
    shard: Any,
    *tensors: Tensor | None,
) -> Key | None:
    """Everything that a call depends on except its data and seed; None if it cannot become known.

    ``settings`` are the name of the function and its other options, each of a fixed type or
    together with its type: an option that only compares equal to one that was checked must be
    checked itself, and may be refused. Calls with a noise_shape, a shard, or a ``p`` that is not a
    float are always checked: a tensor has a new value each time, and True equals 1.0 but is no
    probability.
    """
    if type(p) is not float or noise_shape is not None or shard is not None:
        return None
    if seeds.in_batch() or watched():
        return None
    key: list[Any] = [p, settings]
    try:
        for t in tensors:
            if t is None:
                key.append(None)
            elif type(t) not in PLAIN or t.is_neg():
                return None
            else:
                key += (t.shape, t.dtype, t.is_cpu or t.device)
    except RuntimeError:  # nested tensors have no shape
        return None
    if tensors[0] is None or tensors[0].is_meta:
        return None
    return (*key, backends.named())


def recall(key: Key | None) -> Known | None:
    """The known call with a key; None if there is none."""
    try:
        return None if key is None else _known.get(key)
    except TypeError:  # an option without a hash goes to the checks, which may refuse it
        return None


class Family(NamedTuple):
    """What the ops of a family share."""

    name: str  # the family's name for backends.prepare
    function: type[Function]  # the autograd function of the operands and packed options
    pack: Callable[[Any, str], tuple[Any, ...]]  # packs options and the name of a backend
    operands: type[Any]  # the tuple of the tensors, whose last fields are seed and p
    labels: Mapping[str, str] = MappingProxyType({})  # fields with another name in messages


def learn(
    family: Family,
    key: Key,
    shape: tuple[int, ...],
    options: Any,
    draws: bool,
    *operands: Tensor | None,
) -> Known:
    """Prepare the backend for calls with a key, whose results have ``shape``, and remember it.

    The operands are all tensors but the seed and p; the first one is not None.
    """
    name = backends.name_for(operands[0].device)  # type: ignore[union-attr]
    given = family.operands(*operands, seed=None, p=None)
    prepared = backends.prepare(name, family.name, shape, options, given)
    if len(_known) >= _MOST:
        _known.clear()
    found = _known[key] = Known(family.pack(options, name), prepared, draws, {})
    return found


def call(
    family: Family,
    known: Known,
    seed: int | Tensor | None,
    *operands: Tensor | None,
) -> Any:
    """Make a known call; the first operand is not None."""
    function = family.function
    try:
        drawn = seeds.seed_for(operands[0].device, seed) if known.draws else None  # type: ignore[union-attr]
        if seed is not None and drawn is not None and (type(drawn) is not Tensor or drawn.is_neg()):
            return apply(function, *operands, drawn, None, known.packed)
        if torch.is_grad_enabled():
            for t in operands:
                if t is not None and t.requires_grad:
                    return unbound(function)(*operands, drawn, None, known)
        return function.forward(*operands, drawn, None, known)
    except RuntimeError:
        # A key does not contain layouts, since asking for them in each call would take too long. So
        # a sparse tensor fails here, and check_tensor says why.
        for name, t in zip(family.operands._fields, operands, strict=False):
            if t is not None:
                check_tensor(t, family.labels.get(name, name))
        raise
