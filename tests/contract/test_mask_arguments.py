"""What the mask contract is told: p as a number or a tensor, seeds, and every error message."""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import DEVICE, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tridrop
from tridrop.contract.mask import as_seed, key_of, rate_table, scale, threshold
from tridrop.masks import numpy_mask
from tridrop.spec.elementwise import Options
from tridrop.spec.operands import Elementwise, ElementwiseBackward

BACKENDS = [PLAIN, "triton"]
PAGE = (Path(__file__).parents[2] / "docs" / "mask-contract.md").read_text()

exact = settings(max_examples=100, deadline=None, derandomize=True)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
probability = st.floats(0, 1) | st.integers(0, 1 << 33).map(lambda k: k / 2**33)


def keep_mask(backend: str, shape, p, seed: int = 1, **where) -> Tensor:
    with tridrop.backend(backend):
        return tridrop.keep_mask(seed, shape, p, device=DEVICE, **where).cpu()


# ----------------------------------------------------------------------------------- p


@pytest.mark.parametrize(
    ("halves", "expected"),
    [
        *((0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)),
        *((2**33 - 3, 2**32 - 2), (2**33 - 1, 2**32), (2**33, 2**32)),
    ],
)
def test_threshold_rounds_half_to_even(halves, expected):
    p = halves / 2**33
    assert threshold(p) == numpy_mask.threshold(p) == expected
    assert rate_table(torch.tensor(p, dtype=torch.float64))[0] == expected


@exact
@given(probability)
def test_rate_and_scale_follow_from_one_threshold(p):
    t = threshold(p)
    assert isinstance(t, int)
    assert abs(t - p * 2**32) <= 0.5
    assert scale(t) == (2**32 / (2**32 - t) if t < 2**32 else 0)
    assert rate_table(torch.tensor(p, dtype=torch.float64)).tolist() == [t, scale(t)]
    assert (numpy_mask.threshold(p), numpy_mask.scale(p)) == (t, scale(t))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 5e-324, 1e-12, 2**-33])
def test_p_below_the_resolution_drops_nothing(backend, p):
    x = torch.rand(1000, device=DEVICE).requires_grad_()
    assert keep_mask(backend, (1000,), p).all()
    with tridrop.backend(backend):
        out = tridrop.dropout(x, p, seed=1)
    out.sum().backward()
    assert torch.equal(out, x)
    assert (x.grad == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1, 1.0, 1 - 2**-33])
def test_p_of_one_drops_everything(backend, p):
    x = torch.full((1000,), math.nan, device=DEVICE).requires_grad_()
    assert not keep_mask(backend, (1000,), p).any()
    with tridrop.backend(backend):
        out = tridrop.dropout(x, p, seed=1)
    out.sum().backward()
    assert (out == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_at_a_larger_p_is_kept_at_a_smaller_one(backend):
    before = torch.ones(4, 256, dtype=torch.bool)
    for p in (0.0, 0.001, 0.1, 0.3, 0.5, 0.50001, 0.9, 0.999, 1.0):
        keep = keep_mask(backend, (4, 256), p)
        assert not (keep & ~before).any()
        before = keep


def tensor_path(backend: str, x: Tensor, p: Tensor, options: Options) -> tuple[Tensor, ...]:
    """Mask, output and gradient with a rate that only the device knows, as on an accelerator.

    The public functions read a p on the CPU, so the backends are called directly.
    """
    module, seed = importlib.import_module(f"tridrop.backends.{backend}"), as_seed(1, DEVICE)
    keep = module.keep_mask(seed, tuple(x.shape), p, options, "elements")
    operands = Elementwise(x, seed=seed, p=p)
    op = module.prepare("elementwise", tuple(x.shape), options, operands, ())
    out = op.forward(operands)
    ones = torch.ones_like(out)
    dtypes = (x.dtype, None, None)
    grad, _, _ = op.backward(ElementwiseBackward(ones, seed=seed, p=p), dtypes)
    return keep.cpu(), out.cpu(), grad.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.999, 1.0])
