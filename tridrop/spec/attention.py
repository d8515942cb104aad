"""The options and operands of attention, and every error message about them.

All attention ops share one description: what happens to a score before the softmax, which
probabilities are dropped, and where the coordinates of the mask begin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.arguments import check_finite, check_tensor, check_whole, given
from ..contract.mask import Shard, scale, threshold
from .elementwise import (
    ATTENTION_LIMITS,
    FLOATS,
    check_attention_coordinates,
    check_device,
    check_input,
    resolve_shard,
)

HEAD_DIM_LIMIT = 256
# In the environment: asks the Triton backend for a forward whose warps divide the work.
SPECIALIZE = "TRIDROP_WARP_SPECIALIZE"
Window = int | tuple[int | None, int | None]


@dataclass(frozen=True)
class AttentionOptions:
    """The options of one call of the attention ops, after validation.

    A score is ``scale * query . key``, then ``softcap * tanh(score / softcap)`` where softcap is
    not 0; then the attention mask is added. A key takes part where ``lower <= key - query <=
    upper``, both of them local indices. The coordinates (batch, head, query, key) of the dropout
    mask begin at ``origin``. ``max_query`` and ``max_key`` bound the lengths of packed sequences.
    ``block`` tells backward that ``out`` and ``lse`` were computed from more keys than it is given.
    """

    p: float = 0.0
    scale: float = 1.0
    lower: int | None = None
    upper: int | None = None
    softcap: float = 0.0
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)
    max_query: int = 0
    max_key: int = 0
    block: bool = False

    def threshold(self) -> int:
        """The threshold of the dropout mask; 0 means that there is no mask."""
        return threshold(self.p)

    def keep_scale(self) -> float:
        """The factor of a kept probability."""
        return scale(self.threshold())


@dataclass(frozen=True)
class SoftmaxOptions(AttentionOptions):
    """The options of the softmax of scores; ``return_softmax`` also asks for it before dropout."""

    return_softmax: bool = False


def four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(batch, heads, queries, keys) of scores of two dimensions or more.

    The dimension before the queries is the heads; all dimensions before it together are the batch.
    """
    heads = shape[-3] if len(shape) > 2 else 1
    return math.prod(shape[:-3]), heads, shape[-2], shape[-1]


def check_dtypes(query: Tensor, **others: Tensor) -> None:
    """Raise unless all tensors are floating-point and have query's dtype and device."""
    check_input(query, "query")
    for name, t in others.items():
        check_input(t, name)
        if t.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {t.dtype} but query has {query.dtype}: give all one dtype, "
                "for instance under torch.autocast or with .to()"
            )
        check_device(t, name, query, "query")


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise unless the shapes are [..., H, L, E], [..., Hkv, S, E] and [..., Hkv, S, Ev]."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() or query.dim() < 2:
        raise ValueError(f"{shapes}: give all three the same number of dimensions, 2 or more")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{shapes}: the last dimensions of query and key must be equal")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{shapes}: key and value must have the same length, dimension -2")
    if query.dim() > 2:
        heads, shared = query.shape[-3], key.shape[-3]
        if value.shape[-3] != shared:
            raise ValueError(f"{shapes}: key and value must have the same number of heads")
        if heads != shared and not enable_gqa and shared != 1 and heads != 1:
            raise ValueError(
                f"{shapes}: {heads} query heads and {shared} key heads; enable_gqa=True shares "
                "each key head among a group of query heads"
            )
        if enable_gqa and (shared == 0 or heads % shared):
            raise ValueError(
                f"{shapes}: with enable_gqa=True the number of key heads must divide the number "
                f"of query heads, {heads}"
            )
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"{shapes}: a head dimension of 0 leaves nothing to compute")


def check_mask(
    mask: Tensor | None, shape: Sequence[int], x: Tensor, name: str = "attn_mask"
) -> None:
    """Raise unless ``mask`` is None or a bool or float tensor that broadcasts to ``shape``."""
    if mask is None:
        return
    check_tensor(mask, name)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {mask.dtype}; give bool (True: takes part) or floating-point "
            f"(added to the scores): use {name}.bool()"
        )
    if mask.device != x.device:
        raise ValueError(f"{name} is on {mask.device} but the data is on {x.device}: move it")
    fits = mask.dim() <= len(shape) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, which does not broadcast to the scores' "
            f"{tuple(shape)}; each dimension, counted from the last, must be 1 or that size"
        )


