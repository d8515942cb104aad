"""Dropout, add and norm: sizes, accuracy, dtypes, torch's habits; the cases: test_check.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.backends.triton import launch
from tridrop.commands.check.measure import error, tolerance

BACKENDS = [PLAIN, "reference", "triton"]
NORMS = {
    "layer_norm": (tridrop.dropout_add_layer_norm, tridrop.layer_norm_dropout),
    "rms_norm": (tridrop.dropout_add_rms_norm, tridrop.rms_norm_dropout),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(params=NORMS)
def norm(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def eager_norm(norm: str, stream: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm == "layer_norm":
        return F.layer_norm(stream, stream.shape[-1:], weight, bias, 1e-5)
    out = F.rms_norm(stream, stream.shape[-1:], weight, 1e-5)
    return out if bias is None else out + bias


def run(function, *tensors: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every tensor."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    given = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))]


def assert_as_accurate_as_eager(norm, x, residual, weight, bias, grad, p=0.4, seed=3):
    """Every result within twice eager's own error against fp64."""
    keep = tridrop.keep_mask(seed, x.shape, p, device=DEVICE)
    scale = tridrop.contract.mask.scale(tridrop.contract.mask.threshold(p))

    def eager(x, residual, weight, bias):
        stream = residual + torch.where(keep, x * scale, 0)
        return eager_norm(norm, stream, weight, bias)

    def fused(x, residual, weight, bias):
        return NORMS[norm][0](x, residual, weight, bias, p, eps=1e-5, seed=seed)

    tensors = (x, residual, weight, bias)
    exact = run(eager, *(t.double() for t in tensors), grad=grad.double())
    plain = run(eager, *tensors, grad=grad)
    found = run(fused, *tensors, grad=grad)
    for f, e, t in zip(found, plain, exact, strict=True):
        assert error(f, t) <= tolerance(e, t)


SIZES = [1, 2, 7, 8, 33, 255, 768, 1000, 4096, 4097, 8192]


@pytest.mark.parametrize("size", SIZES)
def test_hidden_sizes(backend, norm, size):
    rows = 5 if size > 1000 else 19
    x, residual, grad = (draw(rows, size, seed=i) for i in range(3))
    assert_as_accurate_as_eager(norm, x, residual, draw(size), draw(size, seed=9), grad)


@pytest.mark.parametrize("size", [16385, 65536])
def test_rows_too_wide_for_one_pass(backend, norm, size):
    x, residual, grad = (draw(3, size, seed=i) for i in range(3))
    assert_as_accurate_as_eager(norm, x, residual, draw(size), draw(size, seed=9), grad)


@pytest.mark.parametrize("widths", [(64, 64), (256, 64), (64, 1024)])
def test_results_do_not_depend_on_chunks(monkeypatch, norm, widths):
    x, residual, grad = (draw(11, 700, seed=i) for i in range(3))
    weight, bias = draw(700), draw(700, seed=9)

    def fused(*tensors):
        return NORMS[norm][0](*tensors, 0.4, eps=1e-5, seed=3)

    with tridrop.backend("triton"):
        expected = run(fused, x, residual, weight, bias, grad=grad)
        tile = launch.Tile
        monkeypatch.setattr(launch, "norm_forward_tile", lambda r, c: tile(2, widths[0], 4))
        monkeypatch.setattr(launch, "norm_backward_tile", lambda r, c: tile(4, widths[1], 4))
        found = run(fused, x, residual, weight, bias, grad=grad)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_many_rows(backend, norm):
    rows = 30_000 if backend == "triton" and DEVICE == "cpu" else 1_000_001
    x, weight = draw(rows, 3), draw(3).requires_grad_()
    out, stream = NORMS[norm][0](x, None, weight, None, 0.5, eps=1e-5, prenorm=True, seed=1)
    tail = slice(rows - 50, rows)
    shard = tridrop.Shard((rows, 3), (rows - 50, 0))
    keep = tridrop.keep_mask(1, (50, 3), 0.5, shard=shard, device=DEVICE)
    assert torch.equal(stream[tail], torch.where(keep, x[tail] * 2, 0))
    torch.testing.assert_close(out[tail], eager_norm(norm, stream[tail], weight, None))
    (found,) = torch.autograd.grad(out.sum(), weight)
    expected = eager_norm(norm, stream.double(), None, None).sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3 * rows**0.5)


ROWS = {
    "zeros": lambda t: torch.zeros_like(t),
    "constant": lambda t: torch.full_like(t, 3.0),
    "constant, far from zero": lambda t: torch.full_like(t, 1e4) + 1e-2 * t,
    "huge": lambda t: t * 1e15,
    "tiny": lambda t: t * 1e-15,
    "one outlier": lambda t: torch.where(torch.arange(t.shape[-1], device=t.device) == 3, 1e4, t),
}


