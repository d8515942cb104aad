"""lora_delta, lora_linear and lora_deltas: masks, dtypes, what is saved, errors."""

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.commands.check.measure import error, saved_bytes, tolerance
from tridrop.contract.mask import ONE, threshold
from tridrop.spec.product import groups


@pytest.fixture(params=[PLAIN, "triton"])
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def matrices(ranks, cols, out=12, dtype=torch.float32):
    As = [draw(r, cols, seed=i, dtype=dtype).requires_grad_() for i, r in enumerate(ranks)]
    Bs = [draw(out, r, seed=i + 9, dtype=dtype).requires_grad_() for i, r in enumerate(ranks)]
    return As, Bs


def eager(x, As, Bs, masks, p, scaling):
    factor = ONE / (ONE - threshold(p))
    return [
        scaling * F.linear(F.linear(torch.where(mask, x * factor, 0), A), B)
        for A, B, mask in zip(As, Bs, masks, strict=True)
    ]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (8, 3, 16), (8, 8, 8, 8, 8), (70, 100)])
def test_each_adapter_has_the_mask_of_its_stream(backend, ranks, shared):
    x = draw(3, 23, 44).requires_grad_()
    As, Bs = matrices(ranks, 44)
    seed = tridrop.fold_in(7, 3).to(DEVICE)
    found = tridrop.lora_deltas(x, As, Bs, 0.4, scaling=2.0, shared_mask=shared, seed=seed)
    seeds = [seed if shared else tridrop.fold_in(seed, i) for i in range(len(ranks))]
    masks = [tridrop.keep_mask(s, x.shape, 0.4, device=DEVICE) for s in seeds]
    wide = [t.detach().double().requires_grad_() for t in (x, *As, *Bs)]
    n = len(ranks)
    expected = eager(wide[0], wide[1 : n + 1], wide[n + 1 :], masks, 0.4, 2.0)
    plain = eager(x, As, Bs, masks, 0.4, 2.0)
    for a, b, c in zip(found, plain, expected, strict=True):
        assert error(a.detach(), c.detach()) <= tolerance(b.detach(), c.detach())
    grads = [torch.randn_like(out) for out in found]
    given = torch.autograd.grad(found, (x, *As, *Bs), grads)
    eagers = torch.autograd.grad(plain, (x, *As, *Bs), grads)
    wanted = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    for a, b, c in zip(given, eagers, wanted, strict=True):
        assert error(a, c) <= tolerance(b, c)


def test_a_seed_for_each_mask_and_a_scaling_for_each_adapter(backend):
    x = draw(9, 40)
    As, Bs = matrices((4, 8), 40)
    both = tridrop.lora_deltas(x, As, Bs, 0.3, scaling=[0.5, 3.0], seed=[5, 6])
    for i, (seed, scaling) in enumerate(((5, 0.5), (6, 3.0))):
        alone = tridrop.lora_delta(x, As[i], Bs[i], 0.3, scaling=scaling, seed=seed)
        torch.testing.assert_close(both[i], alone)


def test_a_scaling_of_any_size_scales_the_bias_too():
    """torch multiplies by no whole number of more than 64 bits; a float has the same value."""
    x, A, B, bias = (torch.randn(*shape) for shape in ((2, 4), (3, 4), (5, 3), (5,)))
    found, expected = (
        tridrop.lora_delta(x, A, B, 0.0, scaling=scaling, bias=bias)
        for scaling in (1 << 64, float(1 << 64))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.9, False)])
def test_without_dropout_it_is_two_linear_layers_and_draws_nothing(backend, p, training):
    x, base = draw(5, 40), draw(5, 12)
    (A,), (B,) = matrices((4,), 40)
    state = torch.get_rng_state()
    found = tridrop.lora_linear(x, base, A, B, p, training, scaling=0.5)
    torch.testing.assert_close(found, base + 0.5 * F.linear(F.linear(x, A), B))
    assert torch.equal(state, torch.get_rng_state())


