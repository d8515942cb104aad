"""The mask contract of attention, as randomness: rates, lanes, correlations, repetitions.

As in test_mask_statistics.py: seeds are fixed, and every bound is a quantile of the distribution
that independent decisions would have, at a false-alarm level of ALPHA a test.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hosts import DEVICE
from scipy import stats
from test_mask_statistics import (
    ALPHA,
    assert_binomial,
    assert_chi_square,
    assert_distinct,
    both_dropped,
    fingerprints,
    pattern_counts,
    rate_of,
)
from torch import Tensor

import tridrop
from tridrop.contract.mask import key_of, threshold
from tridrop.spec.elementwise import ATTENTION_LIMITS

LIMITS = tuple(ATTENTION_LIMITS.values())
DIMS = ["batch", "head", "query", "key"]


def mask(shape, p=0.5, seed=0, stream=0, origin=(0, 0, 0, 0)) -> Tensor:
    shard = tridrop.Shard(LIMITS, tuple(origin))
    pair = torch.tensor([seed, stream], device=DEVICE)
    return tridrop.attention_keep_mask(pair, shape, p, shard=shard)


def by_call(keep: Tensor) -> Tensor:
    """The decisions of each Philox call, the eight lanes in the contract's order: [calls, 8]."""
    tiles = keep.reshape(-1, 4, 4, 2)  # octets, pairs, halves
    return tiles.transpose(1, 2).reshape(-1, 8)


@functools.lru_cache(maxsize=2)
def calls(p: float, seed: int) -> Tensor:
    """Calls of a large mask with several sequences and heads: bool, [2^19, 8]."""
    return by_call(mask((4, 8, 128, 1024), p, seed))


# ----------------------------------------------------------------------- one decision


@pytest.mark.parametrize("p", [1e-5, 1e-4, 0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999, 1 - 1e-5])
def test_rate_of_dropping_is_p(p):
    keep = calls(p, 1)
    # The lanes of one word are not independent; one lane of each word is.
    for half in (0, 1):
        lanes = keep[:, half::2]
        assert_binomial((~lanes).sum(), lanes.numel(), rate_of(p), tests=2)


def test_rate_is_p_along_every_coordinate():
    """No sequence, head, query or key has more than its share."""
    p = 0.1
    keep = mask((16, 16, 64, 256), p, seed=2)
    tests = 2 * sum(keep.shape)
    for dim in range(4):
        others = [d for d in range(4) if d != dim]
        for half in (0, 1):  # of each word, where the keys are not looked at one by one
            lanes = keep[..., half::2] if dim != 3 else keep
            dropped = (~lanes).sum(others)
            n = lanes.numel() // lanes.shape[dim]
            for extreme in (dropped.min(), dropped.max()):
                assert_binomial(extreme, n, rate_of(p), tests)


def test_decisions_are_uniform_over_the_range_of_p():
    """How many of the p = 1/16, 2/16, ... still keep an element is uniform over 0 .. 15."""
    level = sum(mask((2, 4, 128, 512), k / 16, seed=3).to(torch.int64) for k in range(1, 16))
    for lanes in level.view(-1, 2).T:
        counts = torch.bincount(lanes, minlength=16).tolist()
        assert_chi_square(counts, [lanes.numel() / 16] * 16, 15)


# ------------------------------------------------------------- the eight lanes of a call


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_all_lanes_drop_equally_often(p):
    keep, rate = calls(p, 4), rate_of(p)
    n = len(keep)
    counts = torch.stack(((~keep).sum(0), keep.sum(0))).cpu()
    # Eight known rates, nothing estimated: a degree of freedom a lane.
    assert_chi_square(counts, [[n * rate] * 8, [n * (1 - rate)] * 8], 8)


def test_all_256_patterns_of_a_call_are_equally_frequent():
    # At p = 0.5 a decision is one bit of a word, so even lanes of one word are independent.
    keep = calls(0.5, 5)
    assert_chi_square(pattern_counts(keep), [len(keep) / 256] * 256, 255)


def test_all_256_patterns_of_eight_consecutive_keys_are_equally_frequent():
    """An octet has two lanes of each of four calls."""
    keep = mask((4, 8, 128, 1024), seed=5).reshape(-1, 8)
    assert_chi_square(pattern_counts(keep), [len(keep) / 256] * 256, 255)


