"""The mask contract, exactly: golden vectors, equal backends, invariances."""

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
from tridrop.backends.triton import launch
from tridrop.backends.triton.mask import philox as triton_philox
from tridrop.contract.mask import philox, scale, threshold
from tridrop.masks import numpy_mask

BACKENDS = [PLAIN, "triton"]
HERE = Path(__file__).parents[1]
PHILOX = json.loads((HERE / "data" / "philox4x32_10_vectors.json").read_text())["vectors"]
DATA = json.loads((HERE / "data" / "mask_vectors.json").read_text())
VECTORS = DATA["vectors"]
PAGE = (HERE.parent / "docs" / "mask-contract.md").read_text()
DOMAINS = ["elements", "drop_path"]

# Examples are the same in every run; an interpreted kernel is slow the first time.
exact = settings(max_examples=200, deadline=None, derandomize=True)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
probability = st.floats(0, 1) | st.sampled_from([0.0, 2**-33, 2**-32, 1e-6, 0.5, 1 - 2**-33, 1.0])


def pair(seed: int, stream: int = 0) -> Tensor:
    return torch.tensor([seed, stream], device=DEVICE)


def mask(backend: str, shape, p, seed: int = 1, stream: int = 0, **where) -> Tensor:
    with tridrop.backend(backend):
        return tridrop.keep_mask(pair(seed, stream), shape, p, **where).cpu()


def dropped(x: Tensor, p, seed: int | Tensor = 1, **where) -> tuple[Tensor, Tensor]:
    """dropout(x) and the gradient of its sum."""
    x = x.detach().requires_grad_()
    out = tridrop.dropout(x, p, seed=seed, **where)
    out.sum().backward()  # a gradient of ones with stride 0
    return out.detach().cpu(), x.grad.cpu()


def scaled(keep: Tensor, p: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """What dropout makes of ones."""
    return keep.to(torch.float32).mul(scale(threshold(p))).to(dtype)


# --------------------------------------------------------------------------- golden vectors


def words(name: str) -> list[list[int]]:
    return [[int(w, 16) for w in v[name]] for v in PHILOX]


def test_torch_philox_gives_the_known_answers():
    counter, key = torch.tensor(words("counter")).T, torch.tensor(words("key")).T
    assert torch.stack(philox(counter, key)).T.tolist() == words("words")


@triton.jit
def philox_kernel(inputs, out, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = tl.load(inputs + i * 6).to(tl.uint32)
    c1 = tl.load(inputs + i * 6 + 1).to(tl.uint32)
    c2 = tl.load(inputs + i * 6 + 2).to(tl.uint32)
    c3 = tl.load(inputs + i * 6 + 3).to(tl.uint32)
    k0 = tl.load(inputs + i * 6 + 4).to(tl.uint32)
    k1 = tl.load(inputs + i * 6 + 5).to(tl.uint32)
    w0, w1, w2, w3 = triton_philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + i * 4, w0.to(tl.int64))
    tl.store(out + i * 4 + 1, w1.to(tl.int64))
    tl.store(out + i * 4 + 2, w2.to(tl.int64))
    tl.store(out + i * 4 + 3, w3.to(tl.int64))


def test_triton_philox_gives_the_known_answers():
    inputs = torch.tensor([c + k for c, k in zip(words("counter"), words("key"), strict=True)])
    # Beside the known answers, random inputs against torch; Triton wants a power of two.
    more = torch.randint(1 << 32, (61, 6), generator=torch.Generator().manual_seed(0))
    inputs = torch.cat((inputs, more))
    out = torch.empty(64, 4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](inputs.to(DEVICE), out, N=64)
    assert out[:3].tolist() == words("words")
    assert torch.equal(out.cpu(), torch.stack(philox(inputs.T[:4], inputs.T[4:])).T)


def where_of(v: dict) -> dict:
    return {"noise_shape": v["noise_shape"], "shard": (v["global_shape"], v["origin"])}


def keep_of(v: dict) -> Tensor:
    return torch.tensor([c == "1" for c in v["keep"]]).reshape(v["shape"])


vectors = pytest.mark.parametrize("v", VECTORS, ids=lambda v: v["name"])


@vectors
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_vectors_of_keep_mask(backend, v):
    assert threshold(v["p"]) == v["threshold"]
    domain = DOMAINS[v["domain"]]
    keep = mask(backend, v["shape"], v["p"], v["seed"], v["stream"], domain=domain, **where_of(v))
    assert keep.dtype == torch.bool
    assert torch.equal(keep, keep_of(v))


@vectors
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_vectors_through_an_op(backend, v):
    ones, seed = torch.ones(v["shape"], device=DEVICE), pair(v["seed"], v["stream"])
    with tridrop.backend(backend):
        if v["domain"]:
            out = tridrop.dropout_add(
                ones, torch.zeros_like(ones), 0.0, drop_path=v["p"], seed=seed, **where_of(v)
            )
        else:
            out = tridrop.dropout(ones, v["p"], seed=seed, **where_of(v))
    assert torch.equal(out.cpu(), scaled(keep_of(v), v["p"]))


@pytest.mark.parametrize("v", [v for v in VECTORS if v["folds"]], ids=lambda v: v["name"])
def test_golden_vectors_of_fold_in(v):
    seed = v["seed"]
    for stream in v["folds"]:
        seed = tridrop.fold_in(seed, stream)
    assert seed.tolist() == [v["seed"], v["stream"]]


def test_the_tables_of_the_page_are_the_data():
    keeps = {v["name"]: v["keep"] for v in VECTORS + DATA["attention"]}
    rows = re.findall(r"^\| `(\w[^`]*)` \|.*\| `([01]+)` \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 20
    assert all(keeps[name] == keep for name, keep in rows)
    for v in PHILOX:
        cells = [" ".join(v[name]) for name in ("counter", "key", "words")]
        assert "| `{}` | `{}` | `{}` |".format(*cells) in PAGE


@st.composite
def places(draw):
    """A shape, the dimensions its mask is shared along, and where it lies in a larger tensor."""
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 11, 17]), max_size=4))
    noise = tuple(draw(st.sampled_from([1, None, n])) for n in shape)
    sizes = [max(1, n) for n in shape]
    whole, origin = list(sizes), [0] * len(shape)
    room = ((1 << 63) - 1) // math.prod(sizes)  # how many times larger the whole may be
    for dim in draw(st.permutations(range(len(shape)))):
        factor = draw(st.integers(1, min(room, 5)) | st.integers(1, room))
        room //= factor
        whole[dim] *= factor
        origin[dim] = draw(st.integers(0, whole[dim] - shape[dim]))
    return shape, noise, whole, origin


