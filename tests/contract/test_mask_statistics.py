"""The mask contract, as randomness: rates, joint distributions, correlations, repetitions.

Seeds are fixed, so a result never changes unless the masks do. Every bound is a quantile of the
distribution that independent decisions would have, at a false-alarm level of ALPHA a test.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hosts import DEVICE
from scipy import stats
from torch import Tensor

import tridrop
from tridrop.contract.mask import key_of, threshold

ALPHA = 1e-8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Tests share the cores with others, and torch's threads spend more on waiting for each other
    # at every small operation than they gain: a hundredfold slowdown on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mask(shape, p=0.5, seed=0, stream=0, **where) -> Tensor:
    return tridrop.keep_mask(torch.tensor([seed, stream], device=DEVICE), shape, p, **where)


def rate_of(p: float) -> float:
    """The exact probability of dropping."""
    return threshold(p) / 2**32


def assert_binomial(count, n: int, probability: float, tests: int = 1) -> None:
    """``count`` of ``n``, neither too few nor too many; one of ``tests`` such assertions."""
    law = stats.binom(n, probability)
    low, high = law.cdf(int(count)), law.sf(int(count) - 1)
    assert min(low, high) > ALPHA / 2 / tests, (int(count), n * probability, low, high)


def assert_chi_square(counts, expected, freedom: int) -> None:
    """Counts that fit neither too badly nor too well."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    law = stats.chi2(freedom)
    statistic = ((counts - expected) ** 2 / expected).sum()
    tail = min(law.sf(statistic), law.cdf(statistic))
    assert tail > ALPHA / 2, (statistic, freedom, tail)


def both_dropped(t: int, half: int = 16) -> int:
    """How many of the 2^(2 * half) words drop both of their lanes at threshold t."""
    if t == 1 << 2 * half:
        return t
    a, b = divmod(t, 1 << half)
    return a * a + 2 * min(a, b) + (a < b)


def test_two_lanes_of_a_word_drop_together_as_often_as_the_page_says():
    half = 4  # the same construction on 8-bit words, counted
    words = np.arange(1 << 2 * half)
    rotated = (words << half) % (1 << 2 * half) | words >> half
    for t in range((1 << 2 * half) + 1):
        assert both_dropped(t, half) == ((words < t) & (rotated < t)).sum()
    for p in (2**-16, 1e-4, 0.001, 0.1, 0.2, 0.3, 0.5, 0.9, 0.999, 1 - 2**-16):
        t = threshold(p)
        covariance = both_dropped(t) * 2**32 - t * t
        correlation = covariance / (t * (2**32 - t))
        assert 0 <= correlation < 3 * 2**-16
    assert both_dropped(threshold(0.5)) == 2**30  # independent


# ------------------------------------------------------------------------ one decision

EXTREMES = [1e-6, 1e-5, 1 - 1e-5, 1 - 1e-6]
RATES = [1e-4, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1 - 1e-4]


@pytest.mark.parametrize("p", EXTREMES + RATES)
def test_rate_of_dropping_is_p(p):
    rows = 1 << (13 if p in EXTREMES else 11)
    keep = mask((rows, 4096), p, seed=1).view(-1, 4, 2)
    # The lanes of one word are not independent; one lane of each word is.
    for half in (0, 1):
        lanes = keep[..., half]
        assert_binomial((~lanes).sum(), lanes.numel(), rate_of(p), tests=2)


def test_decisions_are_uniform_over_the_range_of_p():
    """How many of the p = 1/16, 2/16, ... still keep an element is uniform over 0 .. 15."""
    level = sum(mask((512, 2048), k / 16, seed=2).to(torch.int64) for k in range(1, 16))
    for lanes in level.view(-1, 2).T:
        counts = torch.bincount(lanes, minlength=16).tolist()
        assert_chi_square(counts, [lanes.numel() / 16] * 16, 15)


# ---------------------------------------------------------- the eight lanes of a group


@functools.lru_cache(maxsize=2)
def groups(p: float, seed: int) -> Tensor:
    """Groups of a large mask: bool, [2^19, 8]."""
    return mask((1024, 4096), p, seed=seed).view(-1, 8)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_all_lanes_drop_equally_often(p):
    keep, rate = groups(p, 3), rate_of(p)
    n = len(keep)
    counts = torch.stack(((~keep).sum(0), keep.sum(0))).cpu()
    # Eight known rates, nothing estimated: a degree of freedom a lane.
    assert_chi_square(counts, [[n * rate] * 8, [n * (1 - rate)] * 8], 8)


