"""What torch does with the ops: compile, export, functional transforms, checkpoint, autocast."""

import copy
import pickle
import warnings

import pytest
import torch
from hosts import DEVICE, PLAIN, imported_with
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.contract import seeds

BACKENDS = [PLAIN, "triton"]


def both(x: Tensor, residual: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
    """Two ops in a row, each with its own draw where the seed is None."""
    hidden = tridrop.activation_dropout(x, 0.3, activation="gelu", bias=bias, seed=seed)
    return tridrop.dropout_add(hidden, residual, 0.2, drop_path=0.2, seed=seed)


def operands(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 24, generator=generator).to(DEVICE).requires_grad_(requires_grad)
    residual = torch.randn(4, 6, 24, generator=generator).to(DEVICE)
    bias = torch.randn(24, generator=generator).to(DEVICE).requires_grad_(requires_grad)
    return x, residual, bias


def outcome(function, *args, manual_seed: int = 1) -> list[Tensor]:
    """The result of a call and the gradients of x and bias."""
    x, residual, bias = operands()
    torch.manual_seed(manual_seed)
    out = function(x, residual, bias, *args)
    out.square().sum().backward()
    return [out.detach(), x.grad, bias.grad]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for the order of fp32 sums, whose error scales with the largest value."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- compile


def test_compiled_draws_the_masks_of_eager(backend):
    compiled = torch.compile(both, fullgraph=True)
    for manual_seed in (1, 2):
        expected = outcome(both, manual_seed=manual_seed)
        assert_same(outcome(compiled, manual_seed=manual_seed), expected)


def test_compiled_without_gradients_draws_the_masks_of_eager():
    x = torch.ones(64, device=DEVICE)
    compiled = torch.compile(lambda x: tridrop.dropout(x, 0.5), fullgraph=True)
    torch.manual_seed(3)
    expected = tridrop.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), expected)


def test_one_tensor_may_be_two_operands_of_a_compiled_call():
    x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda x: tridrop.dropout_add(x, x, 0.5, seed=1), fullgraph=True)
    expected = tridrop.dropout_add(x, x, 0.5, seed=1)
    assert torch.equal(compiled(x), expected)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(found, torch.autograd.grad(expected.sum(), x)[0])


def test_the_compiler_never_merges_two_draws():
    x = torch.ones(256, device=DEVICE, requires_grad=True)

    @torch.compile(fullgraph=True)
    def twice(x):
        return tridrop.dropout(x, 0.5), tridrop.dropout(x, 0.5)

    first, second = twice(x)
    assert not torch.equal(first, second)


