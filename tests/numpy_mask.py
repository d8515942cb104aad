"""The mask contract in NumPy. This is the listing of docs/mask-contract.md, word for word."""

import numpy as np

TWO32, TWO64 = 1 << 32, 1 << 64
LOW, HALF = np.uint64(TWO32 - 1), np.uint64(32)


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: all words are uint64 values below 2^32, in arrays or scalars."""
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & LOW, (a >> HALF) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def key(seed, stream):
    k = (seed + stream * 0x9E3779B97F4A7C15) % TWO64
    return np.uint64(k % TWO32), np.uint64(k // TWO32)


def fold_in(seed, old_stream, stream):
    folded = (old_stream * 0xD1342543DE82EF95 + stream) % TWO64
    return seed, folded if folded < TWO64 // 2 else folded - TWO64  # as int64


def threshold(p):
    return round(p * TWO32)  # Python's round: half to even


def scale(p):
    t = threshold(p)
    return TWO32 / (TWO32 - t) if t < TWO32 else 0.0


def bits_of_lane(words, lane):
    word = np.choose(lane // 2, words)
    rotated = (word << np.uint64(16)) & LOW | word >> np.uint64(16)
    return np.where(lane % 2 == 1, rotated, word)


def bits(seed, stream, shape, noise_shape=None, global_shape=None, origin=None, domain=0):
    """The 32 bits of each decision; an entry 1 of noise_shape marks a shared dimension."""
    if len(shape) == 0:
        return bits(seed, stream, (1,), domain=domain).reshape(())
    shared = [n == 1 for n in noise_shape or [None] * len(shape)]
    index = []
    for dim, i in enumerate(np.indices(shape, dtype=np.uint64, sparse=True)):
        start = np.uint64(0 if origin is None else origin[dim])
        index.append(i * np.uint64(0) if shared[dim] else i + start)
    row = np.zeros((1,) * len(shape), np.uint64)
    for i, size in zip(index[:-1], global_shape or shape, strict=False):
        row = row * np.uint64(size) + i
    group, lane = index[-1] // np.uint64(8), index[-1].astype(np.int64) % 8
    last = (group >> HALF) | np.uint64(domain << 28)
    words = philox(group & LOW, row & LOW, row >> HALF, last, *key(seed, stream))
    return np.broadcast_to(bits_of_lane(words, lane), shape)


def keep_mask(seed, stream, shape, p, **where):
    """True where an element is kept; ``where`` holds the other arguments of bits()."""
    return bits(seed, stream, shape, **where) >= np.uint64(threshold(p))


def attention_bits(seed, stream, shape, origin=(0, 0, 0, 0)):
    """The 32 bits of each decision of attention; shape is (batch, heads, queries, keys)."""
    index = np.indices(shape, dtype=np.uint64, sparse=True)
    batch, head, query, at = (i + np.uint64(o) for i, o in zip(index, origin, strict=True))
    group = at // np.uint64(32) * np.uint64(4) + at % np.uint64(8) // np.uint64(2)
    lane = at // np.uint64(8) % np.uint64(4) * np.uint64(2) + at % np.uint64(2)
    words = philox(query, group, batch, head | np.uint64(2 << 28), *key(seed, stream))
    return bits_of_lane(words, lane.astype(np.int64))


def attention_keep_mask(seed, stream, shape, p, origin=(0, 0, 0, 0)):
    """True where a probability is kept."""
    return attention_bits(seed, stream, shape, origin) >= np.uint64(threshold(p))
