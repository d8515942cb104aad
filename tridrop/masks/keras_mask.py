"""tridrop's masks in keras.ops, in one file that needs nothing else. Apache-2.0; contract version
1.

It works on every backend of Keras 3, eager and compiled, since all arithmetic is int32, which every
backend has. The shape and p are Python values. The seed may be a tensor, so that a step that is
compiled once gets a new mask in each call.

>>> ops.convert_to_numpy(keep_mask(1, (8,), 0.5)).tolist()
[True, False, True, False, True, False, True, True]
>>> keep = keep_mask(fold_in(1, ops.convert_to_tensor(1)), (8,), 0.5)
>>> ops.convert_to_numpy(ops.where(keep, ops.ones(8), 0.0) * scale(0.5)).tolist()
[2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import keras
from keras import ops

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


# ----- keras.ops. Words are int32 with the bits of uint32: sums and products wrap, and the copies
# of the sign that a shift makes are masked out. A 64-bit number is a pair (high, low) of words.


def _i32(value: int) -> Any:
    return ops.convert_to_tensor((value + (ONE >> 1)) % ONE - (ONE >> 1), "int32")


def _shifted(a: Any, places: int) -> Any:
    """``a >> places`` for an unsigned word."""
    return ops.bitwise_and(ops.right_shift(a, _i32(places)), _i32((ONE >> places) - 1))


def _below(a: Any, b: Any) -> Any:
    """``a < b`` for unsigned words: with the top bit flipped, they are ordered as int32."""
    return ops.less(ops.bitwise_xor(a, _i32(1 << 31)), ops.bitwise_xor(b, _i32(1 << 31)))


def _product(a: Any, b: int) -> tuple[Any, Any]:
    """(high, low) of a word times a number below 2^32, computed by 16-bit halves."""
    low, high, half = _i32(b & 0xFFFF), _i32(b >> 16), _i32(0xFFFF)
    a_low, a_high = ops.bitwise_and(a, half), _shifted(a, 16)
    middle = a_high * low + _shifted(a_low * low, 16)
    carry = _shifted(a_low * high + ops.bitwise_and(middle, half), 16)
    return a_high * high + _shifted(middle, 16) + carry, a * _i32(b)


def _sum(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    low = a[1] + b[1]
    return a[0] + b[0] + ops.cast(_below(low, a[1]), "int32"), low


def _times(a: tuple[Any, Any], b: int) -> tuple[Any, Any]:
    """A pair times an int, modulo 2^64."""
    high, low = _product(a[1], b % ONE)
    return high + a[0] * _i32(b % ONE) + a[1] * _i32(b >> 32), low


def _is_tensor(value: Any) -> bool:
    return keras.utils.is_keras_tensor(value) or bool(ops.is_tensor(value))


def _words_of(value: Any, name: str) -> tuple[Any, Any]:
    """The pair (high, low) for an int or an integer scalar."""
    if not _is_tensor(value):
        value = _whole(value, name, -TWO63)
        return _i32(value >> 32), _i32(value)
    dtype = keras.backend.standardize_dtype(value.dtype)
    if tuple(value.shape) or dtype not in ("int8", "int16", "int32", "int64", "uint8", "uint16"):
        found = f"{dtype}{tuple(value.shape)}"
        raise TypeError(f"{name} is {found}; give an int64 or smaller integer without dimensions")
    if dtype == "int64":
        word = ops.bitwise_and(value, ops.convert_to_tensor(ONE - 1, "int64"))
        word = ops.where(word < ONE >> 1, word, word - ONE)  # the same bits as an int32
        high = ops.right_shift(value, ops.convert_to_tensor(32, "int64"))
        return ops.cast(high, "int32"), ops.cast(word, "int32")
    word = ops.cast(value, "int32")
    return ops.right_shift(word, _i32(31)), word


def _seed_words(seed: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    if _is_tensor(seed) and len(seed.shape):
        dtype = keras.backend.standardize_dtype(seed.dtype)
        if tuple(seed.shape) != (4,) or dtype != "int32":
            raise TypeError(f"seed is {dtype}{tuple(seed.shape)}; give what fold_in returns")
        return (seed[0], seed[1]), (seed[2], seed[3])
    if _is_tensor(seed):
        return _words_of(seed, "seed"), (_i32(0), _i32(0))
    first, stream = _pair(seed)
    return _words_of(first, "seed"), _words_of(stream, "seed")


def fold_in(seed: Any, stream: Any) -> Any:
    """The seed for call site ``stream`` under ``seed``; can be nested.

    For ints it is a pair (seed, stream). If the seed or ``stream`` is a tensor, it is a tensor of
    four int32 words, which keep_mask takes.
    """
    if not _is_tensor(seed) and not _is_tensor(stream):
        return _fold(seed, stream)
    first, old = _seed_words(seed)
    return ops.stack((*first, *_sum(_times(old, FOLD), _words_of(stream, "stream"))))


def _key_words(seed: Any) -> tuple[Any, Any]:
    if not _is_tensor(seed):
        k0, k1 = _key(seed)
        return _i32(k0), _i32(k1)
    first, stream = _seed_words(seed)
    k1, k0 = _sum(first, _times(stream, STREAM))
    return k0, k1


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on int32 words, in tensors that broadcast together."""
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1 = ops.bitwise_xor(b_high, ops.bitwise_xor(c1, k0)), b_low
        c2, c3 = ops.bitwise_xor(a_high, ops.bitwise_xor(c3, k1)), a_low
        k0, k1 = k0 + _i32(0x9E3779B9), k1 + _i32(0xBB67AE85)
    return c0, c1, c2, c3