def test_tensor_p_equals_the_float_of_its_value(backend, dtype, p):
    p_tensor = torch.tensor(p, dtype=dtype, device=DEVICE)
    x = torch.ones(3, 2, 40, device=DEVICE)
    for shared in ((), (1,), (2,)):
        noise = tuple(1 if dim in shared else None for dim in range(3))
        expected = keep_mask(backend, x.shape, float(p_tensor), noise_shape=noise)
        assert torch.equal(keep_mask(backend, x.shape, p_tensor, noise_shape=noise), expected)
        with tridrop.backend(backend):
            out = tridrop.dropout(x, float(p_tensor), seed=1, noise_shape=noise).cpu()
            public = tridrop.dropout(x, p_tensor, seed=1, noise_shape=noise).cpu()
        keep, found, grad = tensor_path(backend, x, p_tensor, Options(shared=shared))
        assert torch.equal(keep, expected)
        for result in (public, found, grad):
            assert torch.equal(result, out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [math.nan, 1.5, -0.1, math.inf, 1 + 2**-20])
def test_tensor_p_that_is_no_probability_gives_nan_where_it_cannot_raise(backend, p):
    x = torch.ones(3, 40, device=DEVICE)
    keep, out, grad = tensor_path(backend, x, torch.tensor(p, device=DEVICE), Options())
    assert keep.all()
    assert out.isnan().all()
    assert grad.isnan().all()


# -------------------------------------------------------------------------------- seeds


@exact
@given(int64, int64)
def test_key_is_that_of_the_contract(seed, stream):
    k0, k1 = key_of(torch.tensor([seed, stream]))
    assert (int(k0), int(k1)) == tuple(int(k) for k in numpy_mask.key((seed, stream)))


@exact
@given(int64, int64, int64)
def test_fold_in_is_that_of_the_contract_for_ints_and_tensors(seed, first, second):
    expected = numpy_mask.fold_in((seed, first), second)
    for stream in (second, torch.tensor(second)):
        assert tridrop.fold_in(seed, stream).tolist() == [seed, second]
        assert tridrop.fold_in(tridrop.fold_in(seed, first), stream).tolist() == list(expected)


def test_int_seed_is_the_pair_with_stream_0():
    for seed in (0, 7, -1, (1 << 63) - 1, -(1 << 63)):
        assert as_seed(seed).tolist() == [seed, 0]
        a, b = (tridrop.keep_mask(s, (64,), 0.5) for s in (seed, torch.tensor([seed, 0])))
        assert torch.equal(a, b)
    made = torch.tensor([1, 2])
    assert as_seed(made) is made
    assert as_seed(7, DEVICE).device.type == DEVICE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_may_be_a_column_of_a_table(backend):
    """Its two numbers are not adjacent in memory then."""
    table = torch.tensor([[3, 7], [1 << 40, 9]], device=DEVICE)
    x, q = torch.ones(4, 24, device=DEVICE), torch.ones(1, 2, 8, 8, device=DEVICE)
    with tridrop.backend(backend):
        for seed in table.unbind(1):
            straight = seed.contiguous()
            for call in (
                lambda s: tridrop.dropout(x, 0.5, seed=s),
                lambda s: tridrop.dropout_add_rms_norm(x, x, None, p=0.5, seed=s),
                lambda s: tridrop.softmax_dropout(q, 0.5, seed=s),
                lambda s: tridrop.scaled_dot_product_attention(q, q, q, None, 0.5, seed=s),
                lambda s: tridrop.keep_mask(s, (4, 24), 0.5),
                lambda s: tridrop.attention_keep_mask(s, (1, 2, 8, 8), 0.5),
                lambda s: tridrop.normal_noise(s, (4, 24)),
            ):
                assert torch.equal(call(seed), call(straight))


def test_new_seed_follows_the_generator_of_the_device():
    torch.manual_seed(5)
    first, second = tridrop.new_seed(DEVICE), tridrop.new_seed(DEVICE)
    torch.manual_seed(5)
    assert torch.equal(tridrop.new_seed(DEVICE), first)
    assert not torch.equal(first, second)
    assert (first.dtype, first.shape, first.device.type) == (torch.int64, (2,), DEVICE)