@pytest.mark.parametrize("halves", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 1, 0)])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
def test_the_four_words_are_jointly_independent(p, halves):
    keep, rate = calls(p, 6), rate_of(p)
    lanes = keep[:, [2 * word + half for word, half in enumerate(halves)]]
    kept = [bin(pattern).count("1") for pattern in range(16)]
    expected = [len(keep) * (1 - rate) ** k * rate ** (4 - k) for k in kept]
    assert_chi_square(pattern_counts(lanes), expected, 15)


@pytest.mark.parametrize("p", [1e-4, 0.001, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_every_pair_of_lanes_drops_together_at_the_expected_rate(p):
    drop = ~calls(p, 7)
    for i, j in itertools.combinations(range(8), 2):
        same_word = i // 2 == j // 2
        both = both_dropped(threshold(p)) / 2**32 if same_word else rate_of(p) ** 2
        assert_binomial((drop[:, i] & drop[:, j]).sum(), len(drop), both, tests=28)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.3, 0.5])
def test_lanes_of_a_word_share_nothing_but_ties(p):
    """Over more words: a rotation by 8, with a correlation of 2^-8, would be seen."""
    drop = ~mask((4, 8, 256, 2048), p, seed=11).view(-1, 2)
    assert_binomial((drop[:, 0] & drop[:, 1]).sum(), len(drop), both_dropped(threshold(p)) / 2**32)


# ------------------------------------------------------------------------ correlations

LAGS = [*range(1, 65), 127, 128, 255, 256, 500]
SHAPES = {
    "batch": (1024, 2, 16, 32),
    "head": (2, 1024, 16, 32),
    "query": (1, 2, 1024, 512),
    "key": (1, 2, 512, 1024),
}


@pytest.mark.parametrize("axis", DIMS)
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_no_correlation_at_any_lag(axis, p):
    rate, dim = rate_of(p), DIMS.index(axis)
    x = (mask(SHAPES[axis], p, seed=8).float() - (1 - rate)) / math.sqrt(rate * (1 - rate))
    t = threshold(p)
    in_a_word = (both_dropped(t) * 2**32 - t * t) / (t * (2**32 - t))
    bound = stats.norm.isf(ALPHA / 2 / len(LAGS))
    for lag in LAGS:
        n = x.shape[dim] - lag
        products = x.narrow(dim, lag, n) * x.narrow(dim, 0, n)
        # Products of independent standardised decisions are uncorrelated and of variance 1.
        mean, sigma = products.double().mean().item(), products.numel() ** -0.5
        # Every second neighbour shares a word.
        expected = in_a_word / 2 if lag == 1 and axis == "key" else 0
        assert abs(mean - expected) < bound * sigma, lag


def assert_uncorrelated(masks: list[Tensor]) -> None:
    """Masks of one size at p = 0.5: each two agree in half of the places."""
    signs = torch.stack([m.flatten() for m in masks]).float() * 2 - 1
    n = signs.shape[1]
    agree = ((signs @ signs.T).double() + n) / 2  # whole numbers, exact in fp32
    pairs = list(itertools.combinations(range(len(masks)), 2))
    extremes = [agree[i, j].item() for i, j in pairs]
    assert_binomial(min(extremes), n, 0.5, tests=len(pairs))
    assert_binomial(max(extremes), n, 0.5, tests=len(pairs))


def steps(dim: int, at: list[int]) -> list[dict]:
    return [{"origin": [n if d == dim else 0 for d in range(4)]} for n in at]


def powers(dim: int) -> list[dict]:
    """Places whose coordinates differ in one bit, past the size of a piece."""
    return steps(
        dim, [0, *(1 << b for b in range(10 if dim > 1 else 0, 36) if 1 << b < LIMITS[dim])]
    )


