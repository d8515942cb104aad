"""The mask contract of attention, exactly: golden vectors, equal backends, invariances, errors."""

import importlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hosts import DEVICE, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tridrop
from tridrop.backends.triton import masks as triton_masks
from tridrop.backends.triton.launch import Tile
from tridrop.backends.triton.mask import keep_scores, load_key
from tridrop.contract.mask import attention_keep_mask, threshold
from tridrop.masks import numpy_mask
from tridrop.spec.attention import AttentionOptions
from tridrop.spec.elementwise import ATTENTION_LIMITS

BACKENDS = [PLAIN, "triton"]
HERE = Path(__file__).parents[1]
VECTORS = json.loads((HERE / "data" / "mask_vectors.json").read_text())["attention"]
PAGE = (HERE.parent / "docs" / "mask-contract.md").read_text()
LIMITS = tuple(ATTENTION_LIMITS.values())

# Examples are the same in every run; an interpreted kernel is slow the first time.
exact = settings(max_examples=80, deadline=None, derandomize=True)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
probability = st.floats(0, 1) | st.sampled_from([0.0, 2**-33, 2**-32, 1e-6, 0.5, 1 - 2**-33, 1.0])


def pair(seed: int, stream: int = 0) -> Tensor:
    return torch.tensor([seed, stream], device=DEVICE)


def mask(backend: str, shape, p=0.5, seed: int = 1, stream: int = 0, origin=None) -> Tensor:
    shard = None if origin is None else tridrop.Shard(LIMITS, tuple(origin))
    with tridrop.backend(backend):
        return tridrop.attention_keep_mask(pair(seed, stream), shape, p, shard=shard).cpu()


# --------------------------------------------------------------------------- golden vectors

vectors = pytest.mark.parametrize("v", VECTORS, ids=lambda v: v["name"])


@vectors
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_vectors(backend, v):
    assert threshold(v["p"]) == v["threshold"]
    keep = mask(backend, v["shape"], v["p"], v["seed"], v["stream"], v["origin"])
    assert keep.dtype == torch.bool
    assert keep.is_contiguous()
    assert keep.shape == torch.Size(v["shape"])
    assert "".join("01"[int(k)] for k in keep.flatten()) == v["keep"]


