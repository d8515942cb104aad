"""The functions of other libraries: their results, in every combination, against plain torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor

import tridrop
from tridrop import shims
from tridrop.commands.check.measure import error, tolerance

P = 0.4
SCALE = tridrop.contract.mask.scale(tridrop.contract.mask.threshold(P))


@pytest.fixture(params=[PLAIN, "triton"])
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def dropped(x: Tensor, seed: int | Tensor, p: float = P) -> Tensor:
    if p == 0:
        return x
    keep = tridrop.keep_mask(seed, x.shape, p, device=DEVICE)
    return torch.where(keep, x * SCALE, torch.zeros_like(x))


def outcome(function, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The results that are no masks, and the gradients of a weighted sum of them."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    values = [r for r in results if r is not None and r.is_floating_point()]
    grads = [draw(*v.shape, seed=50 + i, dtype=v.dtype) for i, v in enumerate(values)]
    found = torch.autograd.grad(values, list(leaves.values()), grads)
    assert [g.dtype for g in found] == [t.dtype for t in tensors.values()]
    return [*(v.detach() for v in values), *found]


def assert_as_accurate_as_eager(fused, eager, tensors: dict[str, Tensor]) -> None:
    found, plain = outcome(fused, tensors), outcome(eager, tensors)
    exact = outcome(eager, {name: t.double() for name, t in tensors.items()})
    for f, e, t in zip(found, plain, exact, strict=True):
        assert error(f, t) <= tolerance(e, t)


# ---------------------------------------------------------------- Megatron-LM


def bias_of(kind: str) -> dict[str, Tensor]:
    shape = {"none": None, "vector": (24,), "expanded": (24,), "[1, 1, H]": (1, 1, 24)}
    size = shape.get(kind, (5, 3, 24))
    return {} if size is None else {"bias": draw(*size, seed=2)}


@pytest.mark.parametrize("kind", ["none", "vector", "expanded", "[1, 1, H]", "x's shape"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_bias_dropout_add(backend, training, is_fused, kind):
    tensors = {"x": draw(5, 3, 24), "residual": draw(5, 3, 24, seed=1), **bias_of(kind)}
    function = shims.get_bias_dropout_add(training, is_fused)

    def fused(x, residual, bias=None):
        given = bias.expand_as(residual) if kind == "expanded" else bias
        return function((x, given), residual, P, seed=3)

    def eager(x, residual, bias=None):
        value = x if bias is None else x + bias
        return residual + (dropped(value, 3) if training else value)

    assert_as_accurate_as_eager(fused, eager, tensors)


@pytest.mark.parametrize("branch", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["vector", "x's shape"])
def test_bias_dropout_add_has_the_dtype_of_the_residual(backend, branch, stream, kind):
    x = draw(5, 3, 24, dtype=branch).requires_grad_()
    residual = draw(5, 3, 24, seed=1, dtype=stream).requires_grad_()
    bias = bias_of(kind)["bias"].to(branch).requires_grad_()
    out = shims.bias_dropout_add_fused_train((x, bias), residual, P, seed=3)
    assert out.dtype == stream
    expected = residual.float() + dropped(x.float() + bias.float(), 3)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    grads = torch.autograd.grad(out.sum(), (x, bias, residual))
    assert [g.dtype for g in grads] == [branch, branch, stream]


def test_bias_dropout_add_evaluates_without_a_seed_and_out_of_place():
    x, residual = draw(3, 8), draw(3, 8, seed=1)
    before, state = x.clone(), torch.get_rng_state()
    out = shims.bias_dropout_add_fused_inference((x, draw(8)), residual, P)
    assert torch.equal(out, residual + (x + draw(8)))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_come_from_the_generator_or_the_active_rng():
    x = torch.ones(4, 64, device=DEVICE)
    for function in (
        lambda: shims.bias_dropout_add_fused_train((x, None), torch.zeros_like(x), 0.5),
        lambda: shims.rms_norm_fn(x, None, None, x1=x, dropout_p=0.5, prenorm=True)[1],
    ):
        torch.manual_seed(5)
        first, other = function(), function()
        torch.manual_seed(5)
        assert torch.equal(function(), first)
        assert not torch.equal(other, first)
        with tridrop.rng(9):
            first = function()
        with tridrop.rng(9):
            assert torch.equal(function(), first)


# ---------------------------------------------------------------- flash-attention

FLAGS = list(itertools.product([False, True], repeat=5))
VECTORS = ("weight", "bias", "weight1", "bias1")


def named(flags: tuple[bool, ...]) -> str:
    names = ("residual", "x1", "weight1", "prenorm", "mask")
    return "+".join(n for n, f in zip(names, flags, strict=True) if f) or "plain"


def operands(residual: bool, x1: bool, weight1: bool, dtype=torch.float32) -> dict[str, Tensor]:
    names = ["x", "weight", "bias"]
    names += ["residual"] * residual + ["x1"] * x1 + ["weight1", "bias1"] * weight1
    return {
        name: draw(*((24,) if name in VECTORS else (5, 3, 24)), seed=i, dtype=dtype)
        for i, name in enumerate(names)
    }


def eager_norm_fn(norm, p, prenorm, zero_centered=False):
    """The formulas of ``layer_norm_fn`` in torch, under the seed 3."""

    def affine(stream, weight, bias):
        weight = weight + 1 if zero_centered else weight
        if norm == "layer_norm":
            return F.layer_norm(stream, stream.shape[-1:], weight, bias, 1e-6)
        return F.rms_norm(stream, stream.shape[-1:], weight, 1e-6) + bias

    def eager(x, weight, bias, residual=0.0, x1=None, weight1=None, bias1=None, rowscale=None):
        x = x if rowscale is None else x * rowscale[..., None]
        branch = 0.0 if x1 is None else dropped(x1, tridrop.fold_in(3, 1).to(DEVICE), p)
        stream = residual + branch + dropped(x, 3, p)
        results = [affine(stream, weight, bias)]
        results += [] if weight1 is None else [affine(stream, weight1, bias1)]
        return (*results, stream) if prenorm else tuple(results)

    return eager


NORM_FNS = {"layer_norm": shims.layer_norm_fn, "rms_norm": shims.rms_norm_fn}


@pytest.mark.parametrize("flags", FLAGS, ids=named)
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("norm", NORM_FNS)
def test_norm_fn_in_every_combination(norm, p, flags):
    residual, x1, weight1, prenorm, mask = flags
    tensors = operands(residual, x1, weight1)
    count = 1 + weight1 + prenorm + 2 * mask

    def fused(**given):
        results = NORM_FNS[norm](
            **given, dropout_p=p, prenorm=prenorm, return_dropout_mask=mask, seed=3
        )
        if count == 1:
            assert isinstance(results, Tensor)
            return results
        assert isinstance(results, tuple)
        assert len(results) == count
        if mask:
            seeds = (3, tridrop.fold_in(3, 1).to(DEVICE) if x1 else None)
            for found, seed in zip(results[-2:], seeds, strict=True):
                if p == 0 or seed is None:
                    assert found is None
                else:
                    assert torch.equal(found, tridrop.keep_mask(seed, (5, 3, 24), P, device=DEVICE))
        return results

    assert_as_accurate_as_eager(fused, eager_norm_fn(norm, p, prenorm), tensors)


@pytest.mark.parametrize("norm", NORM_FNS)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_fn_on_both_backends(backend, norm, zero_centered):
    options = {"dropout_p": P, "prenorm": True, "zero_centered_weight": zero_centered, "seed": 3}
    eager = eager_norm_fn(norm, P, True, zero_centered)
    tensors = operands(True, True, True)
    assert_as_accurate_as_eager(lambda **t: NORM_FNS[norm](**t, **options), eager, tensors)
    del tensors["x1"]
    tensors["rowscale"] = draw(5, 3, seed=20)
    assert_as_accurate_as_eager(lambda **t: NORM_FNS[norm](**t, **options), eager, tensors)


def test_layer_norm_fn_takes_its_arguments_in_order():
    t = operands(True, True, True)
    given = (t["x"], t["weight"], t["bias"], t["residual"], t["x1"], t["weight1"], t["bias1"])
    # eps, dropout_p, rowscale, prenorm, residual_in_fp32, zero_centered_weight
    options = (1e-6, P, None, True, False, True)
    # is_rms_norm for the first alone, then return_dropout_mask, out_dtype, out, residual_out
    found = shims.layer_norm_fn(*given, *options, True, True, torch.float16, None, None, seed=3)
    same = shims.rms_norm_fn(*given, *options, True, torch.float16, None, None, seed=3)
    expected = eager_norm_fn("rms_norm", P, True, True)(**t)
    assert [r.dtype for r in found] == [torch.float16] * 2 + [torch.float32] + [torch.bool] * 2
    for f, s, e in zip(found, same, [*expected, None, None], strict=True):
        assert torch.equal(f, s)
        if e is not None:
            torch.testing.assert_close(f.float(), e, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("with_x1", [False, True])
@pytest.mark.parametrize("stream", [torch.float32, torch.float16, None], ids=str)
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_norm_fn_dtypes(backend, with_x1, stream, in_fp32, out_dtype):
    """The stream has the residual's dtype; residual_in_fp32 counts where there is none."""
    t = operands(stream is not None, with_x1, True, torch.float16)
    if stream is not None:
        t["residual"] = t["residual"].to(stream)
    for leaf in t.values():
        leaf.requires_grad_()
    results = shims.layer_norm_fn(
        **t, dropout_p=P, prenorm=True, residual_in_fp32=in_fp32, out_dtype=out_dtype, seed=3
    )
    wide = torch.float32 if in_fp32 else torch.float16
    out = out_dtype or torch.float16
    assert [r.dtype for r in results] == [out, out, stream or wide]
    exact = eager_norm_fn("layer_norm", P, True)(**{name: v.double() for name, v in t.items()})
    for found, expected in zip(results, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=8e-3)
    grads = torch.autograd.grad(sum(r.float().sum() for r in results), list(t.values()))
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in t.values()]


