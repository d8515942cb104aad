"""The mask contract in Triton. No other Triton file touches Philox, seeds or thresholds.

It is the twin of ``contract/mask.py``; tests compare the two bit for bit. Each decision is made in
the thread that holds the element. One Philox call decides on eight consecutive columns, which are
one 16-byte load of bf16 or fp16; in attention it decides on eight keys of a query, which one thread
holds in a tensor core's accumulator.
"""

import triton
import triton.language as tl

from .constant import Constant

M0 = Constant(0xD2511F53)
M1 = Constant(0xCD9E8D57)
W0 = Constant(0x9E3779B9)
W1 = Constant(0xBB67AE85)
STREAM_MULTIPLIER = Constant(0x9E3779B97F4A7C15)
LANES = Constant(8)

# What a mask covers.
NO_MASK = Constant(0)
ELEMENTS = Constant(1)  # one decision per element
ROWS = Constant(2)  # one decision per row: the mask is shared along the columns

# Domains: which family of masks a counter belongs to.
DOMAIN_ELEMENTS = Constant(0)
DOMAIN_DROP_PATH = Constant(1)
DOMAIN_ATTENTION = Constant(2)
DOMAIN_NORMAL = Constant(3)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counter words and key words that broadcast together."""
    for _ in tl.static_range(10):
        # This is one 64-bit product; mul.lo and mul.hi would be two multiplications.
        a = c0.to(tl.uint64) * M0
        b = c2.to(tl.uint64) * M1
        # The key is combined with c1 first. Otherwise LLVM would join the two xors into one of 64
        # bits, and would no longer see the two halves of one product.
        c0 = (b >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c3 = a.to(tl.uint32)
        k0 = (k0 + W0).to(tl.uint32)
        k1 = (k1 + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def load_key(seed):
    """The two key words of a seed tensor (seed, stream)."""
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    key += tl.load(seed + 1).to(tl.uint64, bitcast=True) * STREAM_MULTIPLIER
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def load_rate(table, threshold, scale):
    """(threshold, scale): the scalars, or the pair on the device if p is a tensor."""
    if table is not None:
        threshold = tl.load(table).to(tl.int64)
        scale = tl.load(table + 1).to(tl.float32)
    return threshold, scale


@triton.jit
def row_coordinates(row, leading):
    """The contract's row coordinate of each local row; see mask.Coordinates for ``leading``."""
    if len(leading) == 0:
        return row
    else:
        result = tl.zeros_like(row)
        for i in tl.static_range(len(leading)):
            result += (row % leading[i][0] + leading[i][1]) * leading[i][2]
            row = row // leading[i][0]
        return result


@triton.jit
def words_of(row, group, key, DOMAIN: tl.constexpr):
    """The four Philox words of each (row coordinate, column group): row [R, 1], group [1, G]."""
    # The words that are constant along a row are c1 and c2. ptxas then computes their products in
    # the first two rounds once for all groups of a thread.
    row = row.to(tl.uint64)
    group = group.to(tl.uint64)
    last = (group >> 32).to(tl.uint32) | (DOMAIN << 28)
    return philox(
        group.to(tl.uint32), row.to(tl.uint32), (row >> 32).to(tl.uint32), last, key[0], key[1]
    )


@triton.jit
def bits_of(row, group, key, DOMAIN: tl.constexpr):
    """The 32 bits of each decision of rows [R] and column groups [G]: uint32, [R, G * 8]."""
    w0, w1, w2, w3 = words_of(row[:, None], group[None, :], key, DOMAIN)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, G, 2, 2]: words in order
    words = tl.reshape(words, [row.shape[0], group.shape[0], 4])
    bits = tl.join(words, (words << 16) | (words >> 16))  # [R, G, 4, 2]
    return tl.reshape(bits, [row.shape[0], group.shape[0] * 8])


@triton.jit
def keep_elements(row, group, key, threshold, MAYBE_ZERO: tl.constexpr, DOMAIN: tl.constexpr):
    """The decisions of rows [R] and column groups [G]: bool, [R, G * 8]."""
    return _decide(bits_of(row, group, key, DOMAIN), threshold, MAYBE_ZERO)


