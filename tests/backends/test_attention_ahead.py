"""What kernels do otherwise where products are asynchronous, with the same results.

Forward draws a block's mask behind the products of the block before, and the kernel for the
gradients of keys shares no address between a loop and what follows it. Launchers choose both on
Hopper; here every feature is given either way.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hosts import DEVICE
from torch import Tensor

import tridrop
from tridrop import scaled_dot_product_attention as sdpa
from tridrop.backends.triton import attention_launch
from tridrop.backends.triton.attention_launch import Tile

QUERIES, KEYS = 40, 110


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def shifted(key_start: int) -> tridrop.Shard:
    """A shard whose keys begin inside a tile of 32."""
    return tridrop.Shard((4, 8, 1000, 1000), (1, 3, 64, key_start))


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (40, 13)},
    "bool mask": {"attn_mask": draw(2, 1, QUERIES, KEYS, seed=1) > -0.5},
    "float mask": {"attn_mask": draw(1, 2, QUERIES, KEYS, seed=2)},
    "causal bool mask": {"attn_mask": draw(QUERIES, KEYS, seed=1) > 0, "is_causal": True},
    "key mask": {"key_mask": draw(2, KEYS, seed=4) > -0.5},
    "sinks": {"sinks": draw(2, seed=5)},
    "softcap": {"softcap": 1.5},
    "a negative scale": {"scale": -0.3},
    "shard": {"shard": shifted(32)},
    "shard inside a tile": {"shard": shifted(37)},
    "causal shard inside a tile": {"shard": shifted(5), "is_causal": True},
    "window inside a tile": {"shard": shifted(11), "window": (40, 13)},
    "p of the device": {"dropout_p": torch.tensor(0.4, device=DEVICE)},
    "p = 0 of the device": {"dropout_p": torch.tensor(0.0, device=DEVICE)},
    "p = 1": {"dropout_p": 1.0},
    "without dropout": {"dropout_p": 0.0},
}


@contextmanager
def tiled(monkeypatch, function: str, tile: Tile) -> Iterator[None]:
    """On Triton's backend, with this tile for a kernel, which asks for it once."""
    asked = []

    def choose(*_):
        asked.append(tile)
        return tile

    monkeypatch.setattr(attention_launch, function, choose)
    with tridrop.backend("triton"):
        yield
    assert asked == [tile]


def operands(key_heads: int) -> tuple[Tensor, ...]:
    return tuple(
        draw(2, heads, length, 16, seed=seed)
        for heads, length, seed in ((2, QUERIES, 6), (key_heads, KEYS, 7), (key_heads, KEYS, 8))
    )


def packed() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Operands whose last tokens are in no sequence, and the options that say so."""
    starts = torch.tensor([0, 33, 33, 70, 101], device=DEVICE, dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return tuple(draw(1, 2, KEYS, 16, seed=seed) for seed in (8, 9, 10)), options


def attend(given: Sequence[Tensor], options, **more):
    """Attention with dropout, unless the options say otherwise."""
    gqa = given[0].shape[1] != given[1].shape[1]
    return sdpa(*given, **({"dropout_p": 0.4, "seed": 3, "enable_gqa": gqa} | options | more))


def forward(monkeypatch, tile: Tile, given, options) -> tuple[Tensor, Tensor]:
    """The result and lse."""
    with tiled(monkeypatch, "forward_tile", tile):
        return attend(given, options, return_lse=True)


def gradients(monkeypatch, tile: Tile, given, options) -> tuple[Tensor, ...]:
    """The gradients of queries, keys and values."""
    leaves = [t.requires_grad_() for t in given]
    with tiled(monkeypatch, "dkey_tile", tile):
        out = attend(leaves, options)
        return torch.autograd.grad(out, leaves, draw(*out.shape, seed=11))


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """To the bit where there is one order of sums; a decision moves far more than 1e-5."""
    slack = 0 if DEVICE == "cpu" else 1e-5
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


def both_ways(monkeypatch, outcome, sizes, given, options) -> tuple[Tensor, ...]:
    """What comes out without what Hopper does, after a comparison with what comes out with it."""
    flag = "ahead" if outcome is forward else "apart"
    without, with_it = (
        outcome(monkeypatch, Tile(*sizes, **{flag: way}), given, options) for way in (False, True)
    )
    assert_same(with_it, without)
    return without


@pytest.mark.parametrize("case", CASES)
def test_a_mask_that_is_drawn_ahead_is_the_same(monkeypatch, case):
    found = both_ways(monkeypatch, forward, (32, 64, 4, 2), operands(2), CASES[case])
    assert (found[0] != 0).any() or case == "p = 1"


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_loops_that_share_nothing_are_the_same(monkeypatch, case):
    found = both_ways(monkeypatch, gradients, (16, 32, 4, 2), operands(2), CASES[case])
    assert all((t != 0).any() for t in found) or case == "p = 1"


def test_grouped_heads(monkeypatch):
    both_ways(monkeypatch, forward, (32, 32, 4, 2), operands(1), {})
    for options in ({}, {"is_causal": True}):
        both_ways(monkeypatch, gradients, (32, 32, 4, 2), operands(1), options)


def test_packed_sequences(monkeypatch):
    found = both_ways(monkeypatch, forward, (32, 32, 4, 2), *packed())
    assert (found[1] == -math.inf).any()  # tokens behind the last sequence


def test_gradients_of_packed_sequences(monkeypatch):
    found = both_ways(monkeypatch, gradients, (16, 32, 4, 2), *packed())
    assert all((t[..., :101, :] != 0).any() for t in found)
