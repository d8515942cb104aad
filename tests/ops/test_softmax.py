"""softmax_dropout: sizes, accuracy, masks, torch's habits; the cases: test_check.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop import softmax_dropout
from tridrop.backends.triton import launch, softmax_launch
from tridrop.commands.check.measure import error, saved_bytes, tolerance
from tridrop.spec.attention import SoftmaxOptions, four

BACKENDS = [PLAIN, "reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def keep_of(shape: tuple[int, ...], p: float, seed: int = 3) -> Tensor:
    with tridrop.backend("reference"):
        return tridrop.attention_keep_mask(seed, four(shape), p, device=DEVICE).reshape(shape)


def eager(scores, mask, keep, p, *, is_causal=False, scale=1.0):
    """(out, softmax) of eager PyTorch; zeros in a row without keys, as in its attention."""
    scores = scores * scale
    part = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        part = part.tril()
    if mask is not None and mask.dtype == torch.bool:
        part = part & mask
    elif mask is not None:
        scores = scores + mask
    softmax = torch.softmax(scores.masked_fill(~part, -math.inf), -1)
    softmax = torch.where(part.any(-1, keepdim=True), softmax, 0)
    factor = tridrop.contract.mask.scale(tridrop.contract.mask.threshold(p))
    return torch.where(keep, softmax * factor, 0), softmax


def gradients(function, tensors, grads):
    """The results of a function and the gradients of those tensors that can have one."""
    leaves = [
        t if t is None or t.dtype == torch.bool else t.detach().requires_grad_() for t in tensors
    ]
    results = function(*leaves)
    needing = [t for t in leaves if t is not None and t.requires_grad]
    incoming = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, needing, incoming)]


def assert_as_accurate_as_eager(scores, mask=None, p=0.4, seed=3, **options):
    """Both results and all gradients within twice eager's own error against fp64."""
    keep = keep_of(scores.shape, p, seed)
    grads = draw(*scores.shape, seed=7), draw(*scores.shape, seed=8)

    def composed(scores, mask):
        return eager(scores, mask, keep, p, **options)

    def fused(scores, mask):
        return softmax_dropout(scores, p, mask=mask, seed=seed, return_softmax=True, **options)

    wide = [t if t is None or t.dtype == torch.bool else t.double() for t in (scores, mask)]
    exact = gradients(composed, wide, grads)
    plain = gradients(composed, (scores, mask), grads)
    found = gradients(fused, (scores, mask), grads)
    for f, e, t in zip(found, plain, exact, strict=True):
        assert error(f, t) <= tolerance(e, t)


@pytest.mark.parametrize("keys", [1, 2, 31, 33, 100, 1000, 5000])
def test_key_lengths(backend, keys):
    assert_as_accurate_as_eager(draw(2, 3, keys))


def test_a_row_of_65536_keys(backend):
    assert_as_accurate_as_eager(draw(1, 65536))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rates(backend, p, dtype):
    assert_as_accurate_as_eager(draw(4, 300, dtype=dtype), p=p)


@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [
        (lambda: draw(2, 1, 1, 40) > -0.5, False),
        (lambda: draw(3, 9, 40) > 0, True),
        (lambda: draw(1, 3, 1, 40, dtype=torch.float16), True),
        (lambda: draw(9, 40).t().contiguous().t(), False),
        (lambda: draw(2, 3, 9, 80)[..., ::2], False),
        (lambda: draw(40).expand(2, 3, 9, 40), False),
        (lambda: None, True),
    ],
)
def test_masks(backend, mask, is_causal):
    assert_as_accurate_as_eager(draw(2, 3, 9, 40), mask(), is_causal=is_causal, scale=0.3)


def test_masks_of_more_dimensions_are_shared_along_any(backend):
    for shape in ((2, 1, 2, 5, 33), (1, 2, 1, 5, 33), (2, 2, 1, 33)):
        assert_as_accurate_as_eager(draw(2, 2, 2, 5, 33), draw(*shape))