def test_everything_dropped_is_zero_whatever_it_was(backend):
    x = torch.full((5, 40), torch.nan, device=DEVICE).requires_grad_()
    (A,), (B,) = matrices((4,), 40)
    out = tridrop.lora_delta(x, A, B, 1.0, seed=1)
    grads = torch.autograd.grad(out.sum(), (x, A, B))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (out, *grads))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_products_are_in_the_dtype_of_the_matrices(backend, dtypes, p):
    """As PEFT converts x; but here no converted copy is kept."""
    x = draw(7, 48, dtype=dtypes[0]).requires_grad_()
    (A,), (B,) = matrices((8,), 48, dtype=dtypes[1])
    mask = tridrop.keep_mask(3, x.shape, p, device=DEVICE)
    out = tridrop.lora_delta(x, A, B, p, seed=3)
    assert out.dtype == dtypes[1]
    expected = eager(x.detach().to(dtypes[1]), [A], [B], [mask], p, 1.0)[0]
    tolerant = {"rtol": 2e-2, "atol": 2e-2} if torch.float16 in dtypes[1:] else {}
    torch.testing.assert_close(out, expected, **tolerant)
    assert torch.autograd.grad(out.sum(), x)[0].dtype == dtypes[0]
    inputs = {"x": x, "A": A, "B": B}
    kept = saved_bytes(lambda t: tridrop.lora_delta(t["x"], t["A"], t["B"], p, seed=3), inputs)
    small = A.nbytes + B.nbytes + 2 * 7 * 8 * A.element_size()
    assert kept <= x.nbytes + small + 16


def test_autocast_computes_in_its_dtype():
    x = draw(6, 40)
    (A,), (B,) = matrices((4,), 40)
    with torch.autocast(DEVICE, torch.bfloat16), tridrop.backend("reference"):
        found = tridrop.lora_delta(x, A, B, 0.3, seed=2)
        assert found.dtype == F.linear(x, A).dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(found.float().sum(), A)
    assert grad.dtype == torch.float32
    mask = tridrop.keep_mask(2, x.shape, 0.3, device=DEVICE)
    expected = eager(x, [A], [B], [mask], 0.3, 1.0)[0]
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=0.3)


def test_three_projections_save_one_x(backend):
    """FIELD: 6.05 copies of x with eager dropout, 1.05 without."""
    x = draw(4, 64, 512)
    q, k, v = (matrices((8,), 512, out=16) for _ in range(3))

    def call(inputs):
        outs = [
            tridrop.lora_delta(inputs["x"], A, B, 0.1, seed=i)
            for i, ((A,), (B,)) in enumerate((q, k, v))
        ]
        return torch.stack(outs).sum(0)

    weights = sum(t.nbytes for As, Bs in (q, k, v) for t in (*As, *Bs))
    assert saved_bytes(call, {"x": x}) - weights <= 1.1 * x.nbytes


def test_shards_have_the_masks_of_the_whole(backend):
    x = draw(6, 40)
    (A,), (B,) = matrices((4,), 40)
    whole = tridrop.lora_delta(x, A, B, 0.4, seed=2)
    part = tridrop.lora_delta(x[2:5], A, B, 0.4, seed=2, shard=((6, 40), (2, 0)))
    torch.testing.assert_close(part, whole[2:5])
    # columns split: partial sums, as of a row-parallel layer; the second begins inside a group
    halves = [
        tridrop.lora_delta(x[:, cut], A[:, cut], B, 0.4, seed=2, shard=((6, 40), (0, cut.start)))
        for cut in (slice(0, 19), slice(19, 40))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_has_the_mask_of_its_forward(backend, reentrant):
    x = draw(5, 40).requires_grad_()
    (A,), (B,) = matrices((4,), 40)

    def run(wrap):
        torch.manual_seed(3)
        out = wrap(lambda x: tridrop.lora_delta(x, A, B, 0.5), x)
        return torch.autograd.grad(out.square().sum(), (x, A, B)) if not reentrant else _grads(out)

    def _grads(out):
        for t in (x, A, B):
            t.grad = None
        out.square().sum().backward()
        return x.grad, A.grad, B.grad

    plain = run(lambda f, x: f(x))
    again = run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_compiles_without_a_graph_break():
    x = draw(5, 40).requires_grad_()
    As, Bs = matrices((4, 8), 40)

    def call(x):
        return sum(tridrop.lora_deltas(x, As, Bs, 0.5, scaling=[1.0, 2.0], seed=4))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(call(x).sum(), x)
    )