FAMILIES = {
    "consecutive_sequences": steps(0, list(range(64))),
    "consecutive_heads": steps(1, list(range(64))),
    **{f"{name}_of_one_bit": powers(dim) for dim, name in enumerate(DIMS)},
    "sequence_and_head": [{"origin": (b, h, 0, 0)} for b in range(8) for h in range(8)],
    # the same number in two coordinates, so that swapped words of the counter would show
    "swapped": [
        {"origin": tuple(1024 if d in two else 0 for d in range(4))}
        for two in itertools.combinations(range(4), 2)
    ],
    "consecutive_seeds": [{"seed": s} for s in range(-16, 16)],
    "seeds_of_one_bit": [{"seed": 1 << b} for b in range(63)],
    "streams_of_one_bit": [{"seed": 5, "stream": 1 << b} for b in range(63)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_different_places_and_seeds_are_uncorrelated(family):
    assert_uncorrelated([mask((1, 1, 32, 1024), 0.5, **where) for where in FAMILIES[family]])


def test_attention_shares_nothing_with_the_masks_of_elements():
    """A counter of attention differs from one of elements in the domain at least."""
    n = 128
    # Elements have the counter (group, row, row >> 32, group >> 32), attention (query, group, ...).
    attention = by_call(mask((1, 1, n, 8 * n), seed=9)).view(n, n, 8)  # [query, group, lane]
    elements = tridrop.keep_mask(9, (n, 8 * n), 0.5, device=DEVICE).view(n, n, 8)
    paths = tridrop.keep_mask(9, (n * n, 1), 0.5, domain="drop_path", device=DEVICE)
    assert_uncorrelated([attention, elements, elements.transpose(0, 1)])
    assert_uncorrelated([attention.view(-1, 8)[:, 0], paths])
    # As they lie in memory, and displaced.
    flat, other = mask((1, 1, n, 8 * n), seed=9).flatten(), elements.flatten()
    for lag in range(64):
        size = len(flat) - lag
        assert_binomial((flat[lag:] == other[:size]).sum(), size, 0.5, tests=64)
    calls = by_call(mask((2, 2, 64, 2048), seed=9)).view(-1, 64)
    rows = tridrop.keep_mask(9, (1 << 14, 64), 0.5, device=DEVICE)
    assert_distinct(torch.cat((calls, rows)))


# -------------------------------------------------------------------------- repetitions

LONG = 1 << 16
STARTS = [0, 1 << 16, (1 << 31) - (1 << 15), (1 << 32) - LONG]


def test_no_query_repeats_over_long_ranges():
    pieces = [mask((1, 1, LONG, 64), origin=(0, 0, start, 0)) for start in STARTS]
    assert_distinct(torch.cat([piece.view(-1, 64) for piece in pieces]))


def test_no_key_repeats_over_long_ranges():
    starts = [*STARTS, (1 << 34) - (1 << 15), (1 << 35) - LONG]
    pieces = [mask((1, 1, 64, LONG), origin=(0, 0, 0, start)) for start in starts]
    assert_distinct(torch.cat([piece.view(64, -1).T for piece in pieces]))


def test_no_sequence_or_head_repeats():
    """Rows of 64 keys over sequences, heads and queries, near zero and at the ends."""
    pieces = [mask((64, 64, 4, 64)), mask((LONG, 1, 1, 64), origin=(1 << 20, 0, 0, 0))]
    pieces += [mask((1, LONG, 1, 64), origin=(0, start, 0, 0)) for start in (64, LIMITS[1] - LONG)]
    pieces += [mask((LONG, 1, 1, 64), origin=(LIMITS[0] - LONG, 0, 0, 0))]
    assert_distinct(torch.cat([piece.reshape(-1, 64) for piece in pieces]))


def test_no_tile_of_eight_queries_and_keys_repeats():
    keep = mask((2, 4, 256, 2048)).view(8, 32, 8, 256, 8).transpose(2, 3)
    assert_distinct(keep.reshape(-1, 64))


def test_small_blocks_repeat_as_often_as_chance_has_it():
    """Birthdays: 2^19 tiles of 32 keys among 2^32 possible ones."""
    keep = mask((2, 4, 256, 8192), seed=10).reshape(-1, 32)
    blocks = np.packbits(keep.cpu().numpy(), axis=1).view(np.uint32).ravel()
    repeats = len(blocks) - len(np.unique(blocks))
    law = stats.poisson(len(blocks) ** 2 / 2**33)
    assert min(law.cdf(repeats), law.sf(repeats - 1)) > ALPHA / 2, repeats


def test_masks_of_different_seeds_and_streams_never_repeat():
    values = [*range(-8, 8), *(1 << b for b in range(31, 62, 2))]
    pairs = torch.tensor(list(itertools.product(values, values)))
    keys = len(torch.unique(torch.stack(key_of(pairs.T)), dim=1).T)  # a few pairs share a key
    assert keys > 0.99 * len(pairs)
    masks = [mask((1, 1, 1, 64), seed=s, stream=t).view(64) for s, t in pairs.tolist()]
    assert len(np.unique(fingerprints(torch.stack(masks)))) == keys
