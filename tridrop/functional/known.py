"""Calls that differ from an earlier one in their data alone are not checked again.

A model calls an op with the same shapes, dtypes and options in every step. What the checks of a
call and its backend look at is a key: while it is the same, so is what they found, and the first
call goes on as the later ones do. On a CPU the checks, and not the arithmetic, are most of the time
of a small call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.cpu import serving
from ..base.arguments import check_tensor
from ..base.memory import PLAIN
from ..base.torch_private import watched
from ..contract import seeds
from ..ops import Function, apply, unbound
from ..ops.library import Known

Key = tuple[Any, ...]

_MOST = 1024  # calls that are known at a time: the lengths of sentences, say, times sites
_known: dict[Key, Known] = {}

# The variables that choose what serves a call. Where one is not set, os.environ.get takes a
# microsecond to raise and catch a KeyError; the dictionary behind it, where there is one, does not.
_BACKEND: Any = backends.ENVIRONMENT
_CPU: Any = serving.ENVIRONMENT
_variable: Callable[[Any], Any] = os.environ.get
if hasattr(os.environ, "_data") and hasattr(os.environ, "encodekey"):
    _BACKEND, _CPU = map(os.environ.encodekey, (_BACKEND, _CPU))
    _variable = os.environ._data.get


def key_of(
    settings: Key,
    p: float | Tensor,
    noise_shape: Sequence[int | None] | None,
    shard: Any,
    *tensors: Tensor | None,
) -> Key | None:
    """All that a call depends on but its data and seed; None where that is more than is seen here.

    ``settings`` are the name of the function and its other options, each of one type or beside its
    type: what only compares equal to an option that has been checked is checked itself, and refused
    perhaps, and an option without a hash is not looked up. A ``p`` that is a tensor has a
    value of its own each time, and one that is not a float may be True, which equals 1.0 and is no
    probability: such calls are checked again, as are those with a noise_shape or a shard.
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
    except RuntimeError:  # a nested tensor has no shape
        return None
    if tensors[0] is None or tensors[0].is_meta:
        return None
    return (*key, backends.explicit(), _variable(_BACKEND), _variable(_CPU))


def recall(key: Key | None) -> Known | None:
    """What is known of the calls of a key."""
    try:
        return None if key is None else _known.get(key)
    except TypeError:  # an option that has no hash: it is checked, and perhaps refused
        return None


class Family(NamedTuple):
    """What the ops of a family share."""

    name: str  # as backends.prepare takes it
    function: type[Function]  # of the operands and packed options
    pack: Callable[[Any, str], tuple[Any, ...]]  # options and a backend, as operators take them
    operands: type[Any]  # the tuple of the tensors, which ends in a seed and p
    labels: Mapping[str, str] = MappingProxyType({})  # fields that have another name in messages


def learn(
    family: Family,
    key: Key,
    shape: tuple[int, ...],
    options: Any,
    draws: bool,
    *operands: Tensor | None,
) -> Known:
    """Prepare the backend for the calls of a key, which has results of ``shape``, and keep it.

    The operands are all but the seed and p, and the first is a tensor.
    """
    name = backends.choose(operands[0].device)  # type: ignore[union-attr]
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
    """The call itself; the first operand is a tensor."""
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
        # A key says nothing of layouts: to ask for them would take longer than to fail.
        for name, t in zip(family.operands._fields, operands, strict=False):
            if t is not None:
                check_tensor(t, family.labels.get(name, name))
        raise