@pytest.mark.parametrize("rows", ROWS)
def test_unusual_rows_are_as_accurate_as_eager(backend, norm, rows):
    residual = ROWS[rows](draw(6, 200))
    x = 0 * draw(6, 200) if rows != "huge" else draw(6, 200)
    weight, bias, grad = draw(200), draw(200, seed=9), draw(6, 200, seed=2)
    assert_as_accurate_as_eager(norm, x, residual, weight, bias, grad)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0), (8,)], ids=str)
def test_rows_of_any_number(backend, norm, shape):
    x, residual = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
    weight = draw(shape[-1]).requires_grad_()
    out, stream = NORMS[norm][0](x, residual, weight, None, 0.5, prenorm=True, seed=1)
    assert out.shape == stream.shape == shape
    grads = torch.autograd.grad(out.sum() + stream.sum(), (x, residual, weight))
    assert [g.shape for g in grads] == [x.shape, residual.shape, weight.shape]
    if 0 in shape:
        assert torch.equal(grads[2], torch.zeros_like(weight))


@pytest.mark.parametrize("branch", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, torch.float16, None], ids=str)
@pytest.mark.parametrize("in_fp32", [False, True])
def test_dtypes(backend, norm, branch, stream, in_fp32):
    x = draw(4, 16, dtype=branch).requires_grad_()
    residual = None if stream is None else draw(4, 16, dtype=stream).requires_grad_()
    weight = draw(16).requires_grad_()
    out, kept = NORMS[norm][0](
        x, residual, weight, None, 0.5, prenorm=True, residual_in_fp32=in_fp32, seed=1
    )
    assert out.dtype == branch
    assert kept.dtype == (torch.float32 if in_fp32 else stream or branch)
    given = [t for t in (x, residual, weight) if t is not None]
    grads = torch.autograd.grad(out.float().sum() + kept.float().sum(), given)
    assert [g.dtype for g in grads] == [t.dtype for t in given]
    after = NORMS[norm][1](x, weight, *([None] if norm == "layer_norm" else []), residual=residual)
    assert after.dtype == (stream or branch)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("branch", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, None], ids=str)
def test_out_dtype(backend, norm, branch, stream, out_dtype):
    """out is rounded once to its own dtype; the stream and the gradients keep theirs."""
    x, weight = draw(4, 40, dtype=branch).requires_grad_(), draw(40).requires_grad_()
    residual = None if stream is None else draw(4, 40, seed=1, dtype=stream).requires_grad_()
    given = [t for t in (x, residual, weight) if t is not None]
    grad = draw(4, 40, seed=2, dtype=out_dtype)
    keep = tridrop.keep_mask(1, x.shape, 0.5, device=DEVICE)
    options = {"eps": 1e-5, "prenorm": True, "residual_in_fp32": True, "seed": 1}

    out, kept = NORMS[norm][0](x, residual, weight, None, 0.5, out_dtype=out_dtype, **options)
    found = [out, *torch.autograd.grad((out, kept), given, (grad, kept.detach()))]
    value = torch.where(keep, x.float() * 2, 0)
    value = value if residual is None else value + residual
    plain = eager_norm(norm, value, weight, None)
    expected = [plain, *torch.autograd.grad((plain, value), given, (grad.float(), value.detach()))]

    assert (out.dtype, kept.dtype) == (out_dtype, torch.float32)
    torch.testing.assert_close(kept, value)
    for f, e, dtype in zip(found, expected, [out_dtype, *(t.dtype for t in given)], strict=True):
        assert f.dtype == dtype
        rounding = 2 * torch.finfo(dtype).eps  # a bf16 store in the interpreter truncates
        torch.testing.assert_close(f.float(), e.float(), rtol=rounding, atol=4e-6)


def test_the_stream_is_that_of_dropout_add(backend, norm):
    x, residual, bias, gain = draw(6, 5, 24), draw(6, 5, 24, seed=1), draw(24), draw(24, seed=2)
    options = {"bias": bias, "layer_scale": gain, "drop_path": 0.3, "seed": 7}
    expected = tridrop.dropout_add(x, residual, 0.3, **options)
    _, stream = NORMS[norm][0](x, residual, None, None, 0.3, prenorm=True, **options)
    torch.testing.assert_close(stream, expected)


