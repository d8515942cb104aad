"""tridrop's masks in JAX, in one file that needs nothing else. Apache-2.0; contract version 1.

It works under jit and without jax_enable_x64, since all arithmetic is 32-bit. The shape and p are
static. The seed may be an array, so that a step that is compiled once gets a new mask in each call.

>>> keep_mask(1, (8,), 0.5).tolist()
[True, False, True, False, True, False, True, True]
>>> @jax.jit
... def dropped(x, step):
...     keep = keep_mask(fold_in(1, step), x.shape, 0.5)
...     return jnp.where(keep, x, 0) * scale(0.5)
>>> dropped(jnp.ones(8), 0).tolist()
[2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 2.0]
>>> dropped(jnp.ones(8), 1).tolist()
[2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

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


# ----- JAX. A 64-bit number is a pair (high, low) of uint32.


def _u32(value: int) -> Any:
    return jnp.asarray(value % ONE, jnp.uint32)


def _product(a: Any, b: int) -> tuple[Any, Any]:
    """(high, low) of a uint32 array times a number below 2^32, computed by 16-bit halves."""
    low, high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    a_low, a_high = a & jnp.uint32(0xFFFF), a >> 16
    middle = a_high * low + (a_low * low >> 16)
    carry = (a_low * high + (middle & jnp.uint32(0xFFFF))) >> 16
    return a_high * high + (middle >> 16) + carry, a * jnp.uint32(b)


def _sum(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _times(a: tuple[Any, Any], b: int) -> tuple[Any, Any]:
    """A pair times an int, modulo 2^64."""
    high, low = _product(a[1], b % ONE)
    return high + a[0] * _u32(b % ONE) + a[1] * _u32(b >> 32), low


def _words_of(value: Any, name: str) -> tuple[Any, Any]:
    """The pair (high, low) for an int or an integer scalar, which may be traced."""
    if not isinstance(value, jax.Array):
        value = _whole(value, name, -TWO63)
        return _u32(value >> 32), _u32(value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} is {value.dtype}{value.shape}; give an integer without dimensions")
    if value.dtype.itemsize == 8:
        return (value >> 32).astype(jnp.uint32), value.astype(jnp.uint32)
    negative = value < 0
    return jnp.where(negative, _u32(-1), _u32(0)), value.astype(jnp.uint32)


def _seed_words(seed: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    if isinstance(seed, jax.Array) and seed.shape:
        if seed.shape != (4,) or seed.dtype != jnp.uint32:
            raise TypeError(f"seed is {seed.dtype}{seed.shape}; give what fold_in returns")
        return (seed[0], seed[1]), (seed[2], seed[3])
    if isinstance(seed, jax.Array):
        return _words_of(seed, "seed"), (_u32(0), _u32(0))
    first, stream = _pair(seed)
    return _words_of(first, "seed"), _words_of(stream, "seed")


def fold_in(seed: Any, stream: Any) -> Any:
    """The seed for call site ``stream`` under ``seed``; can be nested.

    For ints it is a pair (seed, stream). If the seed or ``stream`` is an array, which may be
    traced, it is an array of four uint32 words, which keep_mask takes.
    """
    if not isinstance(seed, jax.Array) and not isinstance(stream, jax.Array):
        return _fold(seed, stream)
    first, old = _seed_words(seed)
    return jnp.stack((*first, *_sum(_times(old, FOLD), _words_of(stream, "stream"))))


def _key_words(seed: Any) -> tuple[Any, Any]:
    if not isinstance(seed, jax.Array):
        k0, k1 = _key(seed)
        return _u32(k0), _u32(k1)
    first, stream = _seed_words(seed)
    k1, k0 = _sum(first, _times(stream, STREAM))
    return k0, k1


@jax.jit  # for callers that are not compiled
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on uint32 words, in arrays that broadcast together."""
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = k0 + jnp.uint32(0x9E3779B9), k1 + jnp.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def _decisions(words: tuple[Any, Any, Any, Any], p: float) -> Any:
    """[..., 4, 2]: the decisions of each word, and of the word with its halves swapped."""
    word = jnp.stack(words, axis=-1)
    drawn = jnp.stack((word, word << 16 | word >> 16), axis=-1)
    t = threshold(p)
    return drawn >= jnp.uint32(t) if t < ONE else jnp.zeros(drawn.shape, bool)


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
        seed: an int or a pair (seed, stream) of ints in [-2^63, 2^63); an integer array without
            dimensions; or what fold_in returns. Arrays may be traced.
        shape: the shape of the mask, static.
        p: the probability of dropping, in [0, 1], static.
        noise_shape: for each dimension 1, if the mask is shared along it, or its size or None.
        shard: (global_shape, origin) of the larger mask of which this is a piece.
        domain: "elements", or "drop_path" for a mask of whole samples.

    Raises:
        ValueError: p or the seed is out of range, or noise_shape or shard do not fit shape.
        TypeError: an argument has a wrong type.
    """
    shape, sizes, strides, first_row, first = _place(shape, noise_shape, shard, domain)
    row: Any = (_u32(first_row >> 32)[None], _u32(first_row)[None])
    for size, stride in zip(sizes, strides, strict=False):
        along = jnp.arange(size, dtype=jnp.uint32)
        step = _times((jnp.zeros_like(along), along), stride)
        row = _sum((row[0][..., None], row[1][..., None]), step)
    high, low = (word.reshape(*sizes[:-1], 1) for word in row)
    groups = (first + sizes[-1] + 7) // 8 - first // 8  # groups of eight columns
    start = (_u32(first // 8 >> 32), _u32(first // 8))
    along = jnp.arange(groups, dtype=jnp.uint32)
    group = _sum(start, (jnp.zeros_like(along), along))
    last = group[0] | jnp.uint32(DOMAINS[domain] << 28)
    words = philox(group[1], low, high, last, *_key_words(seed))
    words = tuple(jnp.broadcast_to(word, (*sizes[:-1], groups)) for word in words)
    keep = _decisions(words, p).reshape(*sizes[:-1], groups * 8)
    keep = keep[..., first % 8 : first % 8 + sizes[-1]]
    return jnp.broadcast_to(keep if shape else keep[0], shape)


def attention_keep_mask(seed: Any, shape: Sequence[int], p: float, *, shard: Any = None) -> Any:
    """The mask of ``tridrop.attention_keep_mask``: True where a probability is kept.

    Args:
        seed, p: as in :func:`keep_mask`.
        shape: (batch, heads, queries, keys), static.
        shard: (global_shape, origin) of the larger mask of which this is a piece.

    Raises:
        ValueError: p or the seed is out of range, the shape does not have four dimensions or
            exceeds the contract's limits, or shard does not fit shape.
        TypeError: an argument has a wrong type.
    """
    shape, origin = _attention_place(shape, shard)
    first, tiles = origin[3], (origin[3] + shape[3] + 31) // 32 - origin[3] // 32
    batch, head, query = (
        (jnp.arange(n, dtype=jnp.uint32) + _u32(o)).reshape([-1 if k == d else 1 for k in range(4)])
        for d, (n, o) in enumerate(zip(shape[:3], origin, strict=False))
    )
    group = jnp.arange(4 * tiles, dtype=jnp.uint32) + _u32(first // 32 * 4)
    words = philox(query, group, batch, head | jnp.uint32(2 << 28), *_key_words(seed))
    # [..., tiles, pairs, octets, 2]: one Philox call decides one pair of each octet
    keep = _decisions(words, p).reshape(*shape[:3], tiles, 4, 4, 2).swapaxes(-3, -2)
    return keep.reshape(*shape[:3], tiles * 32)[..., first % 32 : first % 32 + shape[3]]