def test_strides_of_a_mask_may_pass_31_bits(backend):
    room = torch.empty(2_400_000_001, dtype=torch.bool, device=DEVICE)  # few pages are touched
    mask = room.as_strided((1, 3), (1, 1_200_000_000))
    mask.copy_(torch.tensor([[True, False, True]]))
    found = softmax_dropout(torch.zeros(2, 3, device=DEVICE), 0.0, mask=mask)
    assert found.tolist() == [[0.5, 0.0, 0.5]] * 2


@pytest.mark.parametrize("shape", [(2, 9, 40), (9, 40), (1, 40), (9, 1)])
def test_a_masks_gradient_is_a_deterministic_sum_in_fp32(backend, shape):
    scores = draw(2, 2, 9, 40, dtype=torch.float16)
    mask = draw(*shape, dtype=torch.float16).requires_grad_()
    call = [softmax_dropout(scores, 0.3, mask=mask, seed=1) for _ in range(2)]
    first, second = (torch.autograd.grad(out.sum() * 64, mask)[0] for out in call)
    assert torch.equal(first, second)
    assert first.shape == mask.shape
    assert first.dtype == mask.dtype


def test_rows_without_a_key_are_zero(backend):
    scores = draw(2, 4, 40)
    scores[0, 0] = math.nan  # a masked score is not looked at
    bools = torch.ones(2, 4, 40, dtype=torch.bool, device=DEVICE)
    bools[0, 0], bools[1, 3] = False, False
    floats = torch.zeros(4, 40, device=DEVICE)
    floats[2] = -math.inf
    for mask, x, rows in ((bools, scores, [0, 7]), (floats, scores.nan_to_num(), [2, 6])):
        x = x.detach().requires_grad_()
        needing = [x] if mask is bools else [x, mask.requires_grad_()]
        out, softmax = softmax_dropout(x, 0.5, mask=mask, return_softmax=True, seed=1)
        results = [out, softmax, *torch.autograd.grad((out * 2 + softmax).sum(), needing)]
        assert not any(t.isnan().any() for t in results)
        for t in results[:3]:
            assert torch.equal(t.view(8, 40)[rows], torch.zeros(len(rows), 40, device=DEVICE))
        assert (softmax.view(8, 40)[1] != 0).all()
    x, eye = scores.nan_to_num(), torch.eye(40, device=DEVICE).expand(2, 40, 40)
    theirs = F.scaled_dot_product_attention(x, eye, eye, attn_mask=bools, scale=1.0)
    torch.testing.assert_close(softmax_dropout(x, 0.0, mask=bools), theirs)


def test_large_scores_overflow_nothing(backend):
    for scores in (100 * draw(3, 70), draw(3, 70) - 1e4, 0 * draw(2, 70).half() + 65504):
        assert_as_accurate_as_eager(scores)


def test_strides_and_expanded_gradients(backend):
    scores = draw(*(shape := (1, 2, 8, 40)))
    relaid = scores.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    rows = draw(1, 2, 8, 48)[..., 3:43].copy_(scores)
    expanded = scores[:, :1, :1].expand(shape)

    def call(x, grad):
        x = x.detach().requires_grad_()
        out = softmax_dropout(x, 0.5, is_causal=True, seed=1)
        return out.detach(), *torch.autograd.grad(out, x, grad)

    full = draw(*shape, seed=1)
    for x in (relaid, rows, expanded):
        for grad in (torch.ones((), device=DEVICE).expand(x.shape), full.mT.contiguous().mT):
            expected = call(x.contiguous(), grad.contiguous())
            for f, e in zip(call(x, grad), expected, strict=True):
                assert f.is_contiguous()
                assert torch.equal(f, e)


@pytest.mark.parametrize("origin", [(1, 0, 0, 0), (0, 2, 3, 32), (1, 1, 2, 37), (0, 0, 7, 95)])
def test_a_shard_has_its_piece_of_the_mask(backend, origin):
    whole, shape = (2, 3, 9, 130), (1, 1, 2, 35)
    scores = draw(*shape)
    out = softmax_dropout(scores, 0.4, shard=(whole, origin), seed=3)
    keep = keep_of(whole, 0.4)[tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))]
    torch.testing.assert_close(out, eager(scores, None, keep, 0.4)[0])


