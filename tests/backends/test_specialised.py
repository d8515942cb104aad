"""The specialised forward of attention: the same results, and where it is used or refused."""

import math
import types

import pytest
import torch
from hosts import DEVICE
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from triton.runtime import _allocation

import tridrop
from tridrop import scaled_dot_product_attention as sdpa
from tridrop.backends.triton import attention_launch, gpu, launch, specialised
from tridrop.backends.triton.attention_settings import Tile
from tridrop.spec.attention import SPECIALIZE, AttentionInputs, AttentionOptions

ON_CPU = DEVICE == "cpu"
# The interpreter takes small tiles, and multiplies fp32 right.
DTYPE, WIDTH = (torch.float32, 16) if ON_CPU else (torch.bfloat16, 64)
ORDINARY = Tile(32, 32, 4, 2) if ON_CPU else Tile(128, 128, 8, 2)
INNER, EDGE = 0, 2
REFUSED = None if ON_CPU else specialised.why_not(torch.device(DEVICE))
compiles = pytest.mark.skipif(REFUSED is not None, reason=f"not specialised here: {REFUSED}")


def special(bounds: int) -> Tile:
    return (Tile(32, 32, 4, 2) if ON_CPU else Tile(128, 128, 4, 3))._replace(special=bounds)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


# queries, keys, bounds, options
CASES = {
    "dense": (40, 128, INNER, {}),
    "dense, with bounds": (40, 128, EDGE, {}),
    "dense, odd length": (40, 110, EDGE, {}),
    "causal": (110, 110, EDGE, {"is_causal": True}),
    "causal, more queries": (110, 40, EDGE, {"window": (None, 0)}),
    "queries without keys": (110, 40, EDGE, {"attn_mask": causal_lower_right(110, 40)}),
    "shard": (40, 128, INNER, {"shard": tridrop.Shard((4, 8, 1000, 1000), (1, 3, 64, 32))}),
    "a negative scale": (40, 128, INNER, {"scale": -0.3}),
    "without dropout": (40, 128, INNER, {"dropout_p": 0.0}),
    "causal without dropout": (40, 110, EDGE, {"is_causal": True, "dropout_p": 0.0}),
    "p = 1": (40, 128, INNER, {"dropout_p": 1.0}),
    "p of the device": (40, 128, INNER, {"dropout_p": torch.tensor(0.4, device=DEVICE)}),
    "p = 0 of the device": (40, 128, INNER, {"dropout_p": torch.tensor(0.0, device=DEVICE)}),
}


def operands(queries: int, keys: int, key_heads: int = 2) -> tuple[Tensor, ...]:
    return (
        draw(2, 2, queries, WIDTH, seed=6),
        *(draw(2, key_heads, keys, WIDTH, seed=seed) for seed in (7, 8)),
    )


def forward(monkeypatch, tile: Tile, given, options) -> tuple[Tensor, Tensor]:
    """The result and lse of a forward with this tile."""
    monkeypatch.setattr(attention_launch, "forward_tile", lambda *_: tile)
    with tridrop.backend("triton"):
        return sdpa(*given, return_lse=True, **({"dropout_p": 0.4, "seed": 3} | options))


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """To the bit where there is one order of sums; a decision moves far more than a hundredth."""
    slack = 0 if ON_CPU else 1e-2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


@compiles
@pytest.mark.parametrize("case", CASES)
def test_it_gives_the_results_of_the_ordinary_forward(monkeypatch, case):
    queries, keys, bounds, options = CASES[case]
    given = operands(queries, keys)
    expected = forward(monkeypatch, ORDINARY, given, options)
    assert_same(forward(monkeypatch, special(bounds), given, options), expected)
    assert (expected[0] != 0).any() or case == "p = 1"
    if case == "queries without keys":
        assert (expected[1] == -math.inf).any()


@compiles
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(monkeypatch, causal):
    given = operands(128, 128, key_heads=1)
    options = {"enable_gqa": True, "is_causal": causal}
    tile = special(EDGE if causal else INNER)
    expected = forward(monkeypatch, ORDINARY, given, options)
    assert_same(forward(monkeypatch, tile, given, options), expected)


@compiles
def test_heads_that_lie_between_those_of_other_tokens(monkeypatch):
    """[B, S, H, D] in memory, and what lies behind the last key is not read as one."""
    wide = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands(64, 160)]
    given = [wide[0], *(t[:, :, :110] for t in wide[1:])]
    for t in wide[1:]:
        t[:, :, 110:] = math.nan
    expected = forward(monkeypatch, ORDINARY, given, {})
    assert expected[0].isfinite().all()
    assert_same(forward(monkeypatch, special(EDGE), given, {}), expected)


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setenv(SPECIALIZE, "1")
    specialised.asked.cache_clear()
    yield
    specialised.asked.cache_clear()


@compiles
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_switch_chooses_it_and_gradients_follow(monkeypatch, switched_on, width, causal):
    seen = []
    run = specialised.run
    monkeypatch.setattr(specialised, "run", lambda *a: (seen.append(1), run(*a)))
    # the interpreter multiplies fp16 right, but not bf16
    query, key, value = (
        torch.randn(1, 1, n, width, generator=torch.Generator().manual_seed(n)).to(DEVICE).half()
        for n in (100, 128, 128)
    )
    found = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        with tridrop.backend(name):
            out = sdpa(*leaves, dropout_p=0.3, seed=5, is_causal=causal)
        out.sum().backward()
        found.append((out.detach(), *(t.grad for t in leaves)))
    assert seen == [1]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_the_switch_is_off_by_default(monkeypatch, value, expected):
    monkeypatch.setenv(SPECIALIZE, value)
    assert specialised.asked.__wrapped__() is expected
    monkeypatch.delenv(SPECIALIZE)
    assert specialised.asked.__wrapped__() is False