def test_a_new_seed_or_p_does_not_recompile(backend):
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, p, seed: tridrop.dropout(x, p, seed=seed), fullgraph=True, dynamic=False
    )
    x = torch.ones(64, device=DEVICE)
    for step in range(5):
        p = torch.tensor(step / 5, device=DEVICE)
        seed = tridrop.fold_in(2**40 + step, step)
        seed = seed.to(DEVICE)
        expected = tridrop.dropout(x, step / 5, seed=seed)
        torch.testing.assert_close(compiled(x, p, seed), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_rng_under_compile_equals_eager_and_does_not_recompile(backend):
    compiled = torch.compile(both, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        seed = tridrop.new_seed(DEVICE)
        with tridrop.rng(seed):
            expected = outcome(both)
        with tridrop.rng(seed):
            assert_same(outcome(compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dynamic_shapes_compile(backend):
    compiled = torch.compile(
        lambda x, seed: tridrop.dropout(x, 0.5, noise_shape=(None, 1), seed=seed),
        fullgraph=True,
        dynamic=True,
    )
    seed = tridrop.new_seed(DEVICE)
    torch._dynamo.utils.counters.clear()
    for rows in (3, 5, 9):
        x = torch.ones(rows, 16, device=DEVICE)
        expected = tridrop.dropout(x, 0.5, noise_shape=(None, 1), seed=seed)
        assert torch.equal(compiled(x, seed), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_backend_of_the_environment_holds_under_compile(monkeypatch):
    imported_with(monkeypatch, TRIDROP_BACKEND="reference")
    x = torch.ones(16, device=DEVICE)
    compiled = torch.compile(lambda x: tridrop.dropout(x, 0.5, seed=1), fullgraph=True)
    assert torch.equal(compiled(x), tridrop.dropout(x, 0.5, seed=1))


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_explicit_seeds_stay_right_when_activations_are_recomputed_by_the_compiler(budget):
    seed = tridrop.new_seed(DEVICE)
    expected = outcome(both, seed)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        assert_same(outcome(torch.compile(both, fullgraph=True), seed), expected)

        def in_context(x, residual, bias):
            with tridrop.rng(seed):
                return both(x, residual, bias)

        expected = outcome(in_context)
        compiled = torch.compile(both, fullgraph=True)

        def compiled_in_context(x, residual, bias):
            with tridrop.rng(seed):
                return compiled(x, residual, bias)

        assert_same(outcome(compiled_in_context), expected)


def test_a_draw_warns_once_when_the_compiler_may_recompute_it(monkeypatch):
    monkeypatch.setattr(tridrop.ops.masks, "_warned_of_recomputation", False)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.warns(UserWarning, match="activation_memory_budget"):
            outcome(torch.compile(both, fullgraph=True))
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*activation_memory_budget")
            outcome(torch.compile(both, fullgraph=True))


def test_export_in_eval():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), tridrop.nn.TransformerBlock(8, 2, p=0.3))
    model = model.to(DEVICE).eval()
    x = torch.randn(2, 5, 8, device=DEVICE)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


# ------------------------------------------------------------------------------------- opcheck


def arguments(activation: str, **kwargs):
    options = tridrop.spec.elementwise.Options(activation=activation, **kwargs)
    return tridrop.ops.pack(options, tridrop.backends.name_for(torch.device(DEVICE)))


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_opcheck(backend, activation):
    width = 32 if activation == "swiglu" else 16
    x = torch.randn(4, 6, width, device=DEVICE)
    residual, grad = torch.randn(2, 4, 6, 16, device=DEVICE)
    bias, gain = torch.randn(width, device=DEVICE), torch.randn(16, device=DEVICE)
    seed = tridrop.new_seed(DEVICE)
    packed = arguments(activation, p=0.3, drop_path=0.2, shared=(1,))
    torch.library.opcheck(torch.ops.tridrop.forward, (x, bias, gain, residual, seed, None, *packed))
    torch.library.opcheck(
        torch.ops.tridrop.backward,
        (grad, x, bias, gain, seed, None, *packed, None, x.dtype, bias.dtype, None),
    )
    torch.library.opcheck(
        torch.ops.tridrop.keep_mask, (seed, [4, 8], None, 0.5, "elements", [], [], [], packed[-1])
    )


# -------------------------------------------------------------------------- functional transforms


def test_functional_grad(backend):
    x, residual, bias = operands(requires_grad=False)
    seed = tridrop.new_seed(DEVICE)
    found = torch.func.grad(lambda x: both(x, residual, bias, seed).square().sum())(x)
    torch.testing.assert_close(found, outcome(both, seed)[1])


def test_vmap_gives_every_sample_the_mask_of_a_call_of_its_own(backend):
    _, residual, bias = operands(requires_grad=False)
    seed = tridrop.new_seed(DEVICE)
    xs = torch.randn(3, 4, 6, 24, device=DEVICE)
    found = torch.func.vmap(lambda x: both(x, residual, bias, seed))(xs)
    torch.testing.assert_close(found, torch.stack([both(x, residual, bias, seed) for x in xs]))


def test_gradients_a_sample(backend):
    _, residual, bias = operands(requires_grad=False)
    seed = tridrop.new_seed(DEVICE)
    xs = torch.randn(3, 4, 6, 24, device=DEVICE)
    grad = torch.func.grad(lambda x, b: both(x, residual, b, seed).square().sum(), argnums=(0, 1))
    dx, dbias = torch.func.vmap(grad, in_dims=(0, None))(xs, bias)
    for i, x in enumerate(xs):
        expected = grad(x, bias)
        assert_same([dx[i], dbias[i]], list(expected))


def test_vmap_respects_torch_randomness():
    x = torch.ones(2, 64, device=DEVICE)
    drop = lambda x: tridrop.dropout(x, 0.5)  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(drop)(x)
    same = torch.func.vmap(drop, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(drop, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("activation", [*tridrop.spec.elementwise.ACTIVATIONS])
def test_first_and_second_derivatives(activation):
    """Against finite differences, in fp64; the inputs keep clear of relu's kink."""
    gated = tridrop.spec.elementwise.ACTIVATIONS[activation][1]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        t = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (t + 0.2 * t.sign()).to(DEVICE).requires_grad_()

    x, bias = draw(3, 8), (0.1 * draw(8)).detach().requires_grad_()
    cols = 4 if gated else 8
    gain, residual = draw(cols), draw(3, cols)

    def call(x, bias, gain, residual):
        with tridrop.backend("reference"):
            return tridrop.dropout_add(
                x,
                residual,
                0.3,
                bias=bias,
                layer_scale=gain,
                drop_path=0.3,
                activation=activation,
                seed=3,
            )

    inputs = (x, bias, gain, residual)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_second_derivatives_of_backends_agree(activation):
    results = []
    for name in BACKENDS:
        x, residual, bias = operands()
        shape = tridrop.spec.elementwise.output_shape(x, activation)
        residual = residual[..., : shape[-1]].clone().requires_grad_()
        with tridrop.backend(name):
            out = tridrop.dropout_add(
                x, residual, 0.3, bias=bias, activation=activation, drop_path=0.3, seed=5
            )
            (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(dx.square().sum(), (x, bias, residual)))
    assert_same(*results)


# ----------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(backend, use_reentrant):
    def recomputed(x, residual, bias):
        return checkpoint(both, x, residual, bias, use_reentrant=use_reentrant)

    assert_same(outcome(recomputed), outcome(both))


def test_checkpoint_inside_compile():
    @torch.compile(fullgraph=True)
    def recomputed(x, residual, bias):
        return checkpoint(both, x, residual, bias, use_reentrant=False)

    assert_same(outcome(recomputed), outcome(both))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_explicit_seeds_need_no_restored_generator(use_reentrant):
    seed = tridrop.new_seed(DEVICE)

    def recomputed(x, residual, bias):
        return checkpoint(
            both, x, residual, bias, seed, use_reentrant=use_reentrant, preserve_rng_state=False
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(outcome(recomputed), outcome(both, seed))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_draw_without_restored_generator_warns_once(monkeypatch, use_reentrant):
    def recomputed(x, residual, bias):
        return checkpoint(
            both, x, residual, bias, use_reentrant=use_reentrant, preserve_rng_state=False
        )

    monkeypatch.setattr(seeds._state, "warned_of_generator", False)
    with pytest.warns(UserWarning, match="preserve_rng_state=False"):
        outcome(recomputed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*preserve_rng_state")
        outcome(recomputed)


# ------------------------------------------------------------------------------ torch's habits


def test_autocast_leaves_the_residual_stream_alone():
    linear = torch.nn.Linear(24, 24, device=DEVICE)
    x, residual, _ = operands()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        branch = torch.nn.functional.linear(x, linear.weight)
        assert branch.dtype == torch.bfloat16
        with tridrop.backend("reference"):
            out = tridrop.dropout_add(branch, residual, 0.5, bias=linear.bias, seed=1)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert linear.bias.grad.dtype == torch.float32
    keep = tridrop.keep_mask(1, out.shape, 0.5, device=DEVICE)
    expected = torch.where(keep, (branch.float() + linear.bias) * 2, 0) + residual
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_can_be_copied_and_pickled(make):
    model = torch.nn.Sequential(
        tridrop.nn.Dropout(0.3, noise_shape=(None, 1, None)),
        tridrop.nn.DropPath(0.2),
        tridrop.nn.ActivationDropout("relu", 0.4),
        tridrop.nn.TransformerBlock(16, 2, p=0.3, drop_path=0.1),
    ).to(DEVICE)
    tridrop.nn.number_sites(model)
    x = torch.randn(3, 5, 16, device=DEVICE)
    with tridrop.rng(1):
        expected = model(x)
    with tridrop.rng(1):
        assert torch.equal(make(model)(x), expected)


def test_a_changed_saved_tensor_is_caught():
    x, residual, bias = operands()
    hidden = x * 1
    out = both(hidden, residual, bias, tridrop.new_seed(DEVICE))
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_changed_seed_or_rate_is_caught():
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    seed, p = tridrop.new_seed(DEVICE), torch.tensor(0.5, device=DEVICE)
    for changed in (seed, p):
        out = tridrop.dropout(x, p, seed=seed)
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_no_mask_and_no_copy_is_saved():
    x, residual, bias = operands()
    saved: list[Tensor] = []

    def note(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        tridrop.dropout(x, 0.5)
        tridrop.dropout_add(x, residual, 0.5, bias=bias, drop_path=0.2)
    assert all(t.nbytes == 16 for t in saved)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        tridrop.activation_dropout(x, 0.5, activation="gelu", bias=bias)
    assert {t.data_ptr() for t in saved if t.nbytes > 16} == {x.data_ptr(), bias.data_ptr()}


def test_the_residual_gets_the_incoming_gradient_itself():
    x, residual, _ = operands()
    residual.requires_grad_()
    out = tridrop.dropout_add(x, residual, 0.5, seed=1)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, residual, grad)
    assert found.data_ptr() == grad.data_ptr()
