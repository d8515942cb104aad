"""tridrop's masks in NumPy, in one file that needs nothing else. Apache-2.0; contract version 1.

The bits are defined by tridrop's docs/mask-contract.md, and are the same as those of the other
files in this folder.

>>> keep_mask(1, (8,), 0.5)
array([ True, False,  True, False,  True, False,  True,  True])
>>> x = np.ones((2, 4))
>>> np.where(keep_mask(1, x.shape, 0.5), x, 0) * scale(0.5)
array([[2., 0., 2., 0.],
       [2., 2., 0., 2.]])
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

# ----- Seeds, rates and coordinates in plain Python: the same lines in the file of each framework.

ONE, TWO63, TWO64 = 1 << 32, 1 << 63, 1 << 64
STREAM, FOLD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
DOMAINS = {"elements": 0, "drop_path": 1}
LIMITS = (1 << 32, 1 << 28, 1 << 32, 1 << 35)  # for attention: batch, heads, queries, keys


def threshold(p: float) -> int:
    """``T = round(p * 2^32)``, ties to even: an element is dropped if its bits are below T."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p is a {type(p).__name__}; give the probability of dropping, a number")
    if not 0 <= p <= 1:
        raise ValueError(f"p = {p} is not a probability; give a number in [0, 1]")
    return round(float(p) * ONE)


def scale(p: float) -> float:
    """The factor of kept elements: one over the exact probability of keeping; 0 if p is 1."""
    return ONE / (ONE - threshold(p)) if threshold(p) < ONE else 0.0


def _whole(value: Any, name: str, low: int = 0, high: int = TWO63) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} has {value!r}, a {type(value).__name__}; give integers")
    value = operator.index(value)
    if not low <= value < high:
        raise ValueError(f"{name} has {value}; give integers from {low} up to {high - 1}")
    return int(value)


def _sizes(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}; give a tuple of ints")
    return tuple(_whole(n, name) for n in values)


def _pair(seed: Any) -> tuple[int, int]:
    """The pair (seed, stream) for an int or such a pair."""
    entries = seed if isinstance(seed, (tuple, list)) else (seed, 0)
    if len(entries) != 2:
        raise ValueError(f"seed = {seed!r}; give an int or a pair (seed, stream)")
    first, stream = (_whole(n, "seed", -TWO63) for n in entries)
    return first, stream


def _fold(seed: Any, stream: int) -> tuple[int, int]:
    first, old = _pair(seed)
    folded = (old * FOLD + _whole(stream, "stream", -TWO63)) % TWO64
    return first, folded if folded < TWO63 else folded - TWO64


def _key(seed: Any) -> tuple[int, int]:
    """The two words of Philox's key."""
    first, stream = _pair(seed)
    key = (first + stream * STREAM) % TWO64
    return key % ONE, key // ONE