@exact
@given(places(), int64, int64, probability)
def test_torch_triton_and_numpy_agree_bit_for_bit(place, seed, stream, p):
    shape, noise, whole, origin = place
    expected = numpy_mask.keep_mask(
        (seed, stream), shape, p, noise_shape=noise, shard=(whole, origin)
    )
    for backend in BACKENDS:
        keep = mask(backend, shape, p, seed, stream, noise_shape=noise, shard=(whole, origin))
        assert keep.shape == torch.Size(shape)
        assert np.array_equal(keep.numpy(), expected), backend
    if len(shape) > 1:
        paths = [
            mask(b, shape, p, seed, stream, shard=(whole, origin), domain="drop_path")
            for b in BACKENDS
        ]
        assert torch.equal(*paths)


# ------------------------------------------------------------------------------- invariance

TILES = [(1, 8, 1), (1, 64, 1), (4, 32, 2), (16, 16, 4), (64, 8, 8), (2, 1024, 4)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("noise_shape", [None, (4, 1, 29), (4, 3, 1)], ids=str)
def test_mask_does_not_depend_on_block_size_or_warps(monkeypatch, tile, noise_shape):
    where = {"noise_shape": noise_shape, "shard": ((6, 4, 40), (2, 1, 5))}
    x = torch.ones(4, 3, 29, device=DEVICE)
    with tridrop.backend("reference"):
        expected = dropped(x, 0.3, **where)
    monkeypatch.setattr(launch, "tile", lambda *sizes: launch.Tile(*tile))
    keep = mask("triton", x.shape, 0.3, **where)
    with tridrop.backend("triton"):
        found = dropped(x, 0.3, **where)
    assert torch.equal(keep, expected[0] != 0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product(BACKENDS, (torch.float32, torch.float16, torch.bfloat16)),
        ("reference", torch.float64),
    ],
)
def test_mask_does_not_depend_on_dtype(backend, dtype):
    keep = mask("reference", (5, 3, 20), 0.25)
    with tridrop.backend(backend):
        out, grad = dropped(torch.ones(5, 3, 20, dtype=dtype, device=DEVICE), 0.25)
    assert out.dtype == grad.dtype == dtype
    assert torch.equal(out != 0, keep)
    assert torch.equal(grad != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.permute(2, 0, 1),
        lambda base: base[1::2, :, 3:],
        lambda base: base[:, :1].expand(-1, 9, -1),
        lambda base: base[..., :1].expand(-1, -1, 9),
        lambda base: base[0, 0],
        lambda base: base[..., 3],
        lambda base: base.as_strided((6, 16), (1, 2)),
    ],
    ids=["permuted", "sliced", "expanded_rows", "expanded_cols", "vector", "column", "overlapping"],
)
def test_mask_does_not_depend_on_strides(backend, view):
    x = view(torch.rand(4, 6, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.5)
    with tridrop.backend(backend):
        out, grad = dropped(x, 0.4)
        same, same_grad = dropped(x.contiguous(), 0.4)
        x = x.detach().requires_grad_()
        weight = torch.full(x.shape[::-1], 2.0, device=DEVICE).permute(*range(x.dim())[::-1])
        tridrop.dropout(x, 0.4, seed=1).backward(weight)
    keep = mask(backend, x.shape, 0.4)
    assert torch.equal(out != 0, keep)
    assert torch.equal(out, same)
    assert torch.equal(grad, same_grad)
    assert torch.equal(x.grad.cpu(), 2 * grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(2, 3, 9), (4, 1, 21), (1, 4, 8), (4, 4, 3)], ids=str)