@triton.jit
def keep_rows(row, key, threshold, MAYBE_ZERO: tl.constexpr, DOMAIN: tl.constexpr):
    """The decision of each row [R] at column coordinate 0: bool, [R]."""
    w0, _, _, _ = words_of(row, tl.zeros_like(row), key, DOMAIN)
    return _decide(w0, threshold, MAYBE_ZERO)


@triton.jit
def _decide(bits, threshold, MAYBE_ZERO: tl.constexpr):
    """bits >= threshold, where the threshold is an int64 in [0, 2^32]."""
    # The comparison is bits > threshold - 1, so that 2^32 (drop everything) fits 32 bits. A
    # threshold of 0 does not fit. Launchers leave such a mask out, so 0 is handled only where the
    # device alone knows the threshold.
    keep = bits > (threshold - 1).to(tl.uint32)
    if MAYBE_ZERO:
        keep = keep | (threshold == 0)
    return keep


@triton.jit
def score_words(
    query, tile, where, key, anchor, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The Philox words of a tile of scores: four of [QUERIES, KEYS / 32, 1, 4, 1].

    ``query`` is the coordinate of the first query, ``tile`` that of the first key divided by 32,
    ``where`` the pair (batch, head). ``anchor`` is 0 or :func:`layout_of` the scores.
    """
    row = (query + tl.arange(0, QUERIES)).to(tl.uint32)[:, None, None, None, None]
    group = (tile + tl.arange(0, KEYS // 32)).to(tl.uint32)[None, :, None, None, None] * 4
    group = group + tl.arange(0, 4).to(tl.uint32)[None, None, None, :, None]
    group = (group + anchor).to(tl.uint32)
    zero = tl.zeros([1, 1, 1, 1, 1], tl.uint32)
    batch = zero + where[0].to(tl.uint32)
    head = zero + (where[1].to(tl.uint32) | (DOMAIN_ATTENTION << 28))
    return philox(row, group, batch, head, key[0], key[1])


@triton.jit
def layout_of(score, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Zeros of the shape of :func:`score_words`, in a layout that follows from the scores (fp32).

    Without it, words that are carried to the next turn of a loop would have another layout and
    would pass through shared memory. A number shifted by 32 bits is 0: LLVM sees that, but the
    passes before it, which choose the layouts, do not.
    """
    nothing = (score.to(tl.uint32, bitcast=True) >> 31) >> 1
    nothing = tl.reshape(nothing, [QUERIES, KEYS // 32, 4, 4, 2])
    return tl.sum(tl.sum(nothing, axis=4), axis=2)[:, :, None, :, None]


@triton.jit
def decide_scores(
    words, threshold, MAYBE_ZERO: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The decisions of a tile of scores from :func:`score_words`: bool, [QUERIES, KEYS]."""
    # A call's words are broadcast over the tile, and each element selects its word by its indices.
    # The compiler then computes everything in the layout of the scores, where the selecting indices
    # are constants of a register, so that no shared memory, shuffle or select remains. (With join
    # and reshape the words would pass through shared memory: when the compiler moves a layout
    # conversion, it does not carry a product of 64 bits through two joins.)
    octet = tl.arange(0, 4)[None, None, :, None, None]
    odd = tl.arange(0, 2)[None, None, None, None, :]
    bits = _bits_of_keys(words, octet, odd)  # [QUERIES, KEYS / 32, 4, 4, 2]
    return _decide(tl.reshape(bits, [QUERIES, KEYS]), threshold, MAYBE_ZERO)


@triton.jit
def _bits_of_keys(words, octet, odd):
    """The bits of a call's keys: ``octet`` selects a word, and ``odd`` is 1 for its second half."""
    w0, w1, w2, w3 = words
    word = tl.where(octet < 2, tl.where(octet == 0, w0, w1), tl.where(octet == 2, w2, w3))
    return tl.where(odd == 0, word, (word << 16) | (word >> 16))


@triton.jit
def keep_scores(
    query, tile, where, key, threshold, MAYBE_ZERO: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The decisions of a tile of scores: bool, [QUERIES, KEYS]; see :func:`score_words`."""
    words = score_words(query, tile, where, key, 0, QUERIES, KEYS)
    return decide_scores(words, threshold, MAYBE_ZERO, QUERIES, KEYS)


@triton.jit
def keep_scores_flat(
    query, tile, where, key, threshold, MAYBE_ZERO: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """:func:`keep_scores` without an array of more than two dimensions.

    Triton divides the rows of a loop among groups of warps only where nothing is reshaped. Here
    each key computes its own call, and LLVM keeps one of the eight that are the same in a thread.
    """
    row = (query + tl.arange(0, QUERIES)).to(tl.uint32)[:, None]
    n = tl.arange(0, KEYS)
    group = (tile * 4).to(tl.uint32) + (n // 32 * 4 + n % 8 // 2).to(tl.uint32)
    zero = tl.zeros([1, 1], tl.uint32)
    batch = zero + where[0].to(tl.uint32)
    head = zero + (where[1].to(tl.uint32) | (DOMAIN_ATTENTION << 28))
    words = philox(row, group[None, :], batch, head, key[0], key[1])
    bits = _bits_of_keys(words, (n // 8 % 4)[None, :], (n % 2)[None, :])
    return _decide(bits, threshold, MAYBE_ZERO)


@triton.jit
def keep_score_rows(
    query, tile, where, key, threshold, MAYBE_ZERO: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """:func:`keep_scores` for a tile whose threads hold consecutive keys.

    Four such threads, with eight keys each, hold a group of 32 keys, and each of its four calls
    decides on keys of all four threads. Here each call is computed once in the tile, and its
    decisions are packed. The decisions of a group's four calls are joined to one word, which the
    four threads read.
    """
    row = (query + tl.arange(0, QUERIES)).to(tl.uint32)[:, None, None]
    group = (tile + tl.arange(0, KEYS // 32)).to(tl.uint32)[None, :, None] * 4
    call = tl.arange(0, 4).to(tl.uint32)[None, None, :]
    zero = tl.zeros([1, 1, 1], tl.uint32)
    batch = zero + where[0].to(tl.uint32)
    head = zero + (where[1].to(tl.uint32) | (DOMAIN_ATTENTION << 28))
    w0, w1, w2, w3 = philox(row, group + call, batch, head, key[0], key[1])
    # call i decides on the keys 2i and 2i + 1 of each octet
    decided = _pair(w0, 1, threshold, MAYBE_ZERO) | _pair(w1, 1 << 8, threshold, MAYBE_ZERO)
    decided = decided | _pair(w2, 1 << 16, threshold, MAYBE_ZERO)
    decided = decided | _pair(w3, 1 << 24, threshold, MAYBE_ZERO)
    word = tl.sum(decided << (call * 2), axis=2)  # bits do not overlap: [QUERIES, KEYS / 32]
    # A scan over one element changes nothing, but the compiler moves no layout conversion past it.
    # Without the scan it would compute the words again in each thread that reads them (for rows of
    # 1001 keys, 118 instructions per element and spills instead of 49).
    word = tl.cumsum(word[:, :, None], axis=2)
    octet = word >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]
    bit = tl.full([1], 1, tl.uint32) << tl.arange(0, 8).to(tl.uint32)
    keep = (octet[:, :, :, None] & bit[None, None, None, :]) != 0
    return tl.reshape(keep, [QUERIES, KEYS])


@triton.jit
def _pair(word, BIT: tl.constexpr, threshold, MAYBE_ZERO: tl.constexpr):
    """The two decisions of a word as two neighbouring bits."""
    first = tl.where(_decide(word, threshold, MAYBE_ZERO), BIT, 0).to(tl.uint32)
    turned = (word << 16) | (word >> 16)
    return tl.where(_decide(turned, threshold, MAYBE_ZERO), first | (2 * BIT), first).to(tl.uint32)
