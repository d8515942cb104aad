"""Attention: accuracy, masks of every kind, one dropout mask; the cases: test_check.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tridrop
from tridrop import scaled_dot_product_attention as sdpa
from tridrop.backends.triton import attention_launch
from tridrop.commands.check.measure import error, tolerance
from tridrop.contract.mask import scale, threshold

BACKENDS = [PLAIN, "reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """New tensors are full of NaN, so that an element that no kernel writes is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() else t

        monkeypatch.setattr(owner, name, poisoned)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def inputs(batch=2, heads=2, queries=20, keys=37, width=16, value_width=16, key_heads=None, **more):
    shared = key_heads or heads
    return (
        draw(batch, heads, queries, width, seed=1, **more),
        draw(batch, shared, keys, width, seed=2, **more),
        draw(batch, shared, keys, value_width, seed=3, **more),
    )


def run(function, *tensors: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """The result and the gradient of every tensor."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    out = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    incoming = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, incoming)]


def kept(shape, p, seed=3) -> Tensor:
    return tridrop.attention_keep_mask(seed, shape, p, device=DEVICE)


def eager(query, key, value, mask=None, p=0.0, keep=None):
    """Plain attention, with a safe softmax, under an exported mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    if keep is not None:
        weights = torch.where(keep, weights * scale(threshold(p)), 0)
    return weights @ value


def assert_as_accurate_as_eager(fused, plain, tensors, grad):
    """Every result within twice eager's own error against fp64.

    A gradient that cancels to zero is held to eight fp32 roundings of the terms that cancel.
    """
    value = tensors[2].float().abs().amax((0, 1))  # the largest products of dout and value
    terms = float((grad[..., : value.shape[-1]].abs() @ value.T).max())
    exact = run(plain, *(t.double() if t.is_floating_point() else t for t in tensors), grad=grad)
    eagers = run(plain, *tensors, grad=grad)
    found = run(fused, *tensors, grad=grad)
    for f, e, t in zip(found, eagers, exact, strict=True):
        assert f.dtype == e.dtype
        cancels = float(t.abs().max()) < torch.finfo(torch.float64).eps * terms
        floor = 8 * torch.finfo(torch.float32).eps / 2 * terms if cancels else 0.0
        assert error(f, t) <= tolerance(e, t) + floor


# ------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_and_gradients_under_the_exported_mask(backend, p, dtype):
    tensors = (*inputs(dtype=dtype), draw(1, 2, 20, 37, seed=4, dtype=dtype))
    keep = kept((2, 2, 20, 37), p) if p else None
    grad = draw(2, 2, 20, 16, seed=5)

    def fused(query, key, value, mask):
        return sdpa(query, key, value, mask, p, seed=3)

    def plain(query, key, value, mask):
        return eager(query, key, value, mask, p, keep)

    assert_as_accurate_as_eager(fused, plain, tensors, grad)


@pytest.mark.parametrize("width", [16, 24, 40, 64, 80, 128, 192, 256])
def test_head_dimensions_that_are_no_powers_of_two(backend, width):
    tensors = inputs(1, 1, 9, 33, width, max(8, width - 24))
    keep = kept((1, 1, 9, 33), 0.2)
    assert_as_accurate_as_eager(
        lambda q, k, v: sdpa(q, k, v, dropout_p=0.2, seed=3),
        lambda q, k, v: eager(q, k, v, None, 0.2, keep),
        tensors,
        draw(1, 1, 9, max(8, width - 24), seed=5),
    )


@pytest.mark.parametrize("lengths", [(1, 1), (1, 65), (64, 64), (65, 31), (3, 200), (130, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(backend, lengths, is_causal):
    queries, keys = lengths
    mask = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE)
    mask = mask.tril() if is_causal else mask
    keep = kept((1, 2, queries, keys), 0.3)
    assert_as_accurate_as_eager(
        lambda q, k, v: sdpa(q, k, v, None, 0.3, is_causal, seed=3),
        lambda q, k, v: eager(q, k, v, mask, 0.3, keep),
        inputs(1, 2, queries, keys),
        draw(1, 2, queries, 16, seed=5),
    )


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -1.0}])
def test_without_dropout_it_is_torchs_own(backend, options):
    tensors = inputs()
    assert_as_accurate_as_eager(
        lambda q, k, v: sdpa(q, k, v, **options),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        tensors,
        draw(2, 2, 20, 16, seed=5),
    )


def test_p_of_one_gives_zeros(backend):
    out, *gradients = run(lambda q, k, v: sdpa(q, k, v, dropout_p=1.0, seed=3), *inputs())
    for t in (out, *gradients):
        assert torch.equal(t, torch.zeros_like(t))