def test_a_causal_shard_of_the_queries_is_a_piece_of_the_whole(backend):
    scores = draw(1, 2, 9, 40)
    whole = softmax_dropout(scores, 0.3, is_causal=True, seed=1)
    shard = tridrop.Shard((1, 2, 9, 40), (0, 1, 5, 0))
    part = softmax_dropout(scores[:, 1:, 5:], 0.3, is_causal=True, shard=shard, seed=1)
    assert torch.equal(part, whole[:, 1:, 5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, torch.tensor(0.5, dtype=torch.float64)])
def test_forward_and_backward_have_the_exported_mask(backend, dtype, p):
    scores = (0.1 * draw(2, 2, 5, 100, dtype=dtype)).requires_grad_()
    keep = keep_of(scores.shape, float(p))
    out = softmax_dropout(scores, p, seed=3)
    assert torch.equal(out != 0, keep)
    (grad,) = torch.autograd.grad(out.sum(), scores)
    # P * (scale - mean) where kept, P * (0 - mean) where dropped
    assert torch.equal(grad > 0, keep)


def test_p_0_and_eval_draw_nothing_and_p_1_is_zero(backend):
    scores = draw(3, 40).requires_grad_()
    results = [softmax_dropout(scores, 0.5, False), softmax_dropout(scores, 0.0)]
    results.append(softmax_dropout(scores, torch.tensor(0.0)))
    assert all(torch.equal(r, results[0]) for r in results)
    found = [torch.autograd.grad(r.square().sum(), scores)[0] for r in results]
    assert all(torch.equal(f, found[0]) for f in found)
    # On a CPU that is torch's softmax, and this one a loop's.
    softmax = softmax_dropout(scores, 0.5, return_softmax=True, seed=1)[1]
    rounding = {"rtol": 2e-6, "atol": 0.0} if backend != "triton" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(softmax, results[0], **rounding)
    (grad,) = torch.autograd.grad(softmax.square().sum(), scores)
    torch.testing.assert_close(grad, found[0], rtol=1e-5, atol=1e-8)
    state = torch.get_rng_state()
    softmax_dropout(scores, 0.5, False)
    softmax_dropout(scores, 0.0, return_softmax=True)
    assert torch.equal(torch.get_rng_state(), state)
    for p in (1.0, torch.tensor(1.0)):
        out = softmax_dropout(scores, p)
        assert torch.equal(out, torch.zeros_like(out))
        (grad,) = torch.autograd.grad(out.sum(), scores)
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 2, 3, 5)], ids=str)
def test_empty_scores(backend, shape):
    scores = draw(*shape).requires_grad_()
    mask = torch.zeros(shape[-1], device=DEVICE, requires_grad=True)
    out, softmax = softmax_dropout(scores, 0.5, mask=mask, return_softmax=True)
    assert out.shape == softmax.shape == shape
    found = torch.autograd.grad((out + softmax).sum(), (scores, mask))
    assert torch.equal(found[0], scores)
    assert torch.equal(found[1], torch.zeros_like(mask))


@pytest.mark.parametrize("tile", [(1, 32, 1), (4, 64, 2), (2, 1024, 4)])
def test_results_do_not_depend_on_the_tile(monkeypatch, tile):
    options = {"is_causal": True, "shard": ((1, 4, 60, 200), (0, 1, 50, 3)), "seed": 3}
    grads = draw(1, 1, 5, 100, seed=1), draw(1, 1, 5, 100, seed=2)

    def call(scores, mask):
        return softmax_dropout(scores, 0.4, mask=mask, return_softmax=True, **options)

    with tridrop.backend("triton"):
        expected = gradients(call, (draw(1, 1, 5, 100), draw(1, 100)), grads)
        monkeypatch.setattr(softmax_launch, "tile", lambda q, k: launch.Tile(*tile))
        found = gradients(call, (draw(1, 1, 5, 100), draw(1, 100)), grads)
    assert torch.equal(found[0] == 0, expected[0] == 0)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def test_saved_bytes(backend):
    inputs = {"scores": draw(2, 2, 9, 40, dtype=torch.float16)}
    kept = saved_bytes(lambda t: softmax_dropout(t["scores"], 0.3, is_causal=True), inputs)
    assert kept == inputs["scores"].nbytes + 4 * 2 * 2 * 9 + 16