def test_derivatives_of_any_order():
    inputs = [t.double().detach().requires_grad_() for t in (draw(4, 9), draw(3, 9), draw(2, 3))]

    def call(x, A, B):
        return tridrop.lora_delta(x, A, B, 0.4, scaling=0.5, seed=1)

    with tridrop.backend("reference"):
        torch.autograd.gradcheck(call, inputs)
        torch.autograd.gradgradcheck(call, inputs)


def test_a_rate_that_is_a_tensor(backend):
    x = draw(5, 40)
    (A,), (B,) = matrices((4,), 40)
    found = tridrop.lora_delta(x, A, B, torch.tensor(0.25, device=DEVICE), seed=4)
    torch.testing.assert_close(found, tridrop.lora_delta(x, A, B, 0.25, seed=4))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 3, 4, 40)])
def test_any_leading_shape(backend, shape):
    x = draw(*shape).requires_grad_()
    (A,), (B,) = matrices((4,), 40)
    out = tridrop.lora_delta(x, A, B, 0.5, seed=1)
    mask = tridrop.keep_mask(1, shape, 0.5, device=DEVICE)
    torch.testing.assert_close(out, eager(x, [A], [B], [mask], 0.5, 1.0)[0])
    grads = torch.autograd.grad(out.sum(), (x, A))
    assert grads[0].shape == x.shape
    assert grads[1].shape == A.shape


def test_groups_fit_the_registers():
    assert groups([8]) == [slice(0, 1)]
    assert groups([8] * 7) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert groups([64, 64, 64]) == [slice(0, 3)]
    assert groups([256, 8]) == [slice(0, 1), slice(1, 2)]
    assert groups([8, 100, 8]) == [slice(0, 1), slice(1, 2), slice(2, 3)]


BAD = {
    "A of other features": (lambda x, A, B: (x, A[:, 1:], B, 0.1), {}, ValueError, r"\[any, 40\]"),
    "B of another rank": (lambda x, A, B: (x, A, B[:, 1:], 0.1), {}, ValueError, "rank 4"),
    "a rank too large": (
        lambda x, A, B: (x, A.repeat(100, 1), B.repeat(1, 100), 0.1), {}, ValueError, "400 rows",
    ),
    "two dtypes": (lambda x, A, B: (x, A.double(), B, 0.1), {}, TypeError, "float64"),
    "NaN to scale by": (lambda x, A, B: (x, A, B), {"scaling": float("nan")}, ValueError, "finite"),
    "a scaling of text": (lambda x, A, B: (x, A, B), {"scaling": "2"}, TypeError, "number"),
    "p out of range": (lambda x, A, B: (x, A, B, 1.5), {}, ValueError, "1.5"),
    "a longer bias": (lambda x, A, B: (x, A, B), {"bias": torch.ones(3)}, ValueError, "12"),
    "a scalar": (lambda x, A, B: (x.sum(), A, B), {}, ValueError, "scalar"),
    "integers": (lambda x, A, B: (x.long(), A, B), {}, TypeError, "int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_before_anything_is_drawn(name):
    arguments, options, kind, message = BAD[name]
    (A,), (B,) = matrices((4,), 40)
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        tridrop.lora_delta(*arguments(draw(5, 40).cpu(), A.cpu(), B.cpu()), **options)
    assert torch.equal(state, torch.get_rng_state())


def test_lists_of_different_lengths_raise():
    x = draw(5, 40)
    As, Bs = matrices((4, 8), 40)
    with pytest.raises(ValueError, match="Bs has 1 entries for 2"):
        tridrop.lora_deltas(x, As, Bs[:1], 0.1)
    with pytest.raises(ValueError, match="scaling has 3"):
        tridrop.lora_deltas(x, As, Bs, 0.1, scaling=[1, 2, 3])
    with pytest.raises(ValueError, match="seed has 2 entries for 1"):
        tridrop.lora_deltas(x, As, Bs, 0.1, seed=[1, 2], shared_mask=True)
    with pytest.raises(ValueError, match="empty"):
        tridrop.lora_deltas(x, [], [], 0.1)
    with pytest.raises(ValueError, match="base_out has shape"):
        tridrop.lora_linear(x, x, As[0], Bs[0], 0.1)