def test_the_switch_has_two_positions(monkeypatch):
    monkeypatch.setenv(SPECIALIZE, "yes")
    with pytest.raises(ValueError, match="'yes' in the environment: use 1"):
        specialised.asked.__wrapped__()


def hopper(monkeypatch, kind: gpu.Gpu) -> None:
    """As if the kernels were compiled, for this GPU."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(gpu, "of", lambda device: kind)


HOPPER = gpu.Gpu(90, 232448)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_versions_that_were_not_tried_are_refused(monkeypatch, version):
    hopper(monkeypatch, HOPPER)
    monkeypatch.setattr(specialised, "triton", types.SimpleNamespace(__version__=version))
    with pytest.raises(RuntimeError, match=f"but Triton {version} was not tried"):
        specialised.check(torch.device("cuda", 0))


@pytest.mark.parametrize("generation", [0, 80, 100])
def test_other_gpus_than_hopper_are_refused(monkeypatch, generation):
    hopper(monkeypatch, gpu.Gpu(generation, 232448))
    monkeypatch.setattr(specialised, "triton", types.SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(RuntimeError, match="but cuda:0 is not a Hopper GPU: remove it"):
        specialised.check(torch.device("cuda", 0))
    hopper(monkeypatch, HOPPER)
    specialised.check(torch.device("cuda", 0))


def test_a_refusal_reaches_the_caller(monkeypatch, switched_on):
    monkeypatch.setattr(specialised, "why_not", lambda device: "Triton 9 was not tried")
    with (
        tridrop.backend("triton"),
        pytest.raises(RuntimeError, match="=1 asks for warp specialisation, but Triton 9 was not"),
    ):
        sdpa(*operands(40, 40), dropout_p=0.4, seed=3)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def chosen(inputs: dict, options: dict, width: int = 64, keys: int = 256) -> Tile | None:
    """The specialised tile for a call, if it has one."""
    rows = {"query": empty(2, 4, 256, width), "key": empty(2, 4, keys, width)}
    rows["value"] = rows["key"]
    options = {"p": 0.1, "scale": 0.125, "max_query": 256, "max_key": keys} | options
    seed = empty(2, dtype=torch.int64)
    call = attention_launch.Call(
        AttentionInputs(**(rows | {"seed": seed} | inputs)), AttentionOptions(**options)
    )
    return specialised.tile(call.tensors, call.shape, call.flags, call.factors.scale)


def test_bounds_are_compared_only_where_there_are_some():
    assert chosen({}, {}) == Tile(128, 128, 4, 3, special=INNER)
    assert chosen({}, {}, width=128) == Tile(128, 128, 4, 2, special=INNER)
    assert chosen({}, {"upper": 0}) == Tile(128, 128, 4, 3, special=EDGE)
    assert chosen({}, {}, keys=250) == Tile(128, 128, 4, 3, special=EDGE)
    assert chosen({}, {"p": 0.0, "upper": 0}) == Tile(128, 128, 4, 3, special=EDGE)
    by_device = empty(dtype=torch.float64)
    assert chosen({"p": by_device}, {}) == Tile(128, 128, 4, 3, special=INNER)


starts = empty(3, dtype=torch.int32)
between = empty(2, 256, 4, 68)[..., :64].transpose(1, 2)  # rows at multiples of 136 bytes
ORDINARY_CALLS = {
    "bool mask": ({"mask": empty(256, 256, dtype=torch.bool)[None, None]}, {}),
    "key mask": ({"key_mask": empty(2, 256, dtype=torch.bool)}, {}),
    "sinks": ({"sinks": empty(4)}, {}),
    "window": ({}, {"lower": -10}),
    "shard inside a tile": ({}, {"origin": (0, 0, 0, 5)}),
    "softcap": ({}, {"softcap": 30.0}),
    "scale 0": ({}, {"scale": 0.0}),
    "packed": (
        {"cu_query": starts, "cu_key": starts}
        | {name: empty(1, 4, 512, 64) for name in ("query", "key", "value")},
        {},
    ),
    "rows that are not aligned": ({"key": between}, {}),
    "one row for all keys": ({"key": empty(2, 4, 1, 64).expand(2, 4, 256, 64)}, {}),
    "wider values": ({"value": empty(2, 4, 256, 128)}, {}),
    "fp32": (
        {n: empty(2, 4, 256, 64, dtype=torch.float32) for n in ("query", "key", "value")},
        {},
    ),
}


@pytest.mark.parametrize("case", ORDINARY_CALLS)
def test_other_calls_keep_the_ordinary_forward(case):
    assert chosen(*ORDINARY_CALLS[case]) is None


@pytest.mark.parametrize("width", [16, 32, 80, 256])
def test_other_widths_keep_it_too(width):
    assert chosen({}, {}, width) is None


def test_the_callers_allocator_stays(monkeypatch):
    """A context of its own gets torch's memory for the descriptors."""
    before, seen = _allocation._allocator.get(), []
    device = torch.device(DEVICE)
    specialised.run(device, lambda: seen.append(_allocation._allocator.get()))
    assert _allocation._allocator.get() is before
    assert seen[0] is not before
    memory = seen[0](384, 128, None)
    assert (memory.numel() * memory.element_size(), memory.device.type) == (384, DEVICE)
