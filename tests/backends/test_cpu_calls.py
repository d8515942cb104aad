"""Ops whose rows drop whole, and ops that drop nothing: by numba's loops and by torch."""

import math

import pytest
import torch
import torch.nn.functional as F

import tridrop
from tridrop.backends.cpu import serving
from tridrop.commands.check.measure import error, tolerance

pytestmark = pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")

SHAPES = [(4, 3, 64), (6, 40), (3, 5, 7), (2, 3, 1100), (40, 16)]


def operands(shape, dtype, computed=None):
    """Values of ``dtype``, in the dtype ``computed``."""
    generator = torch.Generator().manual_seed(1)
    sizes = [shape, shape, *[shape[-1:]] * 3]
    values = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    return [t.to(computed or dtype).requires_grad_() for t in values]


# name -> the op, of x, a residual, three vectors and a seed, for tensors of a shape
DROPS = {
    "drop_path": lambda x, r, a, b, c, seed: tridrop.dropout_add(
        x, r, 0.0, bias=a, layer_scale=b, activation="gelu", drop_path=0.4, seed=seed
    ),
    "both": lambda x, r, a, b, c, seed: tridrop.dropout_add(
        x, r, 0.3, layer_scale=b, drop_path=0.4, seed=seed
    ),
    "rows": lambda x, r, a, b, c, seed: tridrop.dropout_add(
        x, r, 0.4, bias=a, noise_shape=(*x.shape[:-1], 1), seed=seed
    ),
    "samples": lambda x, r, a, b, c, seed: tridrop.dropout_add(
        x, r, 0.4, noise_shape=(x.shape[0], *[1] * (x.dim() - 1)), drop_path=0.2, seed=seed
    ),
    "norm": lambda x, r, a, b, c, seed: tridrop.dropout_add_layer_norm(
        x, r, a, b, 0.3, bias=c, layer_scale=b, drop_path=0.4, seed=seed
    ),
    "after": lambda x, r, a, b, c, seed: tridrop.rms_norm_dropout(
        x, a, 0.3, residual=r, drop_path=0.4, zero_centered_weight=True, seed=seed
    ),
}
KEEPS = {
    "bias": lambda x, r, a, b, c, seed: tridrop.dropout_add(x, r, 0.0, bias=a, layer_scale=b),
    "gated": lambda x, r, a, b, c, seed: tridrop.activation_dropout(
        torch.cat([x, r], -1), 0.0, activation="swiglu"
    ),
    "silu": lambda x, r, a, b, c, seed: tridrop.dropout_add(x, r, 0.0, activation="silu", bias=a),
    "norm": lambda x, r, a, b, c, seed: tridrop.dropout_add_layer_norm(x, r, a, b, 0.0),
    "after": lambda x, r, a, b, c, seed: tridrop.layer_norm_dropout(x, a, b, 0.0, residual=r),
}


def run(op, dtype, shape, seed=5, computed=None):
    given = operands(shape, dtype, computed)
    out = op(*given, seed)
    incoming = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, incoming, allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", [*DROPS.values(), *KEEPS.values()], ids=[*DROPS, *KEEPS])