def test_new_seed_of_a_generator_leaves_the_default_one_alone():
    torch.manual_seed(5)
    expected = tridrop.new_seed(DEVICE)
    torch.manual_seed(5)
    drawn = [
        tridrop.new_seed(DEVICE, generator=torch.Generator(DEVICE).manual_seed(n)).tolist()
        for n in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(tridrop.new_seed(DEVICE), expected)


def test_drawn_seeds_fill_both_entries_and_have_distinct_keys():
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn = torch.stack([tridrop.new_seed(DEVICE, generator) for _ in range(2000)]).cpu()
    assert (drawn >= 0).all()
    # 2000 draws of an entry below 2^55 would be of a probability of 2^-8 each.
    assert (drawn.amax(0) > 1 << 62).all()
    k0, k1 = key_of(drawn.T)
    assert len(set(zip(k0.tolist(), k1.tolist(), strict=True))) == 2000


STREAM, FOLD, TWO64 = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 1 << 64


def smallest_distance(multiplier: int, below: int) -> tuple[int, int]:
    """(min over 1 <= t < below of the distance of t * multiplier to 0 modulo 2^64, its t).

    By the law of best approximation the minimum is at the denominator of a convergent of the
    continued fraction of multiplier / 2^64.
    """
    a, b, before, q = TWO64, multiplier, 0, 1
    best = (TWO64, 0)
    while q < below:
        best = min(best, (min(b, TWO64 - b), q))
        (a, b), (before, q) = (b, a % b), (q, before + a // b * q)
    return best


def test_keys_differ_in_the_windows_that_the_page_states():
    t = np.arange(1, 1 << 20, dtype=np.uint64) * np.uint64(STREAM)
    assert smallest_distance(STREAM, 1 << 20)[0] == np.minimum(t, -t).min()
    for bits, power in ((16, 47), (24, 39), (31, 32), (32, 25)):
        distance, at = smallest_distance(STREAM, 1 << bits)
        assert distance > 1 << power
        row = rf"\| `2\^{bits}` \| {distance:,} \(more than `2\^{power}`\) \| {at:,} \|"
        assert re.search(row, PAGE), row
    # The last row is sharp, and outside the windows there are collisions as stated.
    assert numpy_mask.key((50920843, 2971215073)) == numpy_mask.key((0, 0))
    assert numpy_mask.key((0, 1 << 62)) == numpy_mask.key((1 << 62, 0))


def test_nested_keys_differ_in_the_window_that_the_page_states():
    inner = np.arange(1 - (1 << 16), 1 << 16).astype(np.uint64) * np.uint64(STREAM)
    inner.sort()
    outer = np.arange(1, 1 << 16, dtype=np.uint64) * np.uint64(STREAM * FOLD % TWO64)
    at = np.searchsorted(inner, outer)
    gaps = [inner[(at + i) % len(inner)] - outer for i in (-1, 0)]  # wrapping, as keys do
    smallest = int(np.minimum.reduce([np.minimum(gap, -gap) for gap in gaps]).min())
    assert smallest > 1 << 25
    assert f"{smallest:,}" in PAGE


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        (True, TypeError, "bool"),
        (1.0, TypeError, "float"),
        ("1", TypeError, "str"),
        (1 << 63, ValueError, "outside int64"),
        (-(1 << 63) - 1, ValueError, "outside int64"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "dtype torch.int32"),
        (torch.tensor([1.0, 2.0]), TypeError, "dtype torch.float32"),
        (torch.tensor(1), ValueError, r"shape \(\)"),
        (torch.tensor([1]), ValueError, "new_seed"),
        (torch.tensor([[1, 2]]), ValueError, r"shape \(1, 2\)"),
    ],
    ids=str,
)
def test_errors_of_seeds(seed, error, message):
    for call in (as_seed, lambda s: tridrop.fold_in(s, 1), lambda s: tridrop.keep_mask(s, (4,), 0)):
        with pytest.raises(error, match=message):
            call(seed)
    if seed is not None:
        with pytest.raises(error, match=message):
            tridrop.dropout(torch.ones(4), 0.5, seed=seed)