def _decisions(words: tuple[Any, Any, Any, Any], shape: tuple[int, ...], p: float) -> Any:
    """[*shape, 4, 2]: the decisions of each word, and of the word with its halves swapped."""
    word = ops.stack([ops.broadcast_to(w, shape) for w in words], axis=-1)
    turned = ops.bitwise_or(ops.left_shift(word, _i32(16)), _shifted(word, 16))
    drawn = ops.stack((word, turned), axis=-1)
    t = threshold(p)
    if t == ONE:
        return ops.zeros(drawn.shape, "bool")
    return ops.logical_not(_below(drawn, _i32(t)))


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
        seed: an int or a pair (seed, stream) of ints in [-2^63, 2^63); an integer tensor without
            dimensions; or what fold_in returns.
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
    row: Any = (_i32(first_row >> 32)[None], _i32(first_row)[None])
    for size, stride in zip(sizes, strides, strict=False):
        along = ops.arange(size, dtype="int32")
        step = _times((ops.zeros_like(along), along), stride)
        row = _sum((row[0][..., None], row[1][..., None]), step)
    high, low = (ops.reshape(word, (*sizes[:-1], 1)) for word in row)
    groups = (first + sizes[-1] + 7) // 8 - first // 8  # groups of eight columns
    along = ops.arange(groups, dtype="int32")
    start = (_i32(first // 8 >> 32), _i32(first // 8))
    group = _sum(start, (ops.zeros_like(along), along))
    last = ops.bitwise_or(group[0], _i32(DOMAINS[domain] << 28))
    words = philox(group[1], low, high, last, *_key_words(seed))
    keep = _decisions(words, (*sizes[:-1], groups), p)
    keep = ops.reshape(keep, (*sizes[:-1], groups * 8))[..., first % 8 : first % 8 + sizes[-1]]
    return ops.broadcast_to(keep if shape else keep[0], shape)


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
        ops.reshape(ops.arange(n, dtype="int32") + _i32(o), [n if k == d else 1 for k in range(4)])
        for d, (n, o) in enumerate(zip(shape[:3], origin, strict=False))
    )
    group = ops.arange(4 * tiles, dtype="int32") + _i32(first // 32 * 4)
    head = ops.bitwise_or(head, _i32(2 << 28))
    words = philox(query, group, batch, head, *_key_words(seed))
    keep = _decisions(words, (*shape[:3], 4 * tiles), p)
    # [..., tiles, pairs, octets, 2]: one Philox call decides one pair of each octet
    keep = ops.transpose(ops.reshape(keep, (*shape[:3], tiles, 4, 4, 2)), (0, 1, 2, 3, 5, 4, 6))
    keep = ops.reshape(keep, (*shape[:3], tiles * 32))
    return keep[..., first % 32 : first % 32 + shape[3]]