def test_noise_shape_and_shards(backend, norm):
    x, residual = draw(6, 8, 24), draw(6, 8, 24, seed=1)
    options = {"noise_shape": (None, 1, None), "drop_path": 0.3, "seed": 7}
    whole = NORMS[norm][0](x, residual, None, None, 0.3, **options)
    part = NORMS[norm][0](
        x[2:5], residual[2:5], None, None, 0.3, shard=((6, 8, 24), (2, 0, 0)), **options
    )
    torch.testing.assert_close(part, whole[2:5])


def test_p_0_eval_and_p_1(backend, norm):
    x, residual, weight = draw(6, 24), draw(6, 24, seed=1), draw(24)
    function = NORMS[norm][0]
    state = torch.get_rng_state()
    evaluated = function(x, residual, weight, None, 0.5, False)
    assert torch.equal(evaluated, function(x, residual, weight, None, 0.0))
    assert torch.equal(torch.get_rng_state(), state)
    x[0, 0], x[1, 1] = math.nan, math.inf
    x.requires_grad_()
    dropped = function(x, residual, weight, None, 1.0)
    torch.testing.assert_close(dropped, function(residual, None, weight, None, 0.0))
    (dx,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(dx, torch.zeros_like(dx))
    rate = torch.tensor(0.5, dtype=torch.float64)
    clean = residual.detach()
    torch.testing.assert_close(
        function(clean, None, weight, None, rate, seed=1),
        function(clean, None, weight, None, 0.5, seed=1),
        rtol=0,
        atol=0,
    )


def test_strides_and_expanded_gradients(backend, norm):
    x, weight = draw(4, 6, 10), draw(10)
    relaid = x.transpose(0, 1).contiguous().transpose(0, 1)

    def call(x):
        x = x.detach().requires_grad_()
        out = NORMS[norm][0](x, x, weight, None, 0.5, seed=1)
        return out.detach(), *torch.autograd.grad(out.sum(), x)

    for found, expected in zip(call(relaid), call(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_sums_are_deterministic_and_partial_sums_bounded(backend, norm):
    x, weight, bias = draw(900, 40), draw(40).requires_grad_(), draw(40).requires_grad_()
    out = [NORMS[norm][0](x, x, weight, bias, 0.3, bias=bias, seed=1) for _ in range(3)]
    first, *others = (torch.autograd.grad(o.square().sum(), (weight, bias)) for o in out)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for cols in (1, 768, 8192, 65536):
        for row_blocks in (1, 1000, 10**7):
            strips = -(-row_blocks // launch.row_strip(row_blocks, cols))
            assert strips <= launch.REDUCTION_PROGRAMS
            assert strips * cols <= max(launch.ROW_SUMS, cols)


def composed(norm, x, residual, weight, bias, seed=None):
    """Both orders in a row, each with its own draw where the seed is None."""
    before, after = NORMS[norm]
    out, stream = before(
        x, residual, weight, None, 0.3, bias=bias, layer_scale=weight, drop_path=0.2,
        prenorm=True, seed=seed,
    )  # fmt: skip
    shift = [bias] if norm == "layer_norm" else []
    return after(out, weight, *shift, 0.2, residual=stream, seed=seed)


def outcome(function, norm, seed=None, manual_seed=1):
    tensors = [t.requires_grad_() for t in (draw(4, 3, 24), draw(4, 3, 24, seed=1), draw(24))]
    tensors.append(draw(24, seed=5).requires_grad_())
    torch.manual_seed(manual_seed)
    out = function(norm, *tensors, seed)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in tensors)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_compiled_equals_eager(backend, norm):
    compiled = torch.compile(composed, fullgraph=True)
    assert_same(outcome(compiled, norm), outcome(composed, norm))
    seed = tridrop.new_seed(DEVICE)
    assert_same(outcome(compiled, norm, seed), outcome(composed, norm, seed))


def test_dynamic_shapes_compile_once(norm):
    weight, seed = draw(16), tridrop.new_seed(DEVICE)
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x):
        return NORMS[norm][0](x, x, weight, None, 0.5, seed=seed)

    for rows in (3, 5, 9):
        x = draw(rows, 4, 16).requires_grad_()
        expected = NORMS[norm][0](x, x, weight, None, 0.5, seed=seed)
        torch.testing.assert_close(compiled(x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(backend, norm, use_reentrant):
    def recomputed(*args):
        return checkpoint(composed, *args, use_reentrant=use_reentrant)

    assert_same(outcome(recomputed, norm), outcome(composed, norm))


def test_vmap_and_functional_grad(backend, norm):
    residual, weight, bias = draw(3, 24), draw(24), draw(24, seed=5)
    seed = tridrop.new_seed(DEVICE)
    xs = draw(2, 3, 24)

    def loss(x):
        return composed(norm, x, residual, weight, bias, seed).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(xs)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(loss)(x) for x in xs]))


def test_first_and_second_derivatives(norm):
    def call(x, residual, weight, bias):
        with tridrop.backend("reference"):
            return composed(norm, x, residual, weight, bias, 3)

    tensors = [t.double().requires_grad_() for t in (draw(2, 2, 5), draw(2, 2, 5, seed=1))]
    tensors += [t.double().requires_grad_() for t in (draw(5), draw(5, seed=5))]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_opcheck(backend, norm):
    x, residual, weight, bias = draw(4, 3, 16), draw(4, 3, 16), draw(16), draw(16)
    seed = tridrop.new_seed(DEVICE)
    for after in (False, True):
        options = tridrop.spec.elementwise.NormOptions(p=0.3, drop_path=0.2, norm=norm, after=after)
        packed = tridrop.ops.pack_norm(options, tridrop.backends.name_for(x.device))
        first = None if after else bias
        arguments = (x, first, first, residual, weight, bias, seed, None, *packed)
        torch.library.opcheck(torch.ops.tridrop.norm_forward, arguments)
        _, stream, statistics = torch.ops.tridrop.norm_forward(*arguments)
        dtype = None if after else x.dtype
        dtypes = (x.dtype, dtype, dtype, x.dtype, x.dtype, x.dtype)
        stream, dstream = (x, None) if after else (stream, residual)
        saved = (stream, statistics, None if after else x, first, first, weight, seed, None)
        torch.library.opcheck(
            torch.ops.tridrop.norm_backward, (x, dstream, *saved, *packed, *dtypes)
        )


def test_autocast():
    x, residual, weight = draw(4, 24), draw(4, 24, seed=1), draw(24)
    linear = torch.nn.Linear(24, 24, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), tridrop.backend("reference"):
        out, stream = tridrop.dropout_add_layer_norm(
            linear(x), residual, weight, None, 0.5, prenorm=True
        )
    assert (out.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


X, V = torch.ones(4, 6), torch.ones(6)
ERRORS = [
    (lambda f: f(X, X[:2], V, None), ValueError, "expand it first"),
    (lambda f: f(X, X.int(), V, None), TypeError, "residual"),
    (lambda f: f(X, X, torch.ones(5), None), ValueError, "weight"),
    (lambda f: f(X, X, V, torch.ones(4)), ValueError, "norm_bias"),
    (lambda f: f(X, X, V, None, bias=torch.ones(4)), ValueError, "bias"),
    (lambda f: f(X, X, V, None, layer_scale=torch.ones(4)), ValueError, "layer_scale"),
    (lambda f: f(X, X, V, None, 1.5), ValueError, "p = 1.5"),
    (lambda f: f(X, X, V, None, drop_path=-1), ValueError, "drop_path"),
    (lambda f: f(V, V, V, None, drop_path=0.1), ValueError, "two dimensions"),
    (lambda f: f(X, X, V, None, eps=-1.0), ValueError, "eps"),
    (lambda f: f(X, X, V, None, out_dtype=torch.int8), ValueError, "out_dtype = torch.int8"),
    (lambda f: f(X, X, V, None, out_dtype=torch.float64), ValueError, "computed in float32"),
    (lambda f: f(X, X, V, None, out_dtype="float32"), TypeError, "torch.dtype"),
    (lambda f: f(torch.tensor(1.0), None, None, None), ValueError, "no dimension"),
    (lambda f: f(X, X, V, None, shard=((4, 12), (0, 0))), ValueError, "norm needs whole"),
    (lambda f: f(X, X, V, None, noise_shape=(2, 6)), ValueError, "noise_shape"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_bad_input_raises(norm, call, kind, message):
    with pytest.raises(kind, match=message):
        call(NORMS[norm][0])


def test_modules_have_the_weights_of_torch():
    for ours, theirs in (
        (tridrop.nn.DropoutAddLayerNorm(8), torch.nn.LayerNorm(8)),
        (tridrop.nn.DropoutAddRMSNorm(8), torch.nn.RMSNorm(8)),
    ):
        ours.load_state_dict(theirs.state_dict())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        x = draw(3, 8).cpu()
        torch.testing.assert_close(ours.eval()(x), theirs(x))
    with pytest.raises(TypeError, match="no bias"):
        tridrop.nn.DropoutAddRMSNorm(8, bias=True)
    with pytest.raises(TypeError, match="last dimension"):
        tridrop.nn.DropoutAddLayerNorm((2, 8))
