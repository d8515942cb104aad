"""DropConnect: masks of weights, what is kept for backward, and modules of any kind."""

import contextlib
import copy
import functools
import inspect
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tridrop
from tridrop.commands.check.measure import MAX_Z
from tridrop.functional import dropconnect as functional
from tridrop.nn.dropconnect import WeightDropped


@pytest.fixture(params=[PLAIN, "triton"])
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()


def dropped(weight, p, seed):
    keep = tridrop.keep_mask(seed, weight.shape, p, device=weight.device)
    return torch.where(keep, weight / (1 - p) if p < 1 else weight, 0)


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,), (70, 40), (0, 40)])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_it_is_a_linear_layer_with_dropped_weights(backend, shape, p):
    """Up to 64 rows the kernel applies the mask as it loads the weight."""
    x, weight, bias = draw(*shape), draw(12, 40), draw(12)
    found = tridrop.dropconnect_linear(x, weight, bias, p, seed=3)
    expected = F.linear(x, dropped(weight, p, 3), bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_without_dropout_it_is_torchs_and_draws_nothing(backend):
    x, weight, bias = draw(5, 40), draw(12, 40), draw(12)
    state = torch.get_rng_state()
    for p, training in ((0.0, True), (0.7, False)):
        out = tridrop.dropconnect_linear(x, weight, bias, p, training)
        assert torch.equal(out, F.linear(x, weight, bias))
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def dropped_weights(monkeypatch):
    """Weak references to the dropped weights that are made."""
    seen = []

    draw = functional._draw

    def watched(*arguments, **options):
        found = draw(*arguments, **options)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(functional, "_draw", watched)
    return seen


@pytest.mark.parametrize("rows", [3, 200])
def test_no_dropped_weight_lives_on_between_forward_and_backward(backend, rows, dropped_weights):
    x, weight = draw(rows, 40), draw(64, 40)
    out = tridrop.dropconnect_linear(x, weight, None, 0.5, seed=1)
    fused = backend == "triton" and rows <= functional.FUSED_ROWS
    assert [ref() for ref in dropped_weights] == ([] if fused else [None])
    expected = F.linear(x, dropped(weight, 0.5, 1))
    grads = torch.autograd.grad(out.sum(), (x, weight))
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 100])
def test_autocast_keeps_no_dropped_weight_either(rows, dropped_weights):
    x, weight, bias = draw(rows, 40), draw(12, 40), draw(12)
    with torch.autocast(DEVICE, torch.bfloat16), tridrop.backend("reference"):
        out = tridrop.dropconnect_linear(x, weight, bias, 0.5, seed=1)
    assert out.dtype == torch.bfloat16
    assert [ref() for ref in dropped_weights] == [None]
    narrow = dropped(weight.bfloat16(), 0.5, 1)
    expected = F.linear(x.bfloat16(), narrow, bias.bfloat16())
    torch.testing.assert_close(out, expected)
    given = torch.autograd.grad(out.float().sum(), (x, weight, bias))
    wanted = torch.autograd.grad(expected.float().sum(), (x, weight, bias))
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_weight_changed_before_backward_raises():
    weight = draw(64, 40)
    with tridrop.backend("reference"):
        out = tridrop.dropconnect_linear(draw(100, 40), weight, None, 0.5, seed=1)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


MODULES = {
    "Linear": (lambda: nn.Linear(6, 5), (4, 6), "weight"),
    "Conv1d": (lambda: nn.Conv1d(6, 5, 3), (2, 6, 9), "weight"),
    "Conv2d": (lambda: nn.Conv2d(6, 5, 3, stride=2), (2, 6, 9, 9), "weight"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 5, 3), (2, 6, 5, 5), "weight"),
    "LSTM": (lambda: nn.LSTM(6, 5, 2), (7, 3, 6), "weight_hh_l0"),
    "GRU": (lambda: nn.GRU(6, 5, bidirectional=True), (7, 3, 6), "weight_hh_l0_reverse"),
    "LSTMCell": (lambda: nn.LSTMCell(6, 5), (3, 6), "weight_hh"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2), (7, 3, 6), "in_proj_weight"),
}


def run(module, x):
    out = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", MODULES)
