"""The operators that draw seeds and export masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.protocol import Backend
from ..base.torch_private import partitioner_redraws
from ..contract import choice
from ..contract.mask import Shard
from ..spec.attention import AttentionOptions
from ..spec.elementwise import FLOATS, Options
from .library import define, each_seed, read_rate


def _new_seed(place: Tensor) -> Tensor:
    return torch.randint_like(place, (1 << 63) - 1)


_warned_of_recomputation = False


def _new_seed_fake(place: Tensor) -> Tensor:
    global _warned_of_recomputation
    if not _warned_of_recomputation and partitioner_redraws():
        _warned_of_recomputation = True
        warnings.warn(
            "tridrop draws a seed inside a graph compiled with activation_memory_budget < 1 or "
            "aggressive_recomputation: torch may draw it again in backward, with another mask. "
            "Pass explicit seeds, for instance with tridrop.rng(tridrop.new_seed(device)).",
            stacklevel=2,
        )
    return torch.empty_like(place)


def _serving(backend: str, seed: Tensor) -> Backend:
    """The backend, if it can draw masks on the seed's device; else RuntimeError."""
    module = backends.load(backend)
    reason = module.why_not(seed.device, [FLOATS[0]])
    if reason is not None:
        raise RuntimeError(reason)
    return module


def _keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    p_tensor: Tensor | None,
    p: float,
    domain: str,
    shared: Sequence[int],
    global_shape: Sequence[int],
    origin: Sequence[int],
    backend: str,
) -> Tensor:
    shard = Shard(tuple(global_shape), tuple(origin)) if global_shape else None
    p_tensor, options = read_rate(p_tensor, Options(p=p, shared=tuple(shared), shard=shard))
    module = _serving(backend, seed)
    return module.keep_mask(seed, tuple(shape), p_tensor, options, domain)


def _keep_mask_fake(seed: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)


def _attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    p_tensor: Tensor | None,
    p: float,
    origin: Sequence[int],
    backend: str,
) -> Tensor:
    batch, head, query, key = origin
    given = AttentionOptions(p=p, origin=(batch, head, query, key))
    p_tensor, options = read_rate(p_tensor, given)
    module = _serving(backend, seed)
    return module.attention_keep_mask(seed, tuple(shape), p_tensor, options)


def _choose(seed: Tensor, shape: Sequence[int], k: int, backend: str) -> Tensor:
    return choice.largest(_serving(backend, seed).decision_bits(seed, tuple(shape)), k)


def _choose_fake(seed: Tensor, shape: Sequence[int], k: int, backend: str) -> Tensor:
    return torch.empty((*shape[:-1], k), dtype=torch.int64, device=seed.device)


define(
    "new_seed(Tensor place) -> Tensor",
    _new_seed,
    _new_seed_fake,
    # torch.compile must neither drop, merge nor recompute a draw.
    tags=(torch.Tag.nondeterministic_seeded,),
)
keep_mask = define(
    "keep_mask(Tensor seed, SymInt[] shape, Tensor? p_tensor, float p, str domain, int[] shared, "
    "SymInt[] global_shape, SymInt[] origin, str backend) -> Tensor",
    _keep_mask,
    _keep_mask_fake,
)
define(
    "attention_keep_mask(Tensor seed, SymInt[] shape, Tensor? p_tensor, float p, SymInt[] origin, "
    "str backend) -> Tensor",
    _attention_keep_mask,
    _keep_mask_fake,
)
define(
    "choose(Tensor seed, SymInt[] shape, SymInt k, str backend) -> Tensor", _choose, _choose_fake
)
each_seed("choose", _choose)