def test_error_of_a_seed_on_another_device():
    with pytest.raises(ValueError, match="move it once"):
        as_seed(torch.tensor([1, 2]), "meta")
    with pytest.raises(ValueError, match="move it once"):
        tridrop.keep_mask(torch.tensor([1, 2]), (4,), 0.5, device="meta")


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (True, TypeError, "bool"),
        (0.5, TypeError, "float"),
        (None, TypeError, "NoneType"),
        (1 << 63, ValueError, "outside int64"),
        (torch.tensor(1, dtype=torch.int32), TypeError, "dtype torch.int32"),
        (torch.tensor([1]), TypeError, r"shape \(1,\)"),
    ],
    ids=str,
)
def test_errors_of_fold_in(stream, error, message):
    with pytest.raises(error, match=message):
        tridrop.fold_in(1, stream)


def dropout(shape, p, **where) -> Tensor:
    return tridrop.dropout(torch.ones(shape), p, seed=1, **where)


def mask(shape, p, **where) -> Tensor:
    return tridrop.keep_mask(1, shape, p, **where)


@pytest.mark.parametrize("call", [dropout, mask])
@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (-1e-9, ValueError, "lie in"),
        (1 + 1e-9, ValueError, "lie in"),
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (True, TypeError, "bool"),
        ("0.5", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (torch.tensor([0.5]), TypeError, "0-d"),
        (torch.tensor(1), TypeError, "floating-point"),
        (torch.tensor(0.5, requires_grad=True), ValueError, "requires grad"),
        (torch.tensor(1.5), ValueError, "lie in"),  # on the CPU the host reads it
        (torch.tensor(math.nan), ValueError, "nan"),
    ],
    ids=str,
)
def test_errors_of_p(call, p, error, message):
    with pytest.raises(error, match=message):
        call((4,), p)


@pytest.mark.parametrize("call", [dropout, mask])
@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"noise_shape": (2,)}, ValueError, "1 entries"),
        ({"noise_shape": (2, 3, 1)}, ValueError, "3 entries"),
        ({"noise_shape": (3, 3)}, ValueError, r"noise_shape\[0\] = 3"),
        ({"noise_shape": (2, 0)}, ValueError, r"noise_shape\[1\] = 0"),
        ({"noise_shape": (True, 3)}, ValueError, r"noise_shape\[0\] = True"),
        ({"noise_shape": (-1, 3)}, ValueError, r"noise_shape\[0\] = -1"),
        ({"noise_shape": "ab"}, TypeError, "str"),
        ({"noise_shape": 1}, TypeError, "int"),
        ({"shard": ((4, 3), (3, 0))}, ValueError, "dimension 0"),
        ({"shard": ((4, 3), (0, 1))}, ValueError, "dimension 1"),
        ({"shard": ((4, 3), (-1, 0))}, ValueError, "origin -1"),
        ({"shard": ((4, 3, 1), (0, 0))}, ValueError, "same number of dimensions"),
        ({"shard": ((4,), (0,))}, ValueError, "same number of dimensions"),
        ({"shard": ((1 << 32, 1 << 31), (0, 0))}, ValueError, r"2\^63"),
        ({"shard": 3}, TypeError, "tridrop.Shard"),
        ({"shard": ((4, 3), (0, 0), (0, 0))}, TypeError, "tridrop.Shard"),
    ],
    ids=str,
)
def test_errors_of_noise_shape_and_shard(call, where, error, message):
    with pytest.raises(error, match=message):
        call((2, 3), 0.5, **where)


@pytest.mark.parametrize(
    ("shape", "where", "message"),
    [
        ((-1, 3), {}, "non-negative"),
        ((2.0,), {}, "non-negative"),
        ((True,), {}, "non-negative"),
        ((4,), {"domain": "drop_path"}, "two dimensions"),
        ((4, 2), {"domain": "drop_path", "noise_shape": (4, 1)}, "without noise_shape"),
        ((4, 2), {"domain": "attention"}, "known: 'elements', 'drop_path'"),
    ],
    ids=str,
)
def test_errors_of_keep_mask(shape, where, message):
    with pytest.raises(ValueError, match=message):
        mask(shape, 0.5, **where)
