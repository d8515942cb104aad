"""What kernels do otherwise where products are asynchronous, with the same results.

Forward draws a block's mask behind the products of the block before, and the kernel for the
gradients of keys shares no address between a loop and what follows it. Launchers choose both on
Hopper; here every feature is given either way.
"""

import math

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


def choose(monkeypatch, function: str, tile: Tile) -> list[Tile]:
    """Give a kernel this tile; the list has it once for each time that it is asked for."""
    asked = []

    def chosen(*_):
        asked.append(tile)
        return tile

    monkeypatch.setattr(attention_launch, function, chosen)
    return asked


def operands(key_heads: int) -> tuple[Tensor, ...]:
    return tuple(
        draw(2, heads, length, 16, seed=seed)
        for heads, length, seed in ((2, QUERIES, 6), (key_heads, KEYS, 7), (key_heads, KEYS, 8))
    )


def forward(monkeypatch, tile: Tile, options, key_heads: int = 2) -> tuple[Tensor, Tensor]:
    """The result and lse."""
    asked = choose(monkeypatch, "forward_tile", tile)
    options = {"dropout_p": 0.4, "seed": 3, "enable_gqa": key_heads != 2} | options
    with tridrop.backend("triton"):
        found = sdpa(*operands(key_heads), return_lse=True, **options)
    assert asked == [tile]
    return found


def gradients(monkeypatch, tile: Tile, options, key_heads: int = 2) -> tuple[Tensor, ...]:
    """The gradients of queries, keys and values."""
    asked = choose(monkeypatch, "dkey_tile", tile)
    options = {"dropout_p": 0.4, "seed": 3, "enable_gqa": key_heads != 2} | options
    leaves = [t.requires_grad_() for t in operands(key_heads)]
    with tridrop.backend("triton"):
        out = sdpa(*leaves, **options)
        found = torch.autograd.grad(out, leaves, draw(*out.shape, seed=9))
    assert asked == [tile]
    return found


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """To the bit where there is one order of sums; a decision moves far more than 1e-5."""
    slack = 0 if DEVICE == "cpu" else 1e-5
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


@pytest.mark.parametrize("case", CASES)
def test_a_mask_that_is_drawn_ahead_is_the_same(monkeypatch, case):
    sizes = (32, 64, 4, 2)
    drawn, ahead = (
        forward(monkeypatch, Tile(*sizes, ahead=early), CASES[case]) for early in (False, True)
    )
    assert_same(ahead, drawn)
    assert (drawn[0] != 0).any() or case == "p = 1"


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_loops_that_share_nothing_are_the_same(monkeypatch, case):
    sizes = (16, 32, 4, 2)
    together, apart = (
        gradients(monkeypatch, Tile(*sizes, apart=apart), CASES[case]) for apart in (False, True)
    )
    assert_same(apart, together)
    assert all((found != 0).any() for found in together) or case == "p = 1"


def test_grouped_heads(monkeypatch):
    tiles = (Tile(32, 32, 4, 2, ahead=early) for early in (False, True))
    assert_same(*(forward(monkeypatch, tile, {}, key_heads=1) for tile in tiles))
    tiles = [Tile(32, 32, 4, 2, apart=apart) for apart in (False, True)]
    for options in ({}, {"is_causal": True}):
        assert_same(*(gradients(monkeypatch, tile, options, key_heads=1) for tile in tiles))


def test_packed_sequences(monkeypatch):
    starts = torch.tensor([0, 33, 33, 70, 101], device=DEVICE, dtype=torch.int32)
    query, key, value = (draw(1, 2, KEYS, 16, seed=seed) for seed in (8, 9, 10))
    found = []
    for early in (False, True):
        tile = Tile(32, 32, 4, 2, ahead=early)
        monkeypatch.setattr(attention_launch, "forward_tile", lambda *_, tile=tile: tile)
        with tridrop.backend("triton"):
            found.append(
                sdpa(
                    query, key, value, dropout_p=0.4, seed=3, cu_seqlens_q=starts,
                    cu_seqlens_k=starts, return_lse=True,
                )
            )  # fmt: skip
    assert_same(*found)
    assert (found[0][1] == -math.inf).any()  # tokens behind the last sequence


def test_gradients_of_packed_sequences(monkeypatch):
    starts = torch.tensor([0, 33, 33, 70, 101], device=DEVICE, dtype=torch.int32)
    found = []
    for apart in (False, True):
        asked = choose(monkeypatch, "dkey_tile", Tile(16, 32, 4, 2, apart=apart))
        leaves = [draw(1, 2, KEYS, 16, seed=seed).requires_grad_() for seed in (8, 9, 10)]
        with tridrop.backend("triton"):
            out = sdpa(
                *leaves, dropout_p=0.4, seed=3, cu_seqlens_q=starts, cu_seqlens_k=starts
            )  # fmt: skip
            found.append(torch.autograd.grad(out, leaves, draw(*out.shape, seed=11)))
        assert len(asked) == 1
    assert_same(*found)
    assert all((t[..., :101, :] != 0).any() for t in found[0])