def pattern_counts(lanes: Tensor) -> list[int]:
    """How often each pattern of the given lanes occurs; bit i is lane i kept."""
    weights = 1 << torch.arange(lanes.shape[1], device=lanes.device)
    return torch.bincount((lanes * weights).sum(1), minlength=1 << lanes.shape[1]).tolist()


def test_all_256_patterns_of_a_group_are_equally_frequent():
    # At p = 0.5 a decision is one bit of a word, so even lanes of one word are independent.
    keep = groups(0.5, 4)
    assert_chi_square(pattern_counts(keep), [len(keep) / 256] * 256, 255)


@pytest.mark.parametrize("halves", list(itertools.product((0, 1), repeat=4)), ids=str)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8])
def test_the_four_words_are_jointly_independent(p, halves):
    keep, rate = groups(p, 5), rate_of(p)
    lanes = keep[:, [2 * word + half for word, half in enumerate(halves)]]
    kept = [bin(pattern).count("1") for pattern in range(16)]
    expected = [len(keep) * (1 - rate) ** k * rate ** (4 - k) for k in kept]
    assert_chi_square(pattern_counts(lanes), expected, 15)


@pytest.mark.parametrize("p", [1e-4, 0.001, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_every_pair_of_lanes_drops_together_at_the_expected_rate(p):
    drop = ~groups(p, 6)
    for i, j in itertools.combinations(range(8), 2):
        same_word = i // 2 == j // 2
        both = both_dropped(threshold(p)) / 2**32 if same_word else rate_of(p) ** 2
        assert_binomial((drop[:, i] & drop[:, j]).sum(), len(drop), both, tests=28)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.3, 0.5])
def test_lanes_of_a_word_share_nothing_but_ties(p):
    """Over more words: a rotation by 8, with a correlation of 2^-8, would be seen."""
    drop = ~mask((4096, 4096), p, seed=10).view(-1, 2)
    assert_binomial((drop[:, 0] & drop[:, 1]).sum(), len(drop), both_dropped(threshold(p)) / 2**32)


# ------------------------------------------------------------------------ correlations

LAGS = [*range(1, 65), 127, 128, 255, 256, 512, 1000]


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_no_correlation_at_any_lag(axis, p):
    rate = rate_of(p)
    x = (mask((1024, 2048), p, seed=7).float() - (1 - rate)) / math.sqrt(rate * (1 - rate))
    if axis == "rows":
        x = x.T
    t = threshold(p)
    in_a_word = (both_dropped(t) * 2**32 - t * t) / (t * (2**32 - t))
    bound = stats.norm.isf(ALPHA / 2 / len(LAGS))
    for lag in LAGS:
        products = x[:, lag:] * x[:, :-lag]
        # Products of independent standardised decisions are uncorrelated and of variance 1.
        mean, sigma = products.double().mean().item(), products.numel() ** -0.5
        # Every second neighbour shares a word.
        expected = in_a_word / 2 if lag == 1 and axis == "columns" else 0
        assert abs(mean - expected) < bound * sigma, lag


def far(dim: int) -> list[dict]:
    """Places in one large tensor whose coordinates differ in few bits."""
    at = [0, *(1 << bit for bit in range(14, 48))]
    whole = (1 << 12, 1 << 49) if dim else (1 << 49, 1 << 12)
    return [{"shard": (whole, (0, n) if dim else (n, 0))} for n in at]


