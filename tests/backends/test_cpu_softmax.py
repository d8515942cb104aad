"""The softmax of scores, and attention, by numba's loops and by torch."""

import math

import pytest
import torch

import tridrop
from tridrop import Shard
from tridrop.backends.cpu import by_head, products, serving
from tridrop.backends.cpu import softmax as scores
from tridrop.backends.reference import blocks
from tridrop.commands.check.measure import error, tolerance

pytestmark = pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")

SHAPES = [(2, 3, 5, 7), (2, 3, 40, 33), (1, 2, 64, 64), (2, 1, 3, 1100), (4, 50)]
SEEN = {
    "all": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "both": {"return_softmax": True, "is_causal": True},
    "bias": {"mask": "floats", "scale": 0.5},
    "whole": {"mask": "whole", "scale": 0.5, "return_softmax": True},
    "mask": {"mask": "bools", "is_causal": True},
}


def draw(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(call, leaves):
    """Values and gradients, for incoming gradients of all results."""
    out = call()
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    incoming = [torch.linspace(-1, 1, o.numel()).view_as(o).to(o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, leaves, incoming, allow_unused=True)]


def softmax(dtype, shape, options, p, computed=None):
    """Values of ``dtype``, computed in another."""
    computed = computed or dtype
    given = [draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=2)]
    x, bias = (t.to(computed).requires_grad_() for t in given)
    masks = {"floats": bias, "whole": bias.expand(shape), "bools": draw(*shape[-2:], seed=3) > -0.5}
    options = {**options, "mask": masks.get(options.get("mask"))}
    return results(lambda: tridrop.softmax_dropout(x, p, seed=3, **options), (x, bias))


def assert_alike(found, plain, wide):
    """As near to what fp64 gives as torch's composition is."""
    for ours, theirs, expected in zip(found, plain, wide, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            ours, theirs, expected = (t.detach() for t in (ours, theirs, expected))
            sums = 2e-6 * max(1.0, float(expected.abs().max()))
            assert error(ours, expected) <= tolerance(theirs, expected) + sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", SEEN.values(), ids=SEEN)
def test_softmax_is_that_of_the_composition(options, shape, dtype):
    for p in (0.0, 0.3, 1.0):
        found = softmax(dtype, shape, options, p)
        with tridrop.backend("reference"):
            plain = softmax(dtype, shape, options, p)
            wide = softmax(dtype, shape, options, p, computed=torch.float64)
        assert_alike(found, plain, wide)
        dropped = plain[0] == 0
        assert torch.equal(found[0] == 0, dropped)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.5},
    "window": {"window": (3, 2)},
    "padded": {"key_mask": torch.arange(21).expand(2, -1) < torch.tensor([[21], [8]])},
    "softcap": {"softcap": 2.0},
    "bias": {"attn_mask": draw(3, 1, 21, seed=5)},
    "later keys": {"shard": Shard((2, 3, 40, 70), (0, 0, 7, 45))},
}


def attention(dtype, queries, options, computed=None):
    computed = computed or dtype
    given = [draw(2, 3, queries, 8, seed=4, dtype=dtype)]
    given += [draw(2, 3, 21, 8, seed=n, dtype=dtype) for n in (5, 6)]
    leaves = [t.to(computed).requires_grad_() for t in given]
    options = {k: v.to(computed) if k == "attn_mask" else v for k, v in options.items()}
    return results(
        lambda: tridrop.scaled_dot_product_attention(
            *leaves, dropout_p=0.3, return_lse=True, seed=3, **options
        ),
        leaves,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_that_of_the_composition(monkeypatch, options, small, dtype):
    if not small:
        monkeypatch.setattr(by_head, "torchs_team", lambda: None)
        monkeypatch.setattr(blocks, "_SMALL", 0)
        monkeypatch.setattr(blocks, "_BAND", 8)
        monkeypatch.setitem(blocks._SCORES, "cpu", 400)
    found = attention(dtype, 29, options)
    with tridrop.backend("reference"):
        plain = attention(dtype, 29, options)
        wide = attention(dtype, 29, options, computed=torch.float64)
    assert_alike(found, plain, wide)


def test_numba_makes_them(monkeypatch):
    monkeypatch.setattr(scores, "_call", None)
    monkeypatch.setattr(products, "call", None)
    x = draw(1, 2, 4, 8)
    for call in (
        lambda: tridrop.softmax_dropout(x, 0.5),
        lambda: tridrop.softmax_dropout(x, 0.0, is_causal=True),
        lambda: tridrop.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ):
        with pytest.raises(TypeError, match="NoneType"):
            call()
    tridrop.softmax_dropout(x, 0.0)  # torch's own
    tridrop.softmax_dropout(x.double(), 0.5)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_special_scores(bad):
    x = draw(1, 2, 6, 20)
    x[0, 0, 1, 3] = x[0, 1, 2] = bad
    grad = torch.ones_like(x)
    found = []
    for name in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        with tridrop.backend(name):
            out = tridrop.softmax_dropout(leaf, 0.4, scale=2.0, seed=5)
        found.append((out, *torch.autograd.grad(out, leaf, grad)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert (found[0][0] == 0).any()


def test_incoming_gradients_of_dropped_elements_do_not_matter():
    x = draw(1, 1, 4, 40).requires_grad_()
    out = tridrop.softmax_dropout(x, 0.5, seed=3)
    grad = torch.where(out == 0, math.nan, 1.0)
    (found,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    (expected,) = torch.autograd.grad(out, x, torch.ones_like(grad))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [12, 300])
def test_autocast_changes_the_operands_and_nothing_else(backend, length):
    wide = [draw(1, 2, length, 16, seed=n).requires_grad_() for n in (1, 2, 3)]
    narrow = [t.detach().bfloat16().requires_grad_() for t in wide]

    def call(q, k, v):
        return tridrop.scaled_dot_product_attention(
            q, k, v, dropout_p=0.3, is_causal=True, return_lse=True, seed=2
        )

    with tridrop.backend(backend):
        expected = results(lambda: call(*narrow), narrow)
    for _ in range(2):  # a call that is checked, and a known one
        with tridrop.backend(backend), torch.autocast("cpu", torch.bfloat16):
            found = results(lambda: call(*wide), wide)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=0)
    assert found[1].dtype == torch.float32


def test_results_do_not_depend_on_the_number_of_threads():
    x = draw(2, 3, 500, 300).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(lambda: tridrop.softmax_dropout(x, 0.3, seed=1), (x,)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("last", [0, 45, (1 << 32) - 40])
def test_the_mask_of_any_key_on(last):
    x = torch.zeros(2, 3, 5, 37)
    whole = Shard((9, 9, 99, 1 << 32), (7, 5, 90, last))
    out = tridrop.softmax_dropout(x, 0.5, seed=4, shard=whole)
    keep = tridrop.attention_keep_mask(4, x.shape, 0.5, shard=whole)
    assert torch.equal(out != 0, keep)