def check_key_mask(mask: Tensor | None, batch: int, keys: int, x: Tensor) -> None:
    """Raise unless ``mask`` is None or bool of shape [batch, keys]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"key_mask is {given}; give a bool tensor, True where a key takes part: "
            "mask.bool(), or ~key_padding_mask for torch.nn's convention"
        )
    check_tensor(mask, "key_mask")
    if mask.device != x.device:
        raise ValueError(f"key_mask is on {mask.device} but the data is on {x.device}: move it")
    if tuple(mask.shape) != (batch, keys):
        raise ValueError(
            f"key_mask has shape {tuple(mask.shape)}; it must be (batch, keys) = {(batch, keys)}"
        )


def resolve_band(is_causal: bool, window: Window | None) -> tuple[int | None, int | None]:
    """The bounds of key - query that is_causal and window set together; None is no bound."""
    lower, upper = None, None
    if window is not None:
        pair = (window, window) if isinstance(window, (int, torch.SymInt)) else window
        if isinstance(pair, (tuple, list)) and len(pair) == 2:
            left, right = pair
        else:
            raise TypeError(
                f"{given(window, 'window')}; give (left, right), the number of keys before and "
                "after a query's own that it sees, None for no bound, or one int for both"
            )
        left, right = _reach(left, "left"), _reach(right, "right")
        lower = None if left is None else -left
        upper = right
    if is_causal:
        upper = 0  # a window to the right of 0 or more is cut
    return lower, upper


def _reach(size: int | None, name: str) -> int | None:
    """How far a window reaches; None where it has no bound, or one beyond all possible keys."""
    if size is None:
        return None
    size = check_whole(size, f"window's {name}", 0, "an int of 0 or more, or None for no bound")
    if not isinstance(size, torch.SymInt) and size >= max(ATTENTION_LIMITS.values()):
        return None
    return size


def typed(window: Any) -> Any:
    """A window as a part of a key, with the types of its numbers: True and 1 compare equal."""
    if isinstance(window, (tuple, list)):
        return (type(window), *window, *map(type, window))
    return window, type(window)


def resolve_origin(
    shard: Shard | tuple[Sequence[int], Sequence[int]] | None, shape: Sequence[int]
) -> tuple[int, int, int, int]:
    """The coordinates (batch, head, query, key) of the first score."""
    where = resolve_shard(shard, shape, flattened=False)
    if where is None:
        return (0, 0, 0, 0)
    check_attention_coordinates(where.global_shape)
    batch, head, query, key = where.origin
    return batch, head, query, key


def resolve_scale(value: float | None, default: float) -> float:
    """The factor of the scores, a finite number."""
    return default if value is None else check_finite(value, "scale")


def resolve_softcap(value: float | None) -> float:
    """The bound of the scores; 0 means no bound."""
    if value is None:
        return 0.0
    number = check_finite(value, "softcap")
    if number <= 0:
        raise ValueError(f"softcap = {value}; it must be positive and finite, or None for none")
    return number


def check_sinks(sinks: Tensor | None, heads: int, x: Tensor) -> None:
    """Raise unless ``sinks`` is None or a floating-point vector with one entry per query head."""
    if sinks is None:
        return
    check_input(sinks, "sinks")
    if tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}; it must be ({heads},), one logit per query head"
        )
    check_device(sinks, "sinks", x)


def check_packed(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """Raise unless the offsets are int32 or int64 vectors for one batch entry of packed tokens."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("give both cu_seqlens_q and cu_seqlens_k, or neither")
    for name, t, other in (
        ("cu_seqlens_q", cu_seqlens_q, query),
        ("cu_seqlens_k", cu_seqlens_k, key),
    ):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
            given = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"{name} is {given}; give an int32 tensor of sequences + 1 offsets, "
                "such as torch.tensor([0, 5, 12], dtype=torch.int32)"
            )
        check_tensor(t, name)
        if t.dim() != 1 or t.shape[0] < 2:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; it must be (sequences + 1,), the offsets of "
                "the sequences and the end of the last"
            )
        if t.device != query.device:
            raise ValueError(f"{name} is on {t.device} but query is on {query.device}: move it")
        if other.dim() not in (3, 4) or (other.dim() == 4 and other.shape[0] != 1):
            raise ValueError(
                f"with cu_seqlens, query, key and value are packed, [1, heads, tokens, dim] or "
                f"[heads, tokens, dim]; given shape {tuple(other.shape)}"
            )
        # Offsets on an accelerator cannot be read without waiting for it.
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            offsets = t.tolist()
            ordered = all(a <= b for a, b in itertools.pairwise(offsets))
            if offsets[0] != 0 or not ordered or offsets[-1] > other.shape[-2]:
                raise ValueError(
                    f"{name} = {offsets} for {other.shape[-2]} tokens; offsets begin at 0, never "
                    "fall, and end at the number of tokens or before"
                )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0] - 1} sequences, cu_seqlens_k "
            f"{cu_seqlens_k.shape[0] - 1}: give each sequence its queries and its keys"
        )


def resolve_longest(longest: int | None, tokens: int, offsets: Tensor, name: str) -> int:
    """A bound of the packed sequences' lengths; by default the number of tokens."""
    if longest is None:
        return tokens
    longest = check_whole(longest, name, 0)
    most = ATTENTION_LIMITS["query"]
    if not isinstance(longest, torch.SymInt) and longest > most:
        raise ValueError(f"{name} = {longest}; give {most} or less, or None")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        found = int(offsets.diff().max())
        if found > longest:
            raise ValueError(
                f"{name} = {longest}, but a sequence has {found} tokens: give {found} or more, or "
                "None"
            )
    return longest


class AttentionInputs(NamedTuple):
    """The tensors of one call: query [B, H, Sq, E], key [B, Hkv, Sk, E], value [B, Hkv, Sk, Ev].

    ``mask``, the attention mask, is bool or float and has four dimensions, each of size 1 or of the
    scores' size; ``key_mask`` is bool [B, Sk]; ``sinks`` is [H]. ``cu_query`` and ``cu_key`` are
    the offsets of sequences that are packed along the tokens: with them B is 1, and the batch of
    masks and coordinates is the number of sequences. ``p`` is a 0-d tensor that takes the place of
    ``options.p``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    sinks: Tensor | None = None
    cu_query: Tensor | None = None
    cu_key: Tensor | None = None
    seed: Tensor | None = None
    p: Tensor | None = None


def empty_output(query: Tensor, width: int) -> Tensor:
    """An empty tensor for the result, [B, H, Sq, width], laid out in memory as the query is.

    Where heads lie next to each other, as projections leave them, the transpose after attention is
    a view then.
    """
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, length, heads, width)).transpose(1, 2)
    return query.new_empty((batch, heads, length, width))