def test_without_dropout_it_is_torchs_own_softmax():
    """One pass, and backward keeps the result alone, as torch's does."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = {"scores": draw(2, 2, 9, 40, dtype=dtype)}
        with tridrop.backend("reference"):
            for options in ({}, {"is_causal": True}, {"mask": draw(9, 40) > 0}):

                def call(t, options=options):
                    return softmax_dropout(t["scores"], 0.3, False, **options)

                assert saved_bytes(call, inputs) == inputs["scores"].nbytes
            x = inputs["scores"].requires_grad_()
            found, expected = softmax_dropout(x, 0.0), torch.softmax(x, -1)
        grad = draw(2, 2, 9, 40, seed=1, dtype=dtype)
        (first,), (second,) = (torch.autograd.grad(t, x, grad) for t in (found, expected))
        assert torch.equal(found, expected)
        assert torch.equal(first, second)


def test_second_derivatives_without_dropout():
    scores = draw(2, 3, 5).double().requires_grad_()
    with tridrop.backend("reference"):
        for options in ({}, {"is_causal": True}, {"scale": 0.5}):
            assert torch.autograd.gradgradcheck(
                lambda x, options=options: softmax_dropout(x, 0.0, **options), scores
            )


def test_a_dropped_nan_is_exactly_zero(backend):
    scores, p = draw(2, 4, 40), 0.4
    scores[0, 1] = math.nan
    keep = keep_of(scores.shape, p)
    out = softmax_dropout(scores, p, seed=3)
    assert (out[~keep] == 0).all()
    assert out[0, 1][keep[0, 1]].isnan().all()


def test_expected_value_of_the_gradient(backend):
    """The gradient is linear in the mask: its mean over seeds is that without dropout."""
    scores, grad = draw(2, 64).requires_grad_(), draw(2, 64, seed=1)

    def derivative(p, seed):
        return torch.autograd.grad(softmax_dropout(scores, p, seed=seed), scores, grad)[0]

    plain = derivative(0.0, None)
    samples = torch.stack([(derivative(0.3, s) * plain).sum() for s in range(50)])
    z = (samples.mean() - plain.square().sum()) / (samples.std() / 50**0.5)
    assert abs(float(z)) < 6


# ------------------------------------------------------------------------------ torch's habits


def both(scores, mask, seed=None):
    """Two ops in a row, each with its own draw where the seed is None."""
    out, softmax = softmax_dropout(
        scores, 0.3, mask=mask, is_causal=True, scale=0.5, return_softmax=True, seed=seed
    )
    return softmax_dropout(out + softmax, 0.2, mask=mask > 0, seed=seed)


def outcome(function, *args, manual_seed: int = 1) -> list[Tensor]:
    scores, mask = draw(2, 2, 6, 33).requires_grad_(), draw(2, 1, 33).requires_grad_()
    torch.manual_seed(manual_seed)
    out = function(scores, mask, *args)
    out.square().sum().backward()
    return [out.detach(), scores.grad, mask.grad]


def test_compiled_equals_eager(backend):
    compiled = torch.compile(both, fullgraph=True)
    for args in ((), (tridrop.new_seed(DEVICE),)):
        for found, expected in zip(outcome(compiled, *args), outcome(both, *args), strict=True):
            assert torch.equal(found, expected)


def test_dynamic_shapes_compile_once():
    torch._dynamo.utils.counters.clear()
    seed = tridrop.new_seed(DEVICE)
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for queries, keys in ((4, 5), (6, 7), (8, 12)):
        scores = draw(2, 3, queries, keys).requires_grad_()
        mask = draw(3, 1, keys)
        expected = both(scores, mask, seed)
        found = compiled(scores, mask, seed)
        assert torch.equal(found, expected)
        a, b = (torch.autograd.grad(t.square().sum(), scores)[0] for t in (found, expected))
        assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_checkpoint_recomputes_the_same_mask(backend):
    def recomputed(*args):
        return checkpoint(both, *args, use_reentrant=False)

    for found, expected in zip(outcome(recomputed), outcome(both), strict=True):
        assert torch.equal(found, expected)


def test_vmap_and_functional_grad(backend):
    seed, xs, mask = tridrop.new_seed(DEVICE), draw(3, 2, 4, 33), draw(2, 1, 33)
    grad = torch.func.grad(lambda x, m: both(x, m, seed).square().sum(), argnums=(0, 1))
    found = torch.func.vmap(grad, in_dims=(0, None))(xs, mask)
    expected = [torch.stack(t) for t in zip(*(grad(x, mask) for x in xs), strict=True)]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_first_and_second_derivatives():
    scores, mask = draw(2, 3, 5).double().requires_grad_(), draw(3, 1).double().requires_grad_()

    def call(scores, mask):
        with tridrop.backend("reference"):
            return both(scores, mask, 3)

    assert torch.autograd.gradcheck(call, (scores, mask))
    assert torch.autograd.gradgradcheck(call, (scores, mask))


def test_second_derivatives_of_backends_agree():
    results = []
    for name in BACKENDS:
        scores, mask = draw(2, 4, 33).requires_grad_(), draw(4, 33).requires_grad_()
        with tridrop.backend(name):
            first = torch.autograd.grad(both(scores, mask, 3).square().sum(), scores,
                                        create_graph=True)[0]  # fmt: skip
            results.append(torch.autograd.grad(first.square().sum(), (scores, mask)))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_opcheck(backend):
    scores, mask, grad = draw(2, 3, 4, 40), draw(3, 1, 40), draw(2, 3, 4, 40, seed=2)
    seed = tridrop.new_seed(DEVICE)
    options = SoftmaxOptions(p=0.3, scale=0.5, upper=0, return_softmax=True)
    packed = tridrop.ops.pack_softmax(options, backend)
    arguments = (scores, mask, seed, None, *packed)
    torch.library.opcheck(torch.ops.tridrop.softmax_forward, arguments)
    lse = torch.ops.tridrop.softmax_forward(*arguments)[2]
    for second, dtypes in ((grad, (scores.dtype, mask.dtype)), (None, (scores.dtype, None))):
        saved = (grad, second, scores, mask, lse, seed, None)
        torch.library.opcheck(torch.ops.tridrop.softmax_backward, (*saved, *packed, *dtypes))


X = torch.zeros(2, 3, 4)
ERRORS = [
    (lambda: softmax_dropout(X.int()), TypeError, "scores has dtype"),
    (lambda: softmax_dropout(X[0, 0]), ValueError, "two dimensions or more"),
    (lambda: softmax_dropout(X, 1.5), ValueError, "p = 1.5"),
    (lambda: softmax_dropout(X, mask=X[..., :2]), ValueError, "mask has shape"),
    (lambda: softmax_dropout(X, mask=X.int()), TypeError, "mask has dtype"),
    (lambda: softmax_dropout(X, mask=1.0), TypeError, "mask is of type"),
    (lambda: softmax_dropout(X, scale=math.inf), ValueError, "finite"),
    (lambda: softmax_dropout(X, shard=((2, 3, 4), (0, 0, 0))), ValueError, "four dimensions"),
    (lambda: softmax_dropout(X[None], shard=((1, 2, 3, 3), (0,) * 4)), ValueError, "not fit"),
    (lambda: softmax_dropout(X, seed=0.5), TypeError, "seed is 0.5"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_bad_input_raises(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_fp64_masks_run_on_the_reference_only():
    with tridrop.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        softmax_dropout(X, mask=X.double())
