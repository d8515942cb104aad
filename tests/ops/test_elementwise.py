"""The elementwise family: layouts, ends of the range of p, NaN, errors, modules."""

import math

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import Tensor, nn

import tridrop


@pytest.fixture(params=[PLAIN, "reference", "triton"])
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """torch.empty yields NaN, so that an element that a kernel leaves out is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice of a wider one": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "every second column": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(backend, layout):
    relaid = LAYOUTS[layout]
    x, residual, bias, grad = draw(4, 6, 10), draw(4, 6, 10) + 1, draw(10), draw(4, 6, 10) - 1

    def call(x, residual, grad):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        b = bias.clone().requires_grad_()
        out = tridrop.dropout_add(x, residual, 0.4, activation="silu", bias=b, seed=3)
        return out.detach(), *torch.autograd.grad(out, (x, residual, b), grad)

    assert not relaid(x).is_contiguous()
    torch.testing.assert_close(relaid(x), x)
    expected = call(x, residual, grad)
    found = call(relaid(x), relaid(residual), relaid(grad))
    assert found[0].stride() == (relaid(residual) + relaid(x)).stride()
    for a, b in zip(found, expected, strict=True):  # torch's own loops round by stride, too
        torch.testing.assert_close(a, b)


def test_expanded_inputs_and_gradients(backend):
    row = draw(1, 1, 12)
    x = row.expand(3, 5, 12).requires_grad_()
    out = tridrop.dropout(x, 0.5, seed=1)
    assert torch.equal(out, tridrop.dropout(x.contiguous(), 0.5, seed=1))
    (grad,) = torch.autograd.grad(out.sum(), x)  # the gradient of a sum has stride 0
    keep = tridrop.keep_mask(1, (3, 5, 12), 0.5, device=DEVICE)
    assert torch.equal(grad, keep * 2.0)


SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 4), (5, 1), (1, 9), (2, 3, 5, 7), (33, 257), (2, 5000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(backend, shape):
    x, residual = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
    out = tridrop.dropout_add(x, residual, 0.5, seed=2)
    dx, dresidual = torch.autograd.grad(out, (x, residual), torch.ones_like(out))
    keep = tridrop.keep_mask(2, shape, 0.5, device=DEVICE)
    assert out.shape == x.shape
    torch.testing.assert_close(out, residual + torch.where(keep, x * 2, 0))
    assert torch.equal(dx, keep * 2.0)
    assert torch.equal(dresidual, torch.ones_like(out))


def test_sums_over_no_rows_are_zero(backend):
    bias = draw(8).requires_grad_()
    gain = draw(8).requires_grad_()
    x = draw(0, 8)
    out = tridrop.dropout_add(x, x, 0.5, bias=bias, layer_scale=gain, seed=1)
    grads = torch.autograd.grad(out.sum(), (bias, gain))
    assert all(torch.equal(g, torch.zeros(8, device=DEVICE)) for g in grads)


def test_sums_over_many_rows_are_right_and_deterministic(backend):
    rows = 70_000 if DEVICE == "cuda" or backend != "triton" else 9_000
    x, bias, gain = draw(rows, 6), draw(6).requires_grad_(), draw(6).requires_grad_()
    keep = tridrop.keep_mask(5, x.shape, 0.3, device=DEVICE)

    def sums():
        out = tridrop.dropout_add(x, x, 0.3, bias=bias, layer_scale=gain, seed=5)
        return torch.autograd.grad(out.sum(), (bias, gain))

    found = sums()
    kept = keep.double() / (1 - 0.3)
    expected = kept.sum(0) * gain.double(), (kept * (x + bias).double()).sum(0)
    for a, b in zip(found, expected, strict=True):
        # fp32 sums of a strip's rows, whose roundings may all fall the same way
        torch.testing.assert_close(a, b.float(), rtol=rows * torch.finfo(a.dtype).eps / 50, atol=0)
    for again in (sums() for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


# -------------------------------------------------------------------------------- ends of p


def test_dropout_without_dropping_returns_its_input(backend):
    x = draw(5, 8)
    state = torch.get_rng_state()
    assert tridrop.dropout(x, 0.0) is x
    assert tridrop.dropout(x, 0.5, training=False) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_and_p_0_draw_nothing_and_are_bitwise_equal(backend):
    x, residual, bias = draw(5, 8), draw(5, 8), draw(8)
    state = torch.get_rng_state()
    options = {"bias": bias, "activation": "gelu"}
    evaluated = tridrop.dropout_add(x, residual, 0.5, False, drop_path=0.5, **options)
    zero = tridrop.dropout_add(x, residual, 0.0, True, **options)
    schedule = tridrop.dropout_add(x, residual, torch.tensor(0.0), True, seed=1, **options)
    assert torch.equal(evaluated, zero)
    assert torch.equal(schedule, zero)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_p_1_gives_exact_zeros_and_zero_gradients(backend, rate):
    x = draw(5, 8)
    x[0, 0], x[1, 1] = math.nan, math.inf
    x.requires_grad_()
    bias = draw(8).requires_grad_()
    out = tridrop.activation_dropout(x, rate, activation="gelu", bias=bias)
    assert torch.equal(out, torch.zeros_like(out))
    grads = torch.autograd.grad(out, (x, bias), torch.full_like(out, math.inf))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("activation", [*tridrop.spec.elementwise.ACTIVATIONS])
def test_a_dropped_nan_is_zero_and_a_kept_one_is_nan(backend, activation):
    cols = 8 * (2 if tridrop.spec.elementwise.ACTIVATIONS[activation][1] else 1)
    for bad in (math.nan, math.inf):
        x = torch.full((6, cols), bad, device=DEVICE, requires_grad=True)
        residual = torch.ones(6, 8, device=DEVICE)
        out = tridrop.dropout_add(x, residual, 0.5, activation=activation, drop_path=0.3, seed=4)
        keep = tridrop.keep_mask(4, (6, 8), 0.5, device=DEVICE)
        keep &= tridrop.keep_mask(4, (6, 8), 0.3, domain="drop_path", device=DEVICE)
        assert torch.equal(out == 1, ~keep)
        assert not torch.isfinite(out[keep]).any()
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        for half in grad.split(8, -1):
            assert torch.equal(half[~keep], torch.zeros_like(half[~keep]))


def test_p_as_a_tensor_equals_the_float(backend):
    x = draw(40, 24)
    for p in (0.0, 0.1, 0.5, 1.0):
        expected = tridrop.dropout(x, p, seed=9)
        rate = torch.tensor(p, dtype=torch.float64)
        assert torch.equal(tridrop.dropout(x, rate, seed=9), expected)


# ----------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("stream", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branch", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_result_has_the_dtype_of_the_residual(backend, branch, stream):
    x = draw(6, 16, dtype=branch).requires_grad_()
    residual = draw(6, 16, dtype=stream).requires_grad_()
    bias = draw(16).requires_grad_()
    out = tridrop.dropout_add(x, residual, 0.5, bias=bias, seed=1)
    assert out.dtype == stream
    grads = torch.autograd.grad(out.float().sum(), (x, residual, bias))
    assert [g.dtype for g in grads] == [branch, stream, torch.float32]
    hidden = tridrop.activation_dropout(x, 0.5, activation="relu", bias=bias, seed=1)
    assert hidden.dtype == branch


def test_fp64_stays_fp64_on_the_reference_backend():
    x = draw(6, 16).double()
    with tridrop.backend("reference"):
        out = tridrop.dropout(x, 0.3, seed=1)
    keep = tridrop.keep_mask(1, x.shape, 0.3, device=DEVICE)
    exact = 2**32 / (2**32 - round(0.3 * 2**32))
    assert torch.equal(out, torch.where(keep, x * exact, 0))
    with tridrop.backend("triton"), pytest.raises(RuntimeError, match="reference"):
        tridrop.dropout(x, 0.3, seed=1)


# ----------------------------------------------------------------------------------- errors

X = torch.ones(4, 6)
ERRORS = [
    (lambda: tridrop.dropout([1.0]), TypeError, "torch.Tensor"),
    (lambda: tridrop.dropout(torch.ones(3, dtype=torch.int64)), TypeError, "float()"),
    (lambda: tridrop.dropout(torch.ones(3, dtype=torch.complex64)), TypeError, "complex64"),
    (lambda: tridrop.dropout(X, 1.5), ValueError, r"p = 1.5"),
    (lambda: tridrop.dropout(X, -0.1, training=False), ValueError, r"\[0, 1\]|must lie in"),
    (lambda: tridrop.dropout(X, math.nan), ValueError, "nan"),
    (lambda: tridrop.dropout(X, True), TypeError, "number"),
    (lambda: tridrop.dropout(X, "0.5"), TypeError, "number"),
    (lambda: tridrop.dropout(X, torch.tensor(1.5)), ValueError, "p = 1.5"),
    (lambda: tridrop.dropout(X, torch.tensor([0.5])), TypeError, "0-d"),
    (lambda: tridrop.dropout(X, torch.tensor(1)), TypeError, "floating-point"),
    (
        lambda: tridrop.dropout(X, torch.tensor(0.5, requires_grad=True)),
        ValueError,
        "detach",
    ),
    (lambda: tridrop.dropout(X, noise_shape=(4,)), ValueError, "1 entries"),
    (lambda: tridrop.dropout(X, noise_shape=(4, 3)), ValueError, r"noise_shape\[1\] = 3"),
    (lambda: tridrop.dropout(X, noise_shape="ab"), TypeError, "tuple"),
    (lambda: tridrop.dropout(X, seed=0.5), TypeError, "seed"),
    (lambda: tridrop.dropout(X, seed=torch.zeros(2)), TypeError, "int64"),
    (lambda: tridrop.dropout(X, seed=torch.zeros(3, dtype=torch.int64)), ValueError, r"\[2\]"),
    (lambda: tridrop.dropout(X, shard=((4, 6), (1, 0))), ValueError, "does not fit"),
    (lambda: tridrop.dropout(X, shard=5), TypeError, "Shard"),
    (lambda: tridrop.activation_dropout(X, activation="tanh"), ValueError, "known: None, none"),
    (
        lambda: tridrop.activation_dropout(torch.ones(2, 5), activation="swiglu"),
        ValueError,
        "halves",
    ),
    (
        lambda: tridrop.activation_dropout(X, activation=None, bias=torch.ones(5)),
        ValueError,
        r"must be \(6,\)",
    ),
    (lambda: tridrop.dropout_add(X, torch.ones(6)), ValueError, "expand it first"),
    (lambda: tridrop.dropout_add(X, X, layer_scale=torch.ones(4)), ValueError, "layer_scale"),
    (lambda: tridrop.dropout_add(X, X, drop_path=2.0), ValueError, "drop_path = 2.0"),
    (lambda: tridrop.dropout_add(X[0], X[0], drop_path=0.5), ValueError, "two dimensions"),
    (lambda: tridrop.dropout_add(X, X, drop_path=torch.tensor(0.5)), TypeError, "number"),
    (lambda: tridrop.dropout_add(X, X.int()), TypeError, "residual"),
    (lambda: tridrop.keep_mask(1, (4,), 0.5, domain="rows"), ValueError, "domain"),
    (lambda: tridrop.keep_mask(1, (-4,), 0.5), ValueError, "non-negative"),
    (lambda: tridrop.nn.Dropout(2.0), ValueError, "p = 2.0"),
    (lambda: tridrop.nn.ActivationDropout("nope"), ValueError, "known"),
    (lambda: tridrop.nn.DropPath(0.5)(torch.tensor(1.0)), ValueError, "first dimension"),
    (lambda: tridrop.nn.TransformerBlock(10, 3), ValueError, "divide"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_bad_input_raises_and_says_what_to_do(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ----------------------------------------------------------------------------------- modules


def test_modules_follow_train_and_eval():
    x = torch.ones(64, 8, device=DEVICE)
    for module in (
        tridrop.nn.Dropout(0.5),
        tridrop.nn.DropPath(0.5),
        tridrop.nn.ActivationDropout(None, 0.5),
    ):
        assert not torch.equal(module(x), x)
        assert torch.equal(module.eval()(x), x)


def test_dropout_in_place_writes_into_its_input():
    x = torch.ones(64, device=DEVICE)
    out = tridrop.nn.Dropout(0.5, inplace=True)(x)
    assert out is x
    assert set(out.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_drops_whole_samples(scale_by_keep):
    out = tridrop.nn.DropPath(0.25, scale_by_keep)(torch.ones(64, 3, 5, device=DEVICE))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    kept = 4 / 3 if scale_by_keep else 1.0
    values = out[:, 0, 0]
    torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], kept))
    assert 0 < int((values == 0).sum()) < 64


class EagerBlock(nn.Module):
    """What TransformerBlock computes without dropout, in plain torch."""

    def __init__(self, block: tridrop.nn.TransformerBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        batch, tokens, dim = x.shape
        first = norm(b.norm1, x) if b.norm_first else x
        q, k, v = b.qkv(first).view(batch, tokens, 3, b.num_heads, -1).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + b.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
        if not b.norm_first:
            x = norm(b.norm1, x)
        x = x + b.fc2(nn.functional.gelu(b.fc1(norm(b.norm2, x) if b.norm_first else x)))
        return x if b.norm_first else norm(b.norm2, x)


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_block_equals_plain_torch_without_dropout(backend, norm_first):
    block = tridrop.nn.TransformerBlock(
        32, 4, p=0.3, drop_path=0.2, activation_p=0.1, norm_first=norm_first
    ).to(DEVICE)
    x = draw(2, 7, 32)
    torch.testing.assert_close(block.eval()(x), EagerBlock(block)(x))
    gated = tridrop.nn.TransformerBlock(32, 4, activation="swiglu").to(DEVICE)
    assert gated(x).shape == x.shape


def test_transformer_block_is_causal():
    block = tridrop.nn.TransformerBlock(16, 2, p=0.0).to(DEVICE)
    x = draw(1, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(block(x)[:, :4], block(changed)[:, :4])