def test_any_module_has_the_mask_of_its_weight(kind, dropped_weights):
    make, shape, name = MODULES[kind]
    torch.manual_seed(0)
    plain = make().to(DEVICE)
    module = tridrop.nn.weight_drop(copy.deepcopy(plain), name, 0.4)
    tridrop.nn.number_sites(module)
    x = draw(*shape)
    with tridrop.rng(5):
        found = run(module, x)
    assert [ref() for ref in dropped_weights] == [None]
    (site,) = (m for m in module.modules() if isinstance(m, WeightDropped))
    seed = tridrop.fold_in(5, site.site).to(DEVICE)
    keep = tridrop.keep_mask(seed, getattr(plain, name).shape, 0.4, device=DEVICE)
    with torch.no_grad():
        getattr(plain, name).copy_(dropped(getattr(plain, name), 0.4, seed))
    expected = run(plain, x)
    torch.testing.assert_close(found, expected)
    originals = [module.parametrizations[name].original, x]
    given = torch.autograd.grad(found.square().sum(), originals)
    wanted = torch.autograd.grad(expected.square().sum(), (getattr(plain, name), x))
    torch.testing.assert_close(given[0], torch.where(keep, wanted[0] / 0.6, 0))
    torch.testing.assert_close(given[1], wanted[1])
    assert 0 < int(keep.sum()) < keep.numel()


def lstm(p=0.5):
    torch.manual_seed(0)
    return tridrop.nn.weight_drop(nn.LSTM(6, 5), ["weight_hh_l0", "weight_ih_l0"], p).to(DEVICE)


def test_outside_a_call_and_in_evaluation_weights_are_themselves():
    module = lstm()
    weight = module.parametrizations.weight_hh_l0.original
    assert module.weight_hh_l0 is weight
    run(module, draw(4, 2, 6))
    assert module.weight_hh_l0 is weight
    x = draw(4, 2, 6)
    plain = tridrop.nn.remove_weight_drop(lstm())
    assert type(plain) is nn.LSTM
    assert sorted(dict(plain.named_parameters())) == sorted(dict(nn.LSTM(6, 5).named_parameters()))
    assert torch.equal(run(module.eval(), x), run(plain, x))
    assert not torch.equal(run(module.train(), x), run(plain, x))
    assert not plain._forward_hooks
    assert not plain._forward_pre_hooks


def test_a_call_that_raises_leaves_nothing_behind(dropped_weights):
    module = lstm()
    with pytest.raises(RuntimeError):
        module(torch.ones(4, 2, 7, device=DEVICE))
    assert module.weight_hh_l0 is module.parametrizations.weight_hh_l0.original
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert run(module, draw(4, 2, 6)).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
def test_a_recomputation_has_the_masks_of_its_forward(reentrant, ranged):
    module = nn.Sequential(tridrop.nn.DropConnectLinear(6, 6), lstm()).to(DEVICE)
    tridrop.nn.number_sites(module)
    x = draw(4, 2, 6)

    def gradients(call):
        torch.manual_seed(3)
        module.zero_grad()
        if ranged:
            with tridrop.rng(4):
                call().square().sum().backward()
        else:
            call().square().sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    plain = gradients(lambda: module(x)[0])
    again = gradients(lambda: checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant))
    # Some processors round a product by where its operands lie; another mask differs by far more.
    torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_around_keeps_what_it_would_keep():
    """Other saved tensors go to its hooks: the layer's input is not kept."""
    layer = tridrop.nn.DropConnectLinear(64, 64).to(DEVICE)
    alive = []

    def call(x):
        hidden = x * 2
        alive.append(weakref.ref(hidden))
        return layer(hidden)

    out = checkpoint(call, draw(100, 64), use_reentrant=False)
    assert alive[0]() is None
    out.sum().backward()
    assert layer.weight.grad is not None


