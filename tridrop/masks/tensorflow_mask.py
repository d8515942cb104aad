"""tridrop's masks in TensorFlow, in one file that needs nothing else. Apache-2.0; contract 1.

It works in eager mode, in tf.function and under XLA. The shape and p are Python values. The seed
may be a tensor, so that a step that is traced once gets a new mask in each call.

>>> keep_mask(1, (8,), 0.5).numpy().tolist()
[True, False, True, False, True, False, True, True]
>>> @tf.function(autograph=False)
... def dropped(x, step):
...     keep = keep_mask(fold_in(1, step), x.shape.as_list(), 0.5)
...     return tf.where(keep, x, 0) * scale(0.5)
>>> dropped(tf.ones(8), tf.constant(0)).numpy().tolist()
[2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 2.0]
>>> dropped(tf.ones(8), tf.constant(1)).numpy().tolist()
[2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import tensorflow as tf

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


# ----- TensorFlow. Words are int64 numbers below 2^32; products wrap as those of uint64 do.

WORD = ONE - 1


def _i64(value: int) -> Any:
    return tf.constant((value + TWO63) % TWO64 - TWO63, tf.int64)


def _and(a: Any, b: int) -> Any:
    return tf.bitwise.bitwise_and(a, _i64(b))


def _or(a: Any, b: Any) -> Any:
    return tf.bitwise.bitwise_or(a, b)


def _xor(a: Any, b: Any, c: Any) -> Any:
    return tf.bitwise.bitwise_xor(a, tf.bitwise.bitwise_xor(b, c))


def _high(a: Any) -> Any:
    """The upper word; the copies of the sign that a shift makes are masked out."""
    return _and(tf.bitwise.right_shift(a, _i64(32)), WORD)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (tf.Tensor, tf.Variable))


def _seed_tensor(seed: Any) -> Any:
    """(seed, stream) as int64 of shape [2]."""
    if not _is_tensor(seed):
        return tf.stack([_i64(n) for n in _pair(seed)])
    if not seed.dtype.is_integer or tuple(seed.shape) not in ((), (2,)):
        raise TypeError(
            f"seed is {seed.dtype.name}{tuple(seed.shape)}; give integers of shape [2], which are "
            "(seed, stream), or an integer without dimensions"
        )
    seed = tf.cast(seed, tf.int64)
    return seed if seed.shape.rank else tf.stack([seed, tf.zeros_like(seed)])


def fold_in(seed: Any, stream: Any) -> Any:
    """The seed for call site ``stream`` under ``seed``; can be nested.

    For ints it is a pair (seed, stream). If the seed or ``stream`` is a tensor, it is an int64
    tensor (seed, stream), which keep_mask takes.
    """
    if not _is_tensor(seed) and not _is_tensor(stream):
        return _fold(seed, stream)
    first, old = tf.unstack(_seed_tensor(seed), num=2)
    if not _is_tensor(stream):
        stream = _i64(_whole(stream, "stream", -TWO63))
    elif not stream.dtype.is_integer or tuple(stream.shape):
        found = f"{stream.dtype.name}{tuple(stream.shape)}"
        raise TypeError(f"stream is {found}; give an integer without dimensions")
    return tf.stack([first, old * _i64(FOLD) + tf.cast(stream, tf.int64)])


def _key_words(seed: Any) -> tuple[Any, Any]:
    if not _is_tensor(seed):
        k0, k1 = _key(seed)
        return _i64(k0), _i64(k1)
    first, stream = tf.unstack(_seed_tensor(seed), num=2)
    key = first + stream * _i64(STREAM)
    return _and(key, WORD), _high(key)


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on int64 values below 2^32, in tensors that broadcast together."""
    for _ in range(10):
        a, b = c0 * _i64(0xD2511F53), c2 * _i64(0xCD9E8D57)
        c0, c1 = _xor(_high(b), c1, k0), _and(b, WORD)
        c2, c3 = _xor(_high(a), c3, k1), _and(a, WORD)
        k0, k1 = _and(k0 + 0x9E3779B9, WORD), _and(k1 + 0xBB67AE85, WORD)
    return c0, c1, c2, c3