@pytest.mark.parametrize("noise_shape", [None, (1, 4, 21), (4, 1, 21), (4, 4, 1)], ids=str)
def test_masks_of_shards_are_pieces_of_the_whole(backend, cuts, noise_shape):
    shape = (4, 4, 21)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.5
    ranges = [[range(cut), range(cut, n)] for cut, n in zip(cuts, shape, strict=True)]
    with tridrop.backend(backend):
        out, grad = dropped(x, 0.5, noise_shape=noise_shape)
        keep = mask(backend, shape, 0.5, noise_shape=noise_shape)
        paths = mask(backend, shape, 0.5, domain="drop_path")
        for block in itertools.product(*ranges):
            piece = tuple(slice(r.start, r.stop) for r in block)
            local = tuple(len(r) for r in block)
            shared = noise_shape and [1 if n == 1 else None for n in noise_shape]
            shard = tridrop.Shard(shape, tuple(r.start for r in block))
            where = {"shard": shard, "noise_shape": shared}
            assert torch.equal(mask(backend, local, 0.5, **where), keep[piece])
            part, part_grad = dropped(x[piece], 0.5, **where)
            assert torch.equal(part, out[piece])
            assert torch.equal(part_grad, grad[piece])
            path = mask(backend, local, 0.5, shard=shard, domain="drop_path")
            assert torch.equal(path, paths[piece])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_fewer_rows_or_columns_is_a_prefix(backend):
    whole = mask(backend, (6, 128), 0.5)
    for rows, cols in ((4, 100), (6, 1), (1, 128), (5, 7), (2, 64)):
        assert torch.equal(mask(backend, (rows, cols), 0.5), whole[:rows, :cols])
    assert torch.equal(mask(backend, (128,), 0.5), whole[0])
    assert torch.equal(mask(backend, (), 0.5), whole[0, 0])
    assert torch.equal(mask(backend, (2, 3, 128), 0.5), whole.view(2, 3, 128))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [(0,), (1,), (3,), (0, 1), (1, 2), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_shared_mask_is_the_slice_at_index_0_repeated(backend, shared):
    shape = (3, 2, 4, 10)
    noise = tuple(1 if dim in shared else n for dim, n in enumerate(shape))
    first = tuple(slice(0, 1) if dim in shared else slice(None) for dim in range(4))
    expected = mask(backend, shape, 0.5)[first].expand(shape)
    assert torch.equal(mask(backend, shape, 0.5, noise_shape=noise), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise_shape", [None, (6, 1, 33), (6, 1, 1)], ids=str)
def test_backward_draws_the_mask_of_forward(backend, noise_shape):
    x = torch.ones(6, 4, 33, device=DEVICE)
    with tridrop.backend(backend):
        out, grad = dropped(x, 0.5, seed=pair(3, -8), noise_shape=noise_shape)
        torch.manual_seed(0)
        drawn, drawn_grad = dropped(x, 0.5, seed=None)
    keep = mask(backend, x.shape, 0.5, 3, -8, noise_shape=noise_shape)
    assert torch.equal(out, scaled(keep, 0.5))
    assert torch.equal(grad, out)
    assert torch.equal(drawn_grad, drawn)
    assert 0 < (drawn == 0).sum() < drawn.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_is_zero_even_where_the_input_is_not_finite(backend):
    bad = torch.tensor([math.nan, math.inf, -math.inf, math.nan] * 10, device=DEVICE)
    keep = mask(backend, (40,), 0.5)
    with tridrop.backend(backend):
        out, grad = dropped(bad, 0.5)
    assert (out[~keep] == 0).all()
    assert not out[keep].isfinite().any()
    assert torch.equal(grad, scaled(keep, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_do_not_wrap_at_2_31_or_2_32(backend):
    def piece(whole, origin):
        return mask(backend, (16, 16), 0.5, shard=(whole, origin))

    steps = [0, 1 << 31, 1 << 32, 1 << 35, 1 << 36, 1 << 57]
    rows = [piece((1 << 58, 16), (step, 0)) for step in steps]
    cols = [piece((16, 1 << 58), (0, step)) for step in steps]
    assert torch.equal(rows[0], cols[0])
    for a, b in itertools.combinations(rows + cols[1:], 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("origin", [(1 << 62) - 100, (1 << 62) - 2, (1 << 31) - 5, (1 << 32) - 5])
def test_shards_far_down_agree(origin):
    shape, whole = (9, 1), ((1 << 62) + 10, 1)
    expected = numpy_mask.keep_mask(1, shape, 0.5, shard=(whole, (origin, 0)))
    for backend in BACKENDS:
        keep = mask(backend, shape, 0.5, shard=(whole, (origin, 0)))
        assert np.array_equal(keep.numpy(), expected)