def test_a_rowscale_of_zeros_and_scales_is_stochastic_depth():
    x, residual, weight = draw(6, 4, 24), draw(6, 4, 24, seed=1), draw(24)
    keep = tridrop.keep_mask(3, x.shape, 0.25, domain="drop_path", device=DEVICE)[..., 0]
    found = shims.rms_norm_fn(x, weight, None, residual, rowscale=keep / 0.75)
    expected = tridrop.dropout_add_rms_norm(
        x, residual, weight, None, 0.0, drop_path=0.25, eps=1e-6, seed=3
    )
    torch.testing.assert_close(found, expected)


def test_given_tensors_are_written_and_returned():
    t = operands(True, False, True)
    options = {"dropout_p": P, "prenorm": True, "seed": 3}
    expected = outcome(lambda **t: shims.layer_norm_fn(**t, **options), t)

    def written(**t):
        out, stream = torch.empty(5, 3, 24, device=DEVICE), torch.empty(5, 3, 24, device=DEVICE)
        results = shims.layer_norm_fn(**t, **options, out=out, residual_out=stream)
        assert results[0] is out
        assert results[2] is stream
        return results

    for f, e in zip(outcome(written, t), expected, strict=True):
        assert torch.equal(f, e)

    # As in evaluation: the stream into the residual, the result, in its own dtype, into another.
    out = torch.empty(5, 3, 24, device=DEVICE, dtype=torch.float16)
    exact = shims.layer_norm_fn(t["x"], None, None, t["residual"], prenorm=True)
    found = shims.layer_norm_fn(
        t["x"], None, None, t["residual"], out=out, residual_out=t["residual"]
    )
    assert found is out
    torch.testing.assert_close(out.float(), exact[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(t["residual"], exact[1])


def test_compiled_shims_equal_eager():
    t, seed = operands(True, True, True), tridrop.new_seed(DEVICE)

    def block(x, residual, bias, **rest):
        stream = shims.get_bias_dropout_add(True, True)((x, bias), residual, P, seed=seed)
        return shims.layer_norm_fn(
            x, residual=stream, bias=bias, **rest, dropout_p=P, prenorm=True, seed=seed
        )

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for f, e in zip(outcome(compiled, t), outcome(block, t), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()))


X, V = torch.ones(4, 6), torch.ones(6)
ERRORS = [
    (lambda f: f(X, V, None, bias1=V), ValueError, "weight1"),
    (lambda f: f(X, V, None, x1=X, rowscale=X[:, 0]), ValueError, "multiply x and x1"),
    (lambda f: f(X, V, None, rowscale=V), ValueError, r"rowscale .* must be \(4,\)"),
    (lambda f: f(X, V, None, x1=X[:2]), ValueError, r"x1 has shape \(2, 6\)"),
    (lambda f: f(X, V, None, X[:2]), ValueError, "residual has shape"),
    (lambda f: f(X, V, None, out=X[:2].clone()), ValueError, "out has shape"),
    (lambda f: f(X, V, None, residual_out=X[:2].clone()), ValueError, "residual_out has shape"),
    (lambda f: f(X, V, None, dropout_p=1.5), ValueError, "dropout_p = 1.5"),
    (lambda f: f(X.int(), V, None), TypeError, "x has dtype"),
    (lambda f: f(X, V, None, out_dtype=torch.int8), ValueError, "out_dtype"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
@pytest.mark.parametrize("norm", NORM_FNS)
def test_norm_fn_raises(norm, call, kind, message):
    with pytest.raises(kind, match=message):
        call(NORM_FNS[norm])


def test_bias_dropout_add_raises():
    f = shims.bias_dropout_add_fused_train
    with pytest.raises(ValueError, match=r"prob = 1.5"):
        f((X, None), X, 1.5)
    with pytest.raises(ValueError, match="residual has shape"):
        f((X, None), X[:2], 0.5)
    with pytest.raises(ValueError, match="bias has shape"):
        f((X, V[:4]), X, 0.5)