def test_results_are_those_of_the_composition(op, shape, dtype):
    found = run(op, dtype, shape)
    with tridrop.backend("reference"):
        plain, wide = run(op, dtype, shape), run(op, dtype, shape, computed=torch.float64)
    for ours, theirs, expected in zip(found, plain, wide, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            sums = 2e-5 * max(1.0, float(expected.abs().max()))  # in fp32, row after row
            assert error(ours, expected) <= tolerance(theirs, expected) + sums


@pytest.mark.parametrize("op", ["drop_path", "both", "rows", "samples", "norm", "after"])
def test_numba_makes_them(monkeypatch, op):
    def refuse(*given):
        raise AssertionError

    from tridrop.backends.reference import elementwise

    monkeypatch.setattr(elementwise, "multiplier", refuse)
    for shape in SHAPES:
        run(DROPS[op], torch.float32, shape)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_drop_are_exactly_zero(value):
    x = torch.full((64, 4, 32), value, requires_grad=True)
    zero = torch.zeros(64, 4, 32)
    for p in (0.0, 0.5):
        out = tridrop.dropout_add(x, zero, p, drop_path=0.5, seed=3)
        kept = tridrop.keep_mask(3, (64, 4, 32), 0.5, domain="drop_path")
        if p:
            kept = kept & tridrop.keep_mask(3, (64, 4, 32), p)
        assert 0 < kept.float().mean() < 1
        assert (out[~kept] == 0).all()
        assert not out[kept].isfinite().any()
        (grad,) = torch.autograd.grad(out, x, torch.full_like(zero, value))
        assert (grad[~kept] == 0).all()


def test_shards_of_samples(monkeypatch):
    x = torch.randn(8, 6, 64)
    r = torch.randn(8, 6, 64)
    for p in (0.0, 0.3):
        whole = tridrop.dropout_add(x, r, p, drop_path=0.5, seed=4)
        for rows in (slice(0, 5), slice(5, 8)):
            part = tridrop.dropout_add(
                x[rows], r[rows], p, drop_path=0.5, seed=4,
                shard=tridrop.Shard((8, 6, 64), (rows.start, 0, 0)),
            )  # fmt: skip
            assert torch.equal(part, whole[rows])


def test_a_seed_of_any_strides():
    x = torch.ones(8, 64)
    seed = torch.arange(6).view(2, 3)[:, 1]
    assert not seed.is_contiguous()
    for options in ({}, {"noise_shape": (8, 1)}):
        found = tridrop.dropout(x, 0.5, seed=seed, **options)
        assert torch.equal(found, tridrop.dropout(x, 0.5, seed=seed.clone(), **options))
    assert torch.equal(
        tridrop.keep_mask(seed, x.shape, 0.5), tridrop.dropout(x, 0.5, seed=seed) > 0
    )


# --------------------------------------------------------------------------- nothing is dropped


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_the_bits_are_torchs(dtype, training):
    x, r, a, *_ = (t.detach() for t in operands((6, 40), dtype))
    p = 0.0 if training else 0.5
    for name, function in {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
        "silu": F.silu,
    }.items():
        found = tridrop.activation_dropout(x, p, training, activation=name)
        assert torch.equal(found, function(x))
        assert found.data_ptr() != x.data_ptr()
        if dtype == torch.float32:
            found = tridrop.dropout_add(x, r, p, training, activation=name, bias=a)
            assert torch.equal(found, r + function(x + a))
    assert torch.equal(tridrop.dropout_add(x, r, p, training), r + x)
    assert torch.equal(tridrop.dropout_add(x.mT, r.mT, p, training), (r + x).mT)


def test_without_dropout_a_gradient_goes_through_as_it_is():
    x, r, *_ = operands((6, 40), torch.float32)
    incoming = torch.randn(6, 40)
    out = tridrop.dropout_add(x, r, 0.0)
    dx, dr = torch.autograd.grad(out, (x, r), incoming)
    assert torch.equal(dx, incoming)
    assert torch.equal(dr, incoming)
    half = x.detach().bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(tridrop.dropout_add(half, r, 0.0), half, incoming)
    assert torch.equal(dx, incoming.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_the_gradients_of_activations_are_torchs(dtype):
    x, r, a, b, _ = operands((6, 40), dtype)
    for name, function in {"gelu": F.gelu, "silu": F.silu}.items():
        for bias in (None, a) if dtype == torch.float32 else (None,):
            ours = tridrop.activation_dropout(x, 0.0, activation=name, bias=bias)
            theirs = function(x if bias is None else x + bias)
            given = [t for t in (x, bias) if t is not None]
            for found, wanted in zip(
                *(torch.autograd.grad(o, given, r.detach()) for o in (ours, theirs)), strict=True
            ):
                assert torch.equal(found, wanted) or found.dim() == 1
                torch.testing.assert_close(found, wanted)
    # A gain is not passed over.
    out = tridrop.dropout_add(x, r, 0.0, activation="gelu", layer_scale=b)
    (found,) = torch.autograd.grad(out, x, torch.ones_like(out))
    (wanted,) = torch.autograd.grad(F.gelu(x) * b, x, torch.ones_like(out))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_without_dropout_no_number_is_drawn():
    state = torch.get_rng_state()
    for op in KEEPS.values():
        run(op, torch.float32, (4, 16), None)
    assert torch.equal(torch.get_rng_state(), state)