# ---------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "shape", [(20, 37), (37,), (1, 1, 20, 1), (2, 1, 1, 37), (2, 2, 20, 37), (1, 2, 1, 1), ()]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_of_a_float_mask_is_summed_over_what_it_shares(backend, shape, is_causal):
    band = torch.ones(20, 37, device=DEVICE).tril() if is_causal else torch.ones(20, 37)
    hidden = torch.where(band.to(DEVICE) > 0, 0.0, -math.inf)
    keep = kept((2, 2, 20, 37), 0.2)
    assert_as_accurate_as_eager(
        lambda q, k, v, m: sdpa(q, k, v, m, 0.2, is_causal, seed=3),
        lambda q, k, v, m: eager(q, k, v, m + hidden.to(q.dtype), 0.2, keep),
        (*inputs(), draw(*shape, seed=9)),
        draw(2, 2, 20, 16, seed=5),
    )


WINDOWS = [(4, 2), (0, 0), (None, 3), (6, None), 5, (100, 100), (2**31 - 1, 2**40)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_sliding_windows(backend, window, is_causal):
    left, right = (window, window) if isinstance(window, int) else window
    distance = torch.arange(50)[None, :] - torch.arange(70)[:, None]
    mask = torch.ones(70, 50, dtype=torch.bool)
    mask &= distance >= -(100 if left is None else min(left, 100))
    mask &= distance <= (100 if right is None else min(right, 100))
    mask = (mask.tril() if is_causal else mask).to(DEVICE)
    keep = kept((1, 1, 70, 50), 0.2)
    assert_as_accurate_as_eager(
        lambda q, k, v: sdpa(q, k, v, None, 0.2, is_causal, window=window, seed=3),
        lambda q, k, v: eager(q, k, v, mask, 0.2, keep),
        inputs(1, 1, 70, 50),
        draw(1, 1, 70, 16, seed=5),
    )


def test_every_kind_of_mask_at_once(backend):
    """Padding, a bias with a gradient, causal order and a window, with shared key heads."""
    padding = torch.arange(37, device=DEVICE)[None, :] < torch.tensor([[30], [37]], device=DEVICE)
    band = torch.ones(20, 37, dtype=torch.bool, device=DEVICE).tril().triu(-6)
    hidden = torch.where(band & padding[:, None, None, :], 0.0, -math.inf)
    keep = kept((2, 4, 20, 37), 0.2)
    assert_as_accurate_as_eager(
        lambda q, k, v, m: sdpa(
            q, k, v, m, 0.2, True, enable_gqa=True, window=(6, None), key_mask=padding, seed=3
        ),
        lambda q, k, v, m: eager(q, k, v, m + hidden.to(q.dtype), 0.2, keep),
        (*inputs(heads=4, key_heads=2), draw(1, 4, 20, 37, seed=9)),
        draw(2, 4, 20, 16, seed=5),
    )


@pytest.mark.parametrize("lengths", [(20, 37), (37, 20)])
def test_causal_biases_of_torch(backend, lengths):
    query, key, value = inputs(queries=lengths[0], keys=lengths[1])
    for bias in (causal_lower_right(*lengths), causal_upper_left(*lengths)):
        keep = kept((2, 2, *lengths), 0.2)
        diagonal = lengths[1] - lengths[0] if bias.variant.name == "LOWER_RIGHT" else 0
        mask = torch.ones(*lengths, dtype=torch.bool, device=DEVICE).tril(diagonal)
        found = sdpa(query, key, value, bias, 0.2, seed=3)
        expected = eager(query, key, value, mask, 0.2, keep)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "window", "key_mask"])
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_no_nan(backend, kind):
    query, key, value = inputs()
    options = {}
    if kind == "window":
        # the last queries see keys beyond the last
        query = draw(2, 2, 60, 16)
        options["window"], empty = (2, 0), torch.arange(60) > 38
    elif kind == "key_mask":
        options["key_mask"] = torch.tensor([[True] * 37, [False] * 37], device=DEVICE)
        empty = torch.zeros(2, 2, 20, dtype=torch.bool)
        empty[1] = True
    else:
        mask = torch.rand(20, 37, generator=torch.Generator().manual_seed(0)) < 0.5
        mask[::3] = False
        empty = torch.arange(20) % 3 == 0
        options["attn_mask"] = mask.to(DEVICE)
        if kind == "float":
            options["attn_mask"] = torch.where(mask, 0.0, -math.inf).to(DEVICE)
    for p in (0.0, 0.3):

        def call(q, k, v, p=p):
            return sdpa(q, k, v, dropout_p=p, seed=3, **options)

        results = run(call, query, key, value)
        assert not any(torch.isnan(t).any() for t in results)
        rows = empty.expand(results[0].shape[:-1]).to(DEVICE)
        assert (results[0][rows] == 0).all()
        assert (results[1][rows] == 0).all()
        _, lse = sdpa(query, key, value, dropout_p=p, seed=3, return_lse=True, **options)
        assert torch.equal(lse == -math.inf, rows)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_rows_whose_lse_is_minus_infinity_have_no_gradients(backend, mask, p):
    """As they say that no key took part, whatever their scores and the mask are now."""
    query, key, value = (t.detach() for t in inputs())
    seen = torch.ones(20, 37, dtype=torch.bool, device=DEVICE)
    given = {"bool": seen, "float": torch.zeros(20, 37, device=DEVICE)}.get(mask)
    out, lse = sdpa(query, key, value, given, p, seed=3, return_lse=True)
    lse[:, :, ::2] = -math.inf
    grad = torch.ones_like(out)
    found = tridrop.scaled_dot_product_attention_backward(
        grad, out, lse, query, key, value, given, p, seed=3
    )
    assert (found[0][:, :, ::2] == 0).all()
    grad[:, :, ::2] = 0
    expected = tridrop.scaled_dot_product_attention_backward(
        grad, out, lse, query, key, value, given, p, seed=3
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("turned", [0, 1, 2])
def test_gradients_of_transposed_operands(backend, turned):
    """The elements of a row of query, key or value need not be adjacent."""
    given = [t.detach() for t in inputs()]
    given[turned] = given[turned].mT.contiguous().mT
    assert given[turned].stride(-1) > 1
    results = []
    for tensors in (given, [t.contiguous() for t in given]):
        leaves = [t.requires_grad_() for t in tensors]
        out = sdpa(*leaves, dropout_p=0.3, seed=3)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert results[0][1 + turned].stride() == given[turned].stride()


# ------------------------------------------------------------------------------ heads and extras


def test_shared_key_heads_have_the_masks_of_query_heads(backend):
    query, key, value = inputs(heads=6, key_heads=2)
    shared = run(
        lambda q, k, v: sdpa(q, k, v, dropout_p=0.4, enable_gqa=True, seed=3), query, key, value
    )
    repeated = run(
        lambda q, k, v: sdpa(
            q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), dropout_p=0.4, seed=3
        ),
        query, key, value,
    )  # fmt: skip
    for a, b in zip(shared, repeated, strict=True):
        torch.testing.assert_close(a, b)