def _decisions(words: tuple[Any, Any, Any, Any], p: float) -> Any:
    """[..., 4, 2]: the decisions of each word, and of the word with its halves swapped."""
    word = tf.stack(words, axis=-1)
    sixteen = _i64(16)
    up = _and(tf.bitwise.left_shift(word, sixteen), WORD)
    turned = _or(up, tf.bitwise.right_shift(word, sixteen))
    return tf.stack((word, turned), axis=-1) >= _i64(threshold(p))


def keep_mask(
    seed: Any,
    shape: Sequence[int],
    p: float,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: Any = None,
    domain: str = "elements",
) -> Any:
    """The mask of ``tridrop.keep_mask``: a bool tensor, True where an element is kept.

    Args:
        seed: an int or a pair (seed, stream) of ints in [-2^63, 2^63); or integer tensors: (seed,
            stream) of shape [2], as fold_in returns it, or a seed without dimensions.
        shape: the shape of the mask.
        p: the probability of dropping, in [0, 1].
        noise_shape: for each dimension 1, if the mask is shared along it, or its size or None.
        shard: (global_shape, origin) of the larger mask of which this is a piece.
        domain: "elements", or "drop_path" for a mask of whole samples.

    Raises:
        ValueError: p or the seed is out of range, or noise_shape or shard do not fit shape.
        TypeError: an argument has a wrong type.
    """
    shape, sizes, strides, first_row, first = _place(shape, noise_shape, shard, domain)
    row: Any = _i64(first_row)[None]
    for size, stride in zip(sizes, strides, strict=False):
        row = row[..., None] + tf.range(size, dtype=tf.int64) * _i64(stride)
    row = tf.reshape(row, (*sizes[:-1], 1))
    groups = (first + sizes[-1] + 7) // 8 - first // 8  # groups of eight columns
    group = tf.range(groups, dtype=tf.int64) + _i64(first // 8)
    last = _or(_high(group), _i64(DOMAINS[domain] << 28))
    words = philox(_and(group, WORD), _and(row, WORD), _high(row), last, *_key_words(seed))
    keep = tf.reshape(_decisions(words, p), (*sizes[:-1], groups * 8))
    keep = keep[..., first % 8 : first % 8 + sizes[-1]]
    return tf.broadcast_to(keep if shape else keep[0], shape)


def attention_keep_mask(seed: Any, shape: Sequence[int], p: float, *, shard: Any = None) -> Any:
    """The mask of ``tridrop.attention_keep_mask``: True where a probability is kept.

    Args:
        seed, p: as in :func:`keep_mask`.
        shape: (batch, heads, queries, keys).
        shard: (global_shape, origin) of the larger mask of which this is a piece.

    Raises:
        ValueError: p or the seed is out of range, the shape does not have four dimensions or
            exceeds the contract's limits, or shard does not fit shape.
        TypeError: an argument has a wrong type.
    """
    shape, origin = _attention_place(shape, shard)
    first, tiles = origin[3], (origin[3] + shape[3] + 31) // 32 - origin[3] // 32
    batch, head, query = (
        tf.reshape(tf.range(n, dtype=tf.int64) + o, [-1 if k == d else 1 for k in range(4)])
        for d, (n, o) in enumerate(zip(shape[:3], origin, strict=False))
    )
    group = tf.range(4 * tiles, dtype=tf.int64) + first // 32 * 4
    words = philox(query, group, batch, _or(head, _i64(2 << 28)), *_key_words(seed))
    # [..., tiles, pairs, octets, 2]: one Philox call decides one pair of each octet
    keep = tf.reshape(_decisions(words, p), (*shape[:3], tiles, 4, 4, 2))
    keep = tf.reshape(tf.transpose(keep, (0, 1, 2, 3, 5, 4, 6)), (*shape[:3], tiles * 32))
    return keep[..., first % 32 : first % 32 + shape[3]]