FAMILIES = {
    "consecutive_seeds": [{"seed": s} for s in range(-32, 32)],
    "seeds_of_one_bit": [{"seed": 1 << b} for b in range(63)],
    "consecutive_streams": [{"seed": 5, "stream": t} for t in range(-32, 32)],
    "streams_of_one_bit": [{"seed": 5, "stream": 1 << b} for b in range(63)],
    "seed_and_stream": [{"seed": s, "stream": t} for s in range(8) for t in range(8)],
    "nested_folds": [
        {"seed": 5, "stream": int(tridrop.fold_in(tridrop.fold_in(5, a), b)[1])}
        for a in range(1, 9)
        for b in range(8)
    ],
    "rows_far_apart": far(0),
    "columns_far_apart": far(1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_different_seeds_streams_and_places_are_uncorrelated(family):
    masks = [mask((16, 2048), 0.5, **where).flatten() for where in FAMILIES[family]]
    signs = torch.stack(masks).float() * 2 - 1
    n = signs.shape[1]
    agree = ((signs @ signs.T).double() + n) / 2  # whole numbers, exact in fp32
    pairs = list(itertools.combinations(range(len(masks)), 2))
    extremes = [agree[i, j].item() for i, j in pairs]
    assert_binomial(min(extremes), n, 0.5, tests=len(pairs))
    assert_binomial(max(extremes), n, 0.5, tests=len(pairs))


def test_elements_and_drop_path_are_uncorrelated():
    """Both masks of a sample sit at the same coordinate and differ in the domain only."""
    n = 1 << 20
    elements, path = mask((n, 1), seed=8), mask((n, 1), seed=8, domain="drop_path")
    assert_binomial((~path).sum(), n, 0.5)
    for lag in range(8):
        agree = elements[lag:] == path[: n - lag]
        assert_binomial(agree.sum(), n - lag, 0.5, tests=8)


# -------------------------------------------------------------------------- repetitions


def fingerprints(bits: Tensor) -> np.ndarray:
    """Rows of 64 decisions as integers."""
    return np.packbits(bits.cpu().numpy(), axis=1).view(np.uint64).ravel()


def assert_distinct(bits: Tensor) -> None:
    found = fingerprints(bits)
    # n random 64-bit numbers repeat with a probability below n^2 / 2^65.
    assert len(found) ** 2 / 2**65 < ALPHA
    assert len(np.unique(found)) == len(found)


STARTS = [0, 1 << 16, (1 << 31) - (1 << 15), (1 << 32) - (1 << 15), 1 << 40, 1 << 55]
LONG = 1 << 16


def test_no_row_repeats_over_long_ranges():
    whole = (1 << 56, 64)
    pieces = [mask((LONG, 64), 0.5, shard=(whole, (start, 0))) for start in STARTS]
    assert_distinct(torch.cat(pieces))


def test_no_column_repeats_over_long_ranges():
    whole = (64, 1 << 56)
    pieces = [mask((64, LONG), 0.5, shard=(whole, (0, start))) for start in STARTS]
    assert_distinct(torch.cat([piece.T for piece in pieces]))


def test_no_block_of_eight_by_eight_repeats():
    keep = mask((1024, 4096), 0.5)
    assert_distinct(keep.view(128, 8, 512, 8).transpose(1, 2).reshape(-1, 64))


def test_small_blocks_repeat_as_often_as_chance_has_it():
    """Birthdays: 2^20 blocks of 32 decisions among 2^32 possible ones."""
    keep = mask((4, 8 << 20), 0.5, seed=9).view(4, -1, 8).transpose(0, 1).reshape(-1, 32)
    blocks = np.packbits(keep.cpu().numpy(), axis=1).view(np.uint32).ravel()
    repeats = len(blocks) - len(np.unique(blocks))
    law = stats.poisson(len(blocks) ** 2 / 2**33)
    assert min(law.cdf(repeats), law.sf(repeats - 1)) > ALPHA / 2, repeats


def test_masks_of_different_keys_never_repeat():
    """Over seeds and streams, small and large; the few pairs that share a key share the mask."""
    values = [*range(-16, 16), *(1 << b for b in range(31, 63))]
    pairs = torch.tensor(list(itertools.product(values, values)))
    k0, k1 = key_of(pairs.T)
    keys = len(torch.unique(torch.stack((k0, k1)), dim=1).T)
    assert keys > 0.99 * len(pairs)
    masks = [mask((64,), 0.5, seed=s, stream=t) for s, t in pairs.tolist()]
    found = fingerprints(torch.stack(masks))
    assert len(np.unique(found)) == keys
    paths = [
        mask((64, 1), 0.5, seed=s, stream=t, domain="drop_path").view(64)
        for s, t in pairs[::8].tolist()
    ]
    assert not np.isin(fingerprints(torch.stack(paths)), found).any()