def test_sinks_softcap_and_lse(backend):
    """Against the sink as one more key, whose value is zero."""
    query, key, value = inputs()
    sinks = draw(2, seed=7)
    keep = kept((2, 2, 20, 37), 0.2)

    def plain(query, key, value, sinks):
        scores = 1.5 * torch.tanh(query @ key.transpose(-1, -2) / 4 / 1.5)
        column = sinks[None, :, None, None].expand(2, 2, 20, 1)
        lse = torch.logsumexp(torch.cat([scores, column], -1), -1, keepdim=True)
        weights = torch.where(keep, (scores - lse).exp() * scale(threshold(0.2)), 0)
        return torch.cat([weights @ value, lse], -1)

    def fused(query, key, value, sinks):
        out, lse = sdpa(
            query, key, value, dropout_p=0.2, sinks=sinks, softcap=1.5, return_lse=True, seed=3
        )
        return torch.cat([out, lse[..., None]], -1)

    tensors = (query, key, value, sinks)
    assert_as_accurate_as_eager(fused, plain, tensors, draw(2, 2, 20, 17, seed=5))


# -------------------------------------------------------------------------------- masks' identity


def zeros_of(p=0.4, tile=None, monkeypatch=None, **options) -> Tensor:
    """Where attention drops: with the identity for values it returns its probabilities."""
    if tile is not None:
        monkeypatch.setattr(attention_launch, "forward_tile", lambda *_: tile)
    query, key, _ = inputs(queries=70, keys=150)
    identity = torch.eye(150, device=DEVICE).expand(2, 2, 150, 150)
    return sdpa(query, key, identity, dropout_p=p, seed=3, **options) != 0


def test_attention_softmax_dropout_and_the_export_draw_one_mask(backend):
    query, key, _ = inputs(queries=70, keys=150)
    keep = kept((2, 2, 70, 150), 0.4)
    assert torch.equal(zeros_of(), keep)
    scores = query @ key.transpose(-1, -2)
    weights = tridrop.softmax_dropout(scores, 0.4, scale=0.25, seed=3)
    assert torch.equal(weights != 0, keep)
    identity = torch.eye(150, device=DEVICE).expand(2, 2, 150, 150)
    found = sdpa(query, key, identity, dropout_p=0.4, seed=3)
    torch.testing.assert_close(found, weights)


def test_padding_changes_no_mask(backend):
    query, key, value = inputs(1)
    there = torch.arange(37, device=DEVICE)[None] < 30
    padded = sdpa(query, key, value, dropout_p=0.3, key_mask=there, seed=3)
    alone = sdpa(query[:, :, :9], key[:, :, :30], value[:, :, :30], dropout_p=0.3, seed=3)
    torch.testing.assert_close(padded[:, :, :9], alone)


TILES = [(16, 32), (64, 64), (32, 128), (128, 32)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("warps", [1, 4])
def test_masks_do_not_depend_on_tiles_or_warps(monkeypatch, tile, warps):
    with tridrop.backend("triton"):
        chosen = attention_launch.Tile(*tile, num_warps=warps, num_stages=1)
        found = zeros_of(tile=chosen, monkeypatch=monkeypatch)
    assert torch.equal(found, kept((2, 2, 70, 150), 0.4))
