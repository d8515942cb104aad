"""NaN and infinities: the loops of a CPU and torch agree, and what takes no part stays 0."""

import math

import pytest
import torch

import tridrop
from tridrop.backends.cpu import serving
from tridrop.spec.elementwise import ACTIVATIONS

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")

ROWS = {
    "inf": [INF, 0, 1, 2],
    "two inf": [INF, INF, 0, 1],
    "all inf": [INF] * 4,
    "-inf": [-INF, 0, 1, 2],
    "all -inf": [-INF] * 4,
    "both": [INF, -INF, 1, 2],
    "nan": [NAN, 0, 1, 2],
    "nan and -inf": [NAN, -INF, -INF, 1],
    "nan and inf": [0, NAN, INF, 1],
    "the other nan": [-NAN, -INF, 0, 1],
}
MASKS = {
    "none": None,
    "bool": torch.tensor([True, True, False, True]),
    "float": torch.tensor([0.0, 1.0, -INF, 0.0]),
}


@pytest.fixture
def both():
    """``both(f)``: f by the loops, compared with f by the reference; returned once."""

    def run(function):
        found = []
        for name in ("cpu", "reference"):
            with tridrop.backend(name):
                found.append(function())
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        return found[0]

    return run


def softmax(scores, p, mask, is_causal, incoming):
    s = torch.tensor(scores).requires_grad_()
    out, probabilities = tridrop.softmax_dropout(
        s, p, mask=mask, is_causal=is_causal, scale=2.0, return_softmax=True, seed=3
    )
    grads = torch.autograd.grad([out, probabilities], [s], [incoming, incoming])
    return out.detach(), probabilities.detach(), *grads


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_a_key_that_takes_no_part_has_probability_and_gradient_0(both, row, is_causal, masked, p):
    scores = [[0.0, 1.0, 2.0, 3.0], ROWS[row], ROWS[row], ROWS[row]]
    incoming = torch.arange(16.0).view(4, 4)
    mask = MASKS[masked]
    out, probabilities, grad = both(lambda: softmax(scores, p, mask, is_causal, incoming))
    none = torch.tensor(scores) == -INF
    if is_causal:
        none |= torch.ones(4, 4, dtype=torch.bool).triu(1)
    if mask is not None:  # one that is added makes NaN of an infinite score
        none[:, 2] |= torch.tensor(scores).isfinite()[:, 2] | (mask.dtype == torch.bool)
    for t in (out, probabilities, grad):
        assert not t[none].any()  # NaN is not False either
    dropped = ~tridrop.attention_keep_mask(3, (1, 1, 4, 4), p)[0, 0]
    assert not out[dropped].any()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("is_causal", [False, True])
def test_incoming_gradients_that_are_not_finite(both, is_causal, value, p):
    scores = [[0.0, 1.0, 2.0, 3.0]] * 3 + [[0.0, -INF, 1.0, 2.0]]
    for place in ((1, 0), (1, 3), (2, slice(None)), (slice(None), slice(None))):
        incoming = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        incoming[place] = value
        *_, grad = both(lambda i=incoming: softmax(scores, p, None, is_causal, i))
        assert grad[3, 1] == 0
        if is_causal:
            assert not grad.triu(1).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad", "mask", "sinks"])
def test_attention(both, which, value):
    """Of 4 queries and keys; a key after a query stays without a part in it."""
    g = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(1, 2, 4, 8, generator=g) for n in ("query", "key", "value", "grad")}
    drawn["mask"], drawn["sinks"] = torch.randn(4, 4, generator=g), torch.randn(2, generator=g)
    drawn[which].view(-1)[1] = value

    def call(is_causal, p, has_sinks):
        names = ("query", "key", "value", "mask", *(("sinks",) if has_sinks else ()))
        t = {n: drawn[n].clone().requires_grad_() for n in names}
        out, lse = tridrop.scaled_dot_product_attention(
            t["query"], t["key"], t["value"], t["mask"], p, is_causal, sinks=t.get("sinks"),
            return_lse=True, seed=1,
        )  # fmt: skip
        incoming = [drawn["grad"], torch.ones_like(lse)]
        return out.detach(), lse.detach(), *torch.autograd.grad([out, lse], t.values(), incoming)

    for is_causal in (False, True):
        for p in (0.0, 0.5):
            for has_sinks in (False, True):
                results = both(lambda c=is_causal, p=p, s=has_sinks: call(c, p, s))
                if is_causal:
                    assert not results[5].triu(1).any()  # the mask's gradient is the scores'


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_activations(both, p, dtype, name):
    for value in (NAN, INF, -INF):
        for biased in (False, True):
            x = torch.full((3, 40), value, dtype=dtype)
            x[1] = 1
            bias = torch.ones(40, dtype=dtype) if biased else None

            def call(x=x, bias=bias):
                leaf = x.clone().requires_grad_()
                out = tridrop.activation_dropout(leaf, p, activation=name, bias=bias, seed=1)
                return out.detach(), *torch.autograd.grad(out.sum(), leaf)

            out, _ = both(call)
            kept = tridrop.keep_mask(1, tuple(out.shape), p)
            assert not out[~kept].any()
            if p and name == "gelu" and value == INF:
                assert out[0][kept[0]].isinf().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["x", "residual", "bias", "layer_scale", "weight", "norm_bias"])
def test_norms(both, which, value):
    g = torch.Generator().manual_seed(0)
    drawn = {"x": torch.randn(3, 16, generator=g), "residual": torch.randn(3, 16, generator=g)}
    for n in ("weight", "norm_bias", "bias", "layer_scale"):
        drawn[n] = torch.randn(16, generator=g)
    drawn[which].view(-1)[5] = value

    def call(function):
        t = {n: v.clone().requires_grad_() for n, v in drawn.items()}
        bias, scale = t.pop("bias"), t.pop("layer_scale")
        out = function(*t.values(), 0.5, bias=bias, layer_scale=scale, seed=1)
        leaves = [*t.values(), bias, scale]
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    both(lambda: call(tridrop.dropout_add_layer_norm))
    both(lambda: call(tridrop.dropout_add_rms_norm))


@pytest.mark.parametrize("where", ["grad", "value", "key"])
@pytest.mark.parametrize("band", ["key_mask", "causal", "attn_mask"])
def test_gradients_of_attention_without_dropout(both, where, band):
    """By torch's fused kernel and by the composition: a key that is left out has one of 0."""
    torch.manual_seed(0)
    tensors = {n: torch.randn(1, 2, 5, 8) for n in ("query", "key", "value", "grad")}
    tensors[where][0, 1, 2] = INF
    there = torch.tensor([True, True, True, True, False])
    options = {
        "key_mask": {"key_mask": there[None]},
        "causal": {"is_causal": True},
        "attn_mask": {"attn_mask": there.expand(5, 5)},
    }[band]

    def call():
        given = [tensors[n].clone().requires_grad_() for n in ("query", "key", "value")]
        out = tridrop.scaled_dot_product_attention(*given, **options)
        return torch.autograd.grad(out, given, tensors["grad"])

    _, dkey, _ = both(call)  # that of the values is a product, and 0 * inf is NaN in it
    if band != "causal":
        assert not dkey[:, :, 4].any()