def test_the_pages_table_of_groups_is_what_the_calls_give():
    rows = re.findall(r"^\| (\d) \| (\d+), (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    batch, head, query, tile = 2, 3, 5, 7
    origin = (batch, head, query, 32 * tile)
    bits = numpy_mask.attention_bits((11, 4), (1, 1, 1, 32), shard=(LIMITS, origin)).ravel()
    key = numpy_mask.key((11, 4))
    for group, first, second, others in rows:
        counter = (query, 4 * tile + int(group), batch, (2 << 28) | head)
        words = numpy_mask.philox(*(np.uint64(c) for c in counter), *key)
        pairs = [(first, second), *(cell.split(", ") for cell in others.split(" | "))]
        for word, (even, odd) in zip(words, pairs, strict=True):
            assert bits[int(even)] == word
            assert bits[int(odd)] == (int(word) << 16) % 2**32 | int(word) >> 16


def test_the_limits_are_those_of_the_page():
    for name, limit in ATTENTION_LIMITS.items():
        assert re.search(
            rf"^\| `{name}` \| .* \| `2\^{limit.bit_length() - 1} - 1` \|$", PAGE, re.M
        )


# ------------------------------------------------------------------------------ equality


@st.composite
def places(draw):
    """A small shape, and where it lies."""
    shape = [draw(st.sampled_from([0, 1, 1, 2, 3])) for _ in range(2)]
    shape += [draw(st.sampled_from([0, 1, 2, 5, 17, 33]))]
    shape += [draw(st.sampled_from([0, 1, 2, 7, 8, 31, 32, 33, 64, 131]))]
    origin = [
        draw(st.integers(0, 100) | st.integers(0, limit - n) | st.just(limit - n))
        for n, limit in zip(shape, LIMITS, strict=True)
    ]
    return shape, origin


@exact
@given(places(), int64, int64, probability)
def test_torch_triton_and_numpy_agree_bit_for_bit(place, seed, stream, p):
    shape, origin = place
    expected = numpy_mask.attention_keep_mask((seed, stream), shape, p, shard=(LIMITS, origin))
    for backend in BACKENDS:
        keep = mask(backend, shape, p, seed, stream, origin)
        assert keep.shape == torch.Size(shape)
        assert np.array_equal(keep.numpy(), expected), backend


@triton.jit
def scores_kernel(
    out, seed, query, tile, batch, head, threshold: tl.int64, Q: tl.constexpr, K: tl.constexpr
):
    keep = keep_scores(query, tile, (batch, head), load_key(seed), threshold, True, Q, K)
    tl.store(out + tl.arange(0, Q)[:, None] * K + tl.arange(0, K)[None, :], keep)


@pytest.mark.parametrize("size", [(1, 32), (16, 32), (32, 64), (128, 128), (2, 1024)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_keep_scores_is_the_contract_for_any_tile(size, p):
    out = torch.empty(size, dtype=torch.bool, device=DEVICE)
    batch, head, query, tile = 3, (1 << 28) - 1, 77, (1 << 30) - size[1] // 32
    scores_kernel[(1,)](
        out, pair(5, 6), query, tile, batch, head, threshold(p), Q=size[0], K=size[1]
    )
    expected = attention_keep_mask(
        pair(5, 6), (1, 1, *size), threshold(p), origin=(batch, head, query, 32 * tile)
    )
    assert torch.equal(out, expected[0, 0])


# ----------------------------------------------------------------------------- invariance

TILES = [(1, 32, 1), (1, 256, 2), (16, 32, 1), (4, 64, 8), (128, 128, 4), (2, 1024, 4)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("origin", [(0, 0, 0, 0), (1, 2, 3, 5), (0, 7, 100, 95)], ids=str)
def test_mask_does_not_depend_on_the_tile(monkeypatch, tile, origin):
    shape = (1, 2, 11, 77)
    expected = mask("reference", shape, 0.3, origin=origin)
    monkeypatch.setattr(triton_masks, "tile", lambda *sizes: Tile(*tile))
    assert torch.equal(mask("triton", shape, 0.3, origin=origin), expected)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_more_blocks_of_keys_than_a_grid_axis_holds(monkeypatch, limit):
    expected = mask("reference", (1, 2, 3, 200), 0.3, origin=(0, 0, 0, 40))
    monkeypatch.setattr(triton_masks, "tile", lambda *sizes: Tile(2, 32, 1))
    monkeypatch.setattr(triton_masks.launch, "MAX_GRID_Y", limit)
    monkeypatch.setattr(triton_masks, "MAX_GRID_Y", tl.constexpr(limit))
    assert torch.equal(mask("triton", (1, 2, 3, 200), 0.3, origin=(0, 0, 0, 40)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 9), (2, 1, 16, 32), (1, 3, 19, 33), (2, 3, 1, 64)])
def test_masks_of_shards_are_pieces_of_the_whole(backend, cuts):
    shape = (2, 3, 20, 70)
    whole = mask(backend, shape)
    ranges = [[(0, cut), (cut, n)] for cut, n in zip(cuts, shape, strict=True)]
    with tridrop.backend(backend):
        for block in itertools.product(*ranges):
            local, origin = [b - a for a, b in block], [a for a, _ in block]
            piece = whole[tuple(slice(a, b) for a, b in block)]
            for shard in ((shape, origin), tridrop.Shard(shape, tuple(origin))):
                found = tridrop.attention_keep_mask(pair(1), local, 0.5, shard=shard)
                assert torch.equal(found.cpu(), piece)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_do_not_enter(backend):
    """Another batch, other numbers of heads and other lengths: the decisions both have are equal.

    So a padded batch has those of the sequences by themselves, and grouped queries those of any
    other attention with as many query heads.
    """
    whole = mask(backend, (3, 4, 33, 100))
    for b, h, q, k in ((1, 4, 33, 100), (3, 1, 33, 100), (3, 4, 20, 100), (3, 4, 33, 41)):
        assert torch.equal(mask(backend, (b, h, q, k)), whole[:b, :h, :q, :k])
    for sequence, (q, k) in enumerate(((5, 7), (33, 64), (1, 100))):
        alone = mask(backend, (1, 4, q, k), origin=(sequence, 0, 0, 0))
        assert torch.equal(alone[0], whole[sequence, :, :q, :k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", range(4))
def test_coordinates_do_not_wrap(backend, dim):
    steps = [0, *(1 << bit for bit in (15, 16, 24, 27, 28, 31, 32, 34))]
    pieces = []
    for step in steps:
        if step < LIMITS[dim]:
            origin = [step if d == dim else 0 for d in range(4)]
            pieces.append(mask(backend, (1, 1, 4, 64), origin=origin))
    assert len(pieces) >= 4
    for a, b in itertools.combinations(pieces, 2):
        assert not torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a device with 5 GB")
def test_a_mask_of_more_than_2_to_the_32_elements():
    n = (1 << 16) + 50
    keep = tridrop.attention_keep_mask(1, (1, 1, n, n), 0.5, device=DEVICE)
    for at in (0, 32767, n - 64):
        shard = tridrop.Shard((1, 1, n, n), (0, 0, at, n - 300))
        piece = tridrop.attention_keep_mask(1, (1, 1, 64, 300), 0.5, shard=shard, device=DEVICE)
        assert torch.equal(keep[:, :, at : at + 64, n - 300 :], piece)


# ------------------------------------------------------------------------------------- p


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_at_a_larger_p_is_kept_at_a_smaller_one(backend):
    before = torch.ones(1, 2, 8, 100, dtype=torch.bool)
    for p in (0.0, 0.001, 0.1, 0.3, 0.5, 0.50001, 0.9, 0.999, 1.0):
        keep = mask(backend, before.shape, p)
        assert not (keep & ~before).any()
        before = keep
    assert not before.any()
    assert mask(backend, before.shape, 0.0).all()


def on_device(backend: str, shape, p: Tensor, origin=(0, 0, 0, 0)) -> Tensor:
    """With a rate that only the device knows; the public function reads a p on the CPU."""
    module = importlib.import_module(f"tridrop.backends.{backend}")
    return module.attention_keep_mask(pair(1), shape, p, AttentionOptions(origin=origin)).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 1.0])
def test_tensor_p_equals_the_float_of_its_value(backend, dtype, p):
    shape, origin = (2, 2, 5, 40), (1, 0, 9, 13)
    p_tensor = torch.tensor(p, dtype=dtype, device=DEVICE)
    expected = mask(backend, shape, float(p_tensor), origin=origin)
    assert torch.equal(mask(backend, shape, p_tensor, origin=origin), expected)
    assert torch.equal(on_device(backend, shape, p_tensor, origin), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [math.nan, 1.5, -0.1, math.inf])
def test_tensor_p_that_is_no_probability_keeps_everything_where_it_cannot_raise(backend, p):
    assert on_device(backend, (1, 1, 3, 40), torch.tensor(p, device=DEVICE)).all()


# ------------------------------------------------------------------------ torch and errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for p_tensor in (None, torch.tensor(0.3, device=DEVICE)):
        torch.library.opcheck(
            torch.ops.tridrop.attention_keep_mask,
            (pair(1), [2, 3, 4, 40], p_tensor, 0.5, [0, 1, 2, 3], backend),
        )
    # a row that begins inside a group of eight
    where = ([], [1, 40], [0, 3])
    torch.library.opcheck(
        torch.ops.tridrop.keep_mask, (pair(1), [1, 30], None, 0.5, "elements", *where, backend)
    )


def test_seeds_and_devices():
    keep = tridrop.attention_keep_mask(1, (1, 2, 3, 40), 0.5)
    assert keep.device.type == "cpu"
    assert torch.equal(tridrop.attention_keep_mask(pair(1), (1, 2, 3, 40), 0.5).cpu(), keep)
    assert tridrop.attention_keep_mask(1, (1, 2, 3, 40), 0.5, device=DEVICE).device.type == DEVICE
    with pytest.raises(ValueError, match="move it once"):
        tridrop.attention_keep_mask(torch.tensor([1, 2]), (1, 1, 1, 1), 0.5, device="meta")


@pytest.mark.parametrize("seed", [None, 1.0, True, "1"])
def test_errors_of_seeds(seed):
    with pytest.raises(TypeError, match=type(seed).__name__):
        tridrop.attention_keep_mask(seed, (1, 1, 1, 1), 0.5)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (-1e-9, ValueError, "lie in"),
        (math.nan, ValueError, "nan"),
        (True, TypeError, "bool"),
        ("0.5", TypeError, "str"),
        (torch.tensor([0.5]), TypeError, "0-d"),
        (torch.tensor(0.5, requires_grad=True), ValueError, "requires grad"),
        (torch.tensor(1.5), ValueError, "lie in"),
    ],
    ids=str,
)
def test_errors_of_p(p, error, message):
    with pytest.raises(error, match=message):
        tridrop.attention_keep_mask(1, (1, 1, 1, 4), p)


SHAPE = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "shard", "error", "message"),
    [
        ((2, 3, 4), None, ValueError, r"\(2, 3, 4\) has 3 dimensions.*\(batch, heads, queries"),
        ((1, 1, 2, 3, 4), None, ValueError, "5 dimensions"),
        ((), None, ValueError, "0 dimensions"),
        ((1, 1, 1, -1), None, ValueError, "non-negative"),
        ((1, 1, 1, 2.0), None, ValueError, "non-negative"),
        ((1, 1, 1, True), None, ValueError, "non-negative"),
        (4, None, TypeError, "4 of type int"),
        ("1234", None, TypeError, "str"),
        ((0, 1, 1, (1 << 35) + 1), None, ValueError, r"key coordinates.*2\^35.*fold_in"),
        (SHAPE, (((1 << 32) + 1, 2, 3, 4), (0,) * 4), ValueError, r"batch coordinates.*2\^32"),
        (SHAPE, ((1, (1 << 28) + 1, 3, 4), (0,) * 4), ValueError, r"head coordinates.*2\^28"),
        (SHAPE, ((1, 2, (1 << 32) + 1, 4), (0,) * 4), ValueError, r"query coordinates.*2\^32"),
        (SHAPE, ((1, 2, 3, (1 << 35) + 1), (0,) * 4), ValueError, r"key coordinates.*2\^35"),
        (SHAPE, ((1, 2, 3, 9), (0, 0, 0, 6)), ValueError, "dimension 3"),
        (SHAPE, ((1, 2, 3, 9), (0, 0, -1, 0)), ValueError, "origin -1"),
        (SHAPE, ((3, 4), (0, 0)), ValueError, "same number of dimensions"),
        (SHAPE, ((1, 2, 3, 9), (0, 0, 0, 0.5)), TypeError, "give integers"),
        (SHAPE, 3, TypeError, "tridrop.Shard"),
    ],
    ids=str,
)
def test_errors_of_shape_and_shard(shape, shard, error, message):
    with pytest.raises(error, match=message):
        tridrop.attention_keep_mask(1, shape, 0.5, shard=shard)