def test_it_compiles_without_a_graph_break():
    layer = tridrop.nn.DropConnectLinear(6, 5).to(DEVICE)
    tridrop.nn.number_sites(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = draw(100, 6)
    results = []
    for call in (layer, compiled):
        with tridrop.rng(2):
            out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    inputs = [draw(*shape).double().detach().requires_grad_() for shape in ((4, 6), (3, 6), (3,))]

    def call(x, weight, bias):
        return tridrop.dropconnect_linear(x, weight, bias, 0.4, seed=1)

    with tridrop.backend("reference"):
        torch.autograd.gradcheck(call, inputs)
        torch.autograd.gradgradcheck(call, inputs)


def test_the_expected_value_is_the_layer_without_dropout():
    x, weight = draw(4, 40).detach(), draw(12, 40).detach()
    plain = F.linear(x, weight)
    outs = torch.stack(
        [tridrop.dropconnect_linear(x, weight, None, 0.3, seed=s) for s in range(400)]
    )
    z = (outs.mean(0) - plain).abs() / (outs.std(0) / 20)
    assert float(z.max()) < MAX_Z


def test_monte_carlo_dropout_sees_it():
    model = nn.Sequential(tridrop.nn.DropConnectLinear(6, 6), lstm()).to(DEVICE).eval()
    x = draw(4, 2, 6)
    with tridrop.mc_dropout(model):
        a, b = run(model, x), run(model, x)
    assert not torch.equal(a, b)
    assert torch.equal(run(model, x), run(model, x))


BAD = {
    "no such name": (lambda: tridrop.nn.weight_drop(nn.Linear(2, 2), "wait"), "weight, bias"),
    "twice": (lambda: tridrop.nn.weight_drop(lstm(), "weight_hh_l0"), "already"),
    "p": (lambda: tridrop.nn.weight_drop(nn.Linear(2, 2), "weight", 2.0), "2.0"),
    "features": (
        lambda: tridrop.dropconnect_linear(torch.ones(2, 3), torch.ones(2, 4)), r"\[any, 3\]",
    ),
    "a scalar": (lambda: tridrop.dropconnect_linear(torch.ones(()), torch.ones(2, 4)), "scalar"),
    "a bias": (
        lambda: tridrop.dropconnect_linear(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)),
        "bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_types_raise():
    with pytest.raises(TypeError, match="float16"):
        tridrop.dropconnect_linear(torch.ones(2, 3), torch.ones(2, 3).half())
    with pytest.raises(TypeError, match="strings"):
        tridrop.nn.weight_drop(nn.Linear(2, 2), [1])


# ------------------------------------------------- parameters that are read past their module


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, tridrop.nn.MultiheadAttention])
def test_out_proj_is_refused(cls):
    """Attention reads its weight and never calls it."""
    attention = cls(8, 2)
    with pytest.raises(ValueError, match="reads its parameters and never calls it"):
        tridrop.nn.weight_drop(attention.out_proj, "weight", 0.5)
    x = torch.randn(4, 3, 8)
    expected = attention.train()(x, x, x)[0]
    assert "weight" in dict(attention.out_proj.named_parameters())
    tridrop.nn.weight_drop(attention, "in_proj_weight", 0.5)
    assert not torch.equal(attention(x, x, x)[0], expected)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_a_parent_that_reads_is_warned_of():
    model = Reader()
    tridrop.nn.weight_drop(model.inner, "weight", 0.5)
    x = torch.ones(2, 4)
    model(x)
    model(x)
    with pytest.warns(UserWarning, match="its module is not called"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # once


def test_reading_beside_calls_is_not_warned_of():
    """As T5 reads a dtype, or a head an embedding's weight."""
    layer = tridrop.nn.weight_drop(nn.Linear(4, 4), "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            assert layer.weight.dtype == torch.float32
            layer(torch.ones(2, 4))
        layer = tridrop.nn.weight_drop(nn.Linear(4, 4), "weight", 0.5).eval()
        for _ in range(9):
            assert layer.weight.dtype == torch.float32


# Of a selective checkpoint, from torch 2.14 on: whether a user's hooks get what it keeps.
ASKED = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
SETTINGS = [{}, *({"respect_saved_tensors_hooks": answer} for answer in (True, False) if ASKED)]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_hooks_of_dropped_weights_are_no_users_to_selective_checkpoints(given):
    """These would warn of a user's hooks, or hand them what they keep."""
    model = nn.Sequential(tridrop.nn.DropConnectLinear(6, 6), nn.Tanh(), lstm()).to(DEVICE)
    aten = torch.ops.aten
    products = (aten.linear.default, aten.mm.default, aten.addmm.default)  # seen by one of these

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy[("PREFER_RECOMPUTE", "MUST_SAVE")[op in products]]

    def gradients(run, seen=None):
        def pack(t):
            seen.append(t)
            return t

        x = torch.ones(3, 4, 6, device=DEVICE, requires_grad=True)
        with tridrop.rng(7):
            with contextlib.ExitStack() as stack:
                if seen is not None:
                    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
                    stack.enter_context(hooks)
                out, _ = run(x)
            out.square().sum().backward()
        found = [x.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return found

    def recomputed(**given):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return functools.partial(
            checkpoint, model, use_reentrant=False, context_fn=contexts, **given
        )

    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(torch.equal, gradients(recomputed(**given)), expected))
    counts = []
    for asked in SETTINGS[1:]:  # a user's own, around the checkpoint, are found behind them
        seen = []
        assert all(map(torch.equal, gradients(recomputed(**asked), seen), expected))
        counts.append(len(seen))
    assert not counts or counts[0] > counts[1]