def _shard(shard: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pair (global_shape, origin), after checks."""
    if shard is None:
        return shape, (0,) * len(shape)
    whole, origin = (_sizes(part, "shard") for part in shard)
    fits = len(whole) == len(origin) == len(shape) and all(
        o + m <= n for o, m, n in zip(origin, shape, whole, strict=True)
    )
    if not fits:
        raise ValueError(
            f"shard = {(whole, origin)} for shape {shape}; give (global_shape, origin), each with "
            "an entry per dimension, and origin + shape within global_shape"
        )
    return whole, origin


def _place(
    shape: Sequence[int], noise_shape: Sequence[int | None] | None, shard: Any, domain: str
) -> tuple[tuple[int, ...], list[int], list[int], int, int]:
    """The shape, the sizes to draw, leading strides in rows, and the first row and column."""
    shape = _sizes(shape, "shape")
    if domain not in DOMAINS:
        raise ValueError(f"domain = {domain!r}; give one of {', '.join(DOMAINS)}")
    if domain == "drop_path":
        if noise_shape is not None or len(shape) < 2:
            raise ValueError(
                "domain = 'drop_path' is for two dimensions or more and has no noise_shape; "
                f"given shape {shape} and noise_shape {noise_shape}"
            )
        noise_shape = (None,) + (1,) * (len(shape) - 1)
    noise = (None,) * len(shape) if noise_shape is None else tuple(noise_shape)
    if len(noise) != len(shape) or any(
        n is not None and _whole(n, "noise_shape") not in (1, size)
        for n, size in zip(noise, shape, strict=True)
    ):
        raise ValueError(
            f"noise_shape = {noise} for shape {shape}; give for each dimension 1, if the mask is "
            "shared along it, or else its size or None"
        )
    whole, origin = _shard(shard, shape)
    if math.prod(whole) >= TWO63:
        raise ValueError(f"the global shape is {whole}, which is 2^63 elements or more")
    sizes = [min(1, m) if n == 1 else m for n, m in zip(noise, shape, strict=True)]
    start = [0 if n == 1 else o for n, o in zip(noise, origin, strict=True)]
    strides = [math.prod(whole[k + 1 : -1]) for k in range(len(shape) - 1)]
    row = sum(o * stride for o, stride in zip(start, strides, strict=False))
    return shape, sizes or [1], strides, row, (start or [0])[-1]


def _attention_place(shape: Sequence[int], shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the first coordinates of an attention mask."""
    shape = _sizes(shape, "shape")
    whole, origin = _shard(shard, shape)
    if len(whole) != 4 or any(n > limit for n, limit in zip(whole, LIMITS, strict=True)):
        raise ValueError(
            f"the global shape is {whole}; an attention mask has (batch, heads, queries, keys), "
            f"at most {LIMITS} of each"
        )
    return shape, origin


# ----- NumPy.

LOW, HALF, SIXTEEN = np.uint64(ONE - 1), np.uint64(32), np.uint64(16)


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10. All words are uint64 values below 2^32, in arrays or scalars."""
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & LOW, (a >> HALF) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def key(seed: Any) -> tuple[Any, Any]:
    """The two words of Philox's key, for an int or a pair (seed, stream)."""
    k0, k1 = _key(seed)
    return np.uint64(k0), np.uint64(k1)


def fold_in(seed: Any, stream: int) -> tuple[int, int]:
    """The pair (seed, stream) for call site ``stream`` under an int or a pair; can be nested."""
    return _fold(seed, stream)


def _lanes(words: tuple[Any, Any, Any, Any]) -> Any:
    """[..., 4, 2]: each word, and the word with its halves swapped."""
    word = np.stack(words, axis=-1)
    return np.stack((word, (word << SIXTEEN) & LOW | word >> SIXTEEN), axis=-1)


def bits(
    seed: Any,
    shape: Sequence[int],
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: Any = None,
    domain: str = "elements",
) -> Any:
    """The 32 bits of each decision, as uint64; the arguments are those of :func:`keep_mask`."""
    shape, sizes, strides, first_row, first = _place(shape, noise_shape, shard, domain)
    row: Any = np.full(1, first_row, np.uint64)
    for size, stride in zip(sizes, strides, strict=False):
        row = row[..., None] + np.arange(size, dtype=np.uint64) * np.uint64(stride)
    row = row.reshape(*sizes[:-1], 1)
    groups = (first + sizes[-1] + 7) // 8 - first // 8  # groups of eight columns
    group = np.arange(groups, dtype=np.uint64) + np.uint64(first // 8)
    last = group >> HALF | np.uint64(DOMAINS[domain] << 28)
    words = philox(group & LOW, row & LOW, row >> HALF, last, *key(seed))
    drawn = _lanes(words).reshape(*sizes[:-1], groups * 8)
    drawn = drawn[..., first % 8 : first % 8 + sizes[-1]]
    return np.broadcast_to(drawn if shape else drawn[0], shape)


def keep_mask(
    seed: Any,
    shape: Sequence[int],
    p: float,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: Any = None,
    domain: str = "elements",
) -> Any:
    """The mask of ``tridrop.keep_mask``: a bool array, True where an element is kept.

    Args:
        seed: an int or a pair (seed, stream) of ints in [-2^63, 2^63), as fold_in returns it.
        shape: the shape of the mask.
        p: the probability of dropping, in [0, 1].
        noise_shape: for each dimension 1, if the mask is shared along it, or its size or None.
        shard: (global_shape, origin) of the larger mask of which this is a piece.
        domain: "elements", or "drop_path" for a mask of whole samples.

    Raises:
        ValueError: p or the seed is out of range, or noise_shape or shard do not fit shape.
        TypeError: an argument has a wrong type.
    """
    drawn = bits(seed, shape, noise_shape=noise_shape, shard=shard, domain=domain)
    return drawn >= np.uint64(threshold(p))


def attention_bits(seed: Any, shape: Sequence[int], *, shard: Any = None) -> Any:
    """The 32 bits of each decision of attention, as uint64."""
    shape, origin = _attention_place(shape, shard)
    first, tiles = origin[3], (origin[3] + shape[3] + 31) // 32 - origin[3] // 32
    at = np.indices(shape[:3], dtype=np.uint64, sparse=True)
    batch, head, query = ((i + np.uint64(o))[..., None] for i, o in zip(at, origin, strict=False))
    group = np.arange(4 * tiles, dtype=np.uint64) + np.uint64(first // 32 * 4)
    words = philox(query, group, batch, head | np.uint64(2 << 28), *key(seed))
    # [..., tiles, pairs, octets, 2]: one Philox call decides one pair of each octet
    drawn = _lanes(words).reshape(*shape[:3], tiles, 4, 4, 2).swapaxes(-3, -2)
    return drawn.reshape(*shape[:3], tiles * 32)[..., first % 32 : first % 32 + shape[3]]


def attention_keep_mask(seed: Any, shape: Sequence[int], p: float, *, shard: Any = None) -> Any:
    """The mask of ``tridrop.attention_keep_mask``: True where a probability is kept.

    Args:
        seed: an int or a pair (seed, stream) of ints in [-2^63, 2^63), as fold_in returns it.
        shape: (batch, heads, queries, keys).
        p: the probability of dropping, in [0, 1].
        shard: (global_shape, origin) of the larger mask of which this is a piece.

    Raises:
        ValueError: p or the seed is out of range, the shape does not have four dimensions or
            exceeds the contract's limits, or shard does not fit shape.
        TypeError: an argument has a wrong type.
    """
    return attention_bits(seed, shape, shard=shard) >= np.uint64(threshold(p))
