"""Linear layers whose input is made again: values, gradients, bytes kept, and odd company."""

import contextlib
import gc
import math
import pickle
import threading
import weakref
from decimal import Decimal
from functools import partial

import pytest
import torch
from hosts import DEVICE
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop import backends
from tridrop.functional.linear import (
    linear,
    of_remade,
    remade_activation,
    remade_add_norm,
    remade_dropout,
    remade_layer_norm,
    remade_product,
    remade_rms_norm,
    remade_value,
)
from tridrop.ops.remade import recipe_of
from tridrop.spec.elementwise import ACTIVATIONS

ROWS, WIDTH, OUT = 24, 32, 16


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def ones(size):
    return torch.linspace(0.5, 1.5, size, device=DEVICE).requires_grad_()


def kept(function):
    """What a forward returns, and the bytes of the storages that it keeps, leaves left out."""
    held = []

    def pack(t):
        held.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return out, sizes


def compare(found, expected, leaves):
    """Results and gradients of two functions, each called here. (A library's matrix products differ
    in their last bits from call to call, by the threads that it finds free.)"""
    outcomes = []
    for function in (found, expected):
        out = function()
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((t.float() * torch.linspace(-1, 1, t.numel(), device=DEVICE).view_as(t)).sum()
                   for t in outs)  # fmt: skip
        outcomes.append([*outs, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


NAMES = [name for name in ACTIVATIONS if name != "none"]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", NAMES)
def test_activation_dropout_linear_is_its_parts(activation, p, backend):
    x, bias, last = draw(3, ROWS, 2 * WIDTH), ones(2 * WIDTH), draw(OUT)
    weight = draw(OUT, WIDTH if ACTIVATIONS[activation][1] else 2 * WIDTH)
    options = {"activation": activation, "bias": bias, "seed": 5}
    compare(
        lambda: tridrop.activation_dropout_linear(x, weight, last, p, **options),
        lambda: F.linear(tridrop.activation_dropout(x, p, **options), weight, last),
        (x, weight, bias, last),
    )


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_linear_is_its_parts(norm, dtype, backend):
    x, gain, shift = draw(3, ROWS, WIDTH, dtype=dtype), ones(WIDTH).detach().to(dtype), None
    gain.requires_grad_()
    weights = [draw(OUT, WIDTH, dtype=dtype, seed=i) for i in range(3)]
    biases = [draw(OUT, dtype=dtype), None, draw(OUT, dtype=dtype, seed=1)]
    leaves = [x, gain, *weights, biases[0], biases[2]]
    if norm == "layer_norm":
        shift = draw(WIDTH, dtype=dtype)
        leaves.append(shift)

    def parts():
        if norm == "layer_norm":
            normed = F.layer_norm(x, (WIDTH,), gain, shift, 1e-5)
        else:
            normed = tridrop.rms_norm_dropout(x, gain, 0.0, eps=1e-5)
        return tuple(F.linear(normed, w, b) for w, b in zip(weights, biases, strict=True))

    options = {"norm": norm, "weight": gain, "norm_bias": shift}
    compare(lambda: tridrop.norm_linear(x, weights, biases, **options), parts, leaves)
    one = tridrop.norm_linear(x, weights[0], biases[0], **options)
    torch.testing.assert_close(one, parts()[0])


def test_rms_norm_agrees_with_torchs():
    x, gain, weight = draw(ROWS, WIDTH), ones(WIDTH), draw(OUT, WIDTH)
    compare(
        lambda: tridrop.norm_linear(x, weight, norm="rms_norm", weight=gain, eps=1e-6),
        lambda: F.linear(F.rms_norm(x, (WIDTH,), gain, 1e-6), weight),
        (x, gain, weight),
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept(autocast):
    """x, the weights and a few numbers; nothing of the layers' input."""
    x, weights, gain = draw(ROWS, WIDTH), [draw(OUT, WIDTH, seed=i) for i in range(3)], ones(WIDTH)
    size = ROWS * WIDTH * 4

    def beyond(sizes):
        own = {t.untyped_storage().data_ptr() for t in (x, gain, *weights)}
        casts = 3 * OUT * WIDTH * 2 if autocast else 0
        return sum(n for at, n in sizes.items() if at not in own) - casts

    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        _, sizes = kept(lambda: tridrop.norm_linear(x, weights, weight=gain))
        assert beyond(sizes) <= 2 * ROWS * 4
        _, sizes = kept(lambda: tridrop.norm_linear(x, weights, norm="rms_norm", weight=gain))
        assert beyond(sizes) <= 2 * ROWS * 4
        if autocast:
            weights = weights[:1]
        casts = OUT * WIDTH * 2 if autocast else 0
        _, sizes = kept(
            lambda: tridrop.activation_dropout_linear(
                x, weights[0], p=0.5, activation="gelu", seed=torch.tensor([1, 2])
            )
        )
        own = {t.untyped_storage().data_ptr() for t in (x, *weights)}
        assert sum(n for at, n in sizes.items() if at not in own) <= 16 + casts
    assert size > 8 * ROWS * 4


def test_frozen_weights_keep_nothing():
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH).detach()
    _, sizes = kept(lambda: tridrop.activation_dropout_linear(x, weight, p=0.0, activation="gelu"))
    own = {t.untyped_storage().data_ptr() for t in (x, weight)}
    assert set(sizes) <= own
    _, sizes = kept(
        lambda: tridrop.activation_dropout_linear(x.detach(), weight, p=0.5, activation="gelu")
    )
    assert not sizes
    # An input without a gradient is kept by nobody else: the layer keeps its own input.
    trained = draw(OUT, WIDTH)
    _, sizes = kept(
        lambda: tridrop.activation_dropout_linear(x.detach(), trained, p=0.5, activation="gelu")
    )
    assert list(sizes.values()) == [x.nbytes]


def test_autocast():
    x, weight, gain = draw(ROWS, WIDTH), draw(OUT, WIDTH), ones(WIDTH)
    weights = [weight, draw(OUT, WIDTH, seed=1)]

    def cast(function):
        def run():
            with torch.autocast(DEVICE, torch.bfloat16):
                return function()

        return run

    compare(
        cast(lambda: tridrop.norm_linear(x, weights, weight=gain)),
        cast(lambda: tuple(F.linear(F.layer_norm(x, (WIDTH,), gain), w) for w in weights)),
        (x, gain, *weights),
    )
    hidden = partial(tridrop.activation_dropout, x, 0.3, activation="gelu", seed=2)
    compare(
        cast(lambda: tridrop.activation_dropout_linear(
            x, weight, p=0.3, activation="gelu", seed=2)),
        cast(lambda: F.linear(hidden(), weight)),
        (x, weight),
    )  # fmt: skip


def test_a_gate_is_made_again_from_both_factors():
    gate, up, weight = draw(ROWS, WIDTH), draw(ROWS, WIDTH, seed=1), draw(OUT, WIDTH)

    def remade():
        return linear(remade_product(remade_value(F.silu, gate), up), weight)

    compare(remade, lambda: F.linear(F.silu(gate) * up, weight), (gate, up, weight))
    _, sizes = kept(remade)
    assert set(sizes) == {t.untyped_storage().data_ptr() for t in (gate, up, weight)}
    made = []

    def again(x):
        made.append(None)
        return F.silu(x)

    linear(remade_product(remade_value(F.silu, gate, recompute=again), up), weight).sum().backward()
    assert len(made) == 1  # for the product, and for its own backward
    other = up.detach()  # nobody else would keep it
    _, sizes = kept(lambda: linear(remade_product(remade_value(F.silu, gate), other), weight))
    assert sum(sizes.values()) == gate.nbytes + other.nbytes + weight.nbytes + gate.nbytes


def test_a_dropout_of_what_is_remade_is_remade():
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)

    def remade():
        return linear(remade_dropout(remade_value(F.silu, x), 0.4, 9), weight)

    compare(remade, lambda: F.linear(tridrop.dropout(F.silu(x), 0.4, seed=9), weight), (x, weight))
    _, sizes = kept(remade)
    assert sum(sizes.values()) <= x.nbytes + weight.nbytes + 32


@pytest.mark.parametrize("p", [0.4, "tensor"])
def test_drawn_seeds_slices_and_rates_in_tensors_are_those_of_the_forward(p):
    x, weight = draw(6, WIDTH), draw(OUT, WIDTH)
    if p == "tensor":
        p = torch.tensor(0.4, dtype=torch.float64, device=DEVICE)
    with tridrop.rng(3), tridrop.distributed.batch_slice(4, 6):
        out = tridrop.activation_dropout_linear(x, weight, p=p, activation="gelu")
    with tridrop.rng(3), tridrop.distributed.batch_slice(4, 6):
        expected = F.linear(tridrop.activation_dropout(x, p, activation="gelu"), weight)
    torch.manual_seed(8)
    drawn = tridrop.activation_dropout_linear(x, weight, p=p, activation="gelu")
    torch.manual_seed(8)
    twin = F.linear(tridrop.activation_dropout(x, p, activation="gelu"), weight)
    for a, b in ((out, expected), (drawn, twin)):
        torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(t.sum(), (x, weight)) for t in (a, b)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["activation", "norm"])
def test_second_derivatives(kind):
    x, weight = draw(5, 8).double().detach().requires_grad_(), draw(4, 8).double().detach()
    weight.requires_grad_()
    if kind == "activation":
        options = {"p": 0.3, "activation": "gelu_tanh", "seed": 1}
        found = partial(tridrop.activation_dropout_linear, x, weight, **options)
        expected = lambda: F.linear(tridrop.activation_dropout(x, **options), weight)  # noqa: E731
    else:
        found = partial(tridrop.norm_linear, x, weight)
        expected = lambda: F.linear(F.layer_norm(x, (8,)), weight)  # noqa: E731
    outcomes = []
    for function in (found, expected):
        first = torch.autograd.grad(function().pow(3).sum(), (x, weight), create_graph=True)
        loss = sum((g**2).sum() for g in first)
        outcomes.append(torch.autograd.grad(loss, (x, weight)))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_backward_twice_and_parts_of_it():
    x, weights = draw(ROWS, WIDTH), [draw(OUT, WIDTH, seed=i) for i in range(3)]
    outs = tridrop.norm_linear(x, weights)
    loss = sum(t.square().sum() for t in outs)
    first = torch.autograd.grad(loss, (x, *weights), retain_graph=True)
    part = torch.autograd.grad(loss, weights[1], retain_graph=True)
    second = torch.autograd.grad(loss, (x, *weights))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(part[0], first[2])


def test_it_is_made_once_for_all_layers_and_forgotten():
    x, weights, made = draw(ROWS, WIDTH), [draw(OUT, WIDTH, seed=i) for i in range(3)], []

    def again(x):
        made.append(F.silu(x))
        return made[-1]

    hidden = remade_value(F.silu, x, recompute=again)
    outs = [linear(hidden, w) for w in weights]
    seen = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert seen() is None
    sum(t.sum() for t in outs).backward()
    assert len(made) == 1
    seen = weakref.ref(made.pop())
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_nothing_of_it(reentrant):
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)
    hiddens = []

    def part(x):
        wide = x * 2.0
        hiddens.append(weakref.ref(wide))
        out = tridrop.activation_dropout_linear(wide, weight, p=0.3, activation="gelu", seed=4)
        return out + linear(remade_layer_norm(wide, None, None, 1e-5), weight)

    expected = part(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, weight))
    hiddens.clear()
    out = checkpoint(part, x, use_reentrant=reentrant)
    gc.collect()
    assert [ref() for ref in hiddens] == [None]
    out.square().sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), gradients)


def test_hooks_around_it_see_what_it_takes():
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)
    with torch.autograd.graph.save_on_cpu():
        out = tridrop.activation_dropout_linear(x, weight, p=0.3, activation="gelu", seed=4)
    plain = tridrop.activation_dropout_linear(x, weight, p=0.3, activation="gelu", seed=4)
    torch.testing.assert_close(
        *(torch.autograd.grad(t.square().sum(), (x, weight)) for t in (out, plain))
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:2] if t.dim() else t):
        out = linear(remade_value(F.silu, x), weight)
    with pytest.raises((ValueError, RuntimeError)):
        out.sum().backward()


def test_what_is_written_to_is_an_error_or_kept():
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)
    wide = x * 1.0
    out = tridrop.activation_dropout_linear(wide, weight, p=0.3, activation="gelu", seed=4)
    with torch.no_grad():
        wide += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()
    # A result that was written to is no longer what its recipe makes: the layer keeps it.
    hidden = remade_value(F.silu, x)
    hidden += 1
    compare(lambda: linear(hidden, weight), lambda: F.linear(F.silu(x) + 1, weight), (weight,))


def test_vmap_and_func_grad():
    x, weight = draw(4, 5, WIDTH).detach(), draw(OUT, WIDTH).detach()

    def call(x, weight):
        out = tridrop.activation_dropout_linear(x, weight, p=0.3, activation="gelu", seed=4)
        return out + tridrop.norm_linear(x, weight)

    found = torch.vmap(call, (0, None))(x, weight)
    torch.testing.assert_close(found, torch.stack([call(each, weight) for each in x]))
    grads = torch.func.grad(lambda w: call(x[0], w).square().sum())(weight)
    w = weight.clone().requires_grad_()
    call(x[0], w).square().sum().backward()
    torch.testing.assert_close(grads, w.grad)


def test_a_tensor_with_a_recipe_is_pickled_and_viewed_like_any_other():
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)
    hidden = remade_value(F.silu, x)
    assert torch.equal(pickle.loads(pickle.dumps(hidden)), hidden)
    call = partial(F.linear, weight=weight)
    compare(
        lambda: of_remade(lambda h: call(h.view(2, -1, WIDTH)[1].T.T), remade_value(F.silu, x)),
        lambda: call(F.silu(x).view(2, -1, WIDTH)[1]),
        (x, weight),
    )


def test_layers_with_adapters_and_of_other_kinds():
    """Whatever saves the tensor in the call keeps its recipe."""
    x, weight, A = draw(ROWS, WIDTH), draw(OUT, WIDTH).detach(), draw(4, WIDTH)
    B = draw(OUT, 4)

    def layer(h):
        return F.linear(h, weight) + tridrop.lora_delta(h, A, B, 0.2, seed=3)

    def remade():
        return of_remade(layer, remade_value(F.silu, x))

    compare(remade, lambda: layer(F.silu(x)), (x, A, B))
    _, sizes = kept(remade)
    hidden = ROWS * WIDTH * 4
    assert sum(sizes.values()) < 2 * hidden + weight.nbytes + A.nbytes + B.nbytes


ERRORS = {
    "a weight that does not fit": (lambda x: (x, torch.ones(3, 5)), {}, "weight"),
    "a bias that does not fit": (lambda x: (x, torch.ones(3, 8), torch.ones(2)), {}, "linear_bias"),
    "another dtype": (lambda x: (x, torch.ones(3, 8).half()), {}, "dtype|float16"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_named(name):
    arguments, options, message = ERRORS[name]
    given = arguments(torch.ones(2, 8))
    with pytest.raises((ValueError, TypeError), match=message):
        tridrop.activation_dropout_linear(*given, p=0.5, activation="gelu", **options)
    with pytest.raises((ValueError, TypeError), match=message):
        tridrop.norm_linear(*given, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch_norm"}, "layer_norm"),
        ({"norm": "rms_norm", "norm_bias": torch.ones(8)}, "no norm_bias"),
        ({"zero_centered_weight": True}, "rms_norm"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_a_norm_that_there_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        tridrop.norm_linear(torch.ones(2, 8), torch.ones(3, 8), **options)
    with pytest.raises(ValueError, match="2 weights and 1"):
        tridrop.norm_linear(torch.ones(2, 8), [torch.ones(3, 8)] * 2, [None])


def test_modules_of_a_block_keep_their_results_recipes():
    torch.manual_seed(0)
    block = tridrop.nn.TransformerBlock(WIDTH, 4, p=0.1, activation_p=0.2, remake=True).to(DEVICE)
    twin = tridrop.nn.TransformerBlock(WIDTH, 4, p=0.1, activation_p=0.2).to(DEVICE)
    twin.load_state_dict(block.state_dict())
    tridrop.nn.number_sites(block)
    tridrop.nn.number_sites(twin)
    x = draw(2, 12, WIDTH)
    outcomes = []
    for module in (block, twin):
        with tridrop.rng(4):
            out = module(x)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))])
    torch.testing.assert_close(*outcomes)
    assert isinstance(block.norm1, nn.LayerNorm)


REMADE = {
    "a function": lambda x: remade_value(F.silu, x),
    "layer_norm": lambda x: remade_layer_norm(x, None, None, 1e-5),
    "rms_norm": lambda x: remade_rms_norm(x, None, 1e-6),
    "activation": lambda x: remade_activation(x, 0.2, False, activation="silu"),
    "dropped": lambda x: remade_activation(x, 0.2, True, activation="gelu", seed=2),
    "gated": lambda x: remade_activation(x, 0.2, True, activation="swiglu"),
    "add, norm": lambda x: remade_add_norm(
        tridrop.dropout_add_layer_norm, x, x * 2, None, None, 0.2, eps=1e-5)[0],
    "add, norm, wide": lambda x: remade_add_norm(
        tridrop.dropout_add_rms_norm, x, x.bfloat16(), None, None, 0.2, eps=1e-5, seed=1,
        drop_path=0.4)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", REMADE)
def test_what_is_made_again_is_the_tensor_to_the_bit(name, backend):
    hidden = REMADE[name](draw(ROWS, WIDTH))
    recipe = recipe_of(hidden)
    with torch.no_grad():
        again = recipe.maker.make(*recipe.kept())
    assert torch.equal(hidden, again)
    assert again.dtype == hidden.dtype


# ------------------------------------------------------------- what else happens around a layer


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, h):
        return self.fc(h)


@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)])
@pytest.mark.parametrize("around", ["nothing", "a checkpoint", "save_on_cpu"])
def test_a_checkpoint_inside_of_other_hooks_saves_what_it_recomputes(shape, around):
    """A recomputation gets the activation from the hooks around, without a recipe."""
    torch.manual_seed(0)
    up, inner = nn.Linear(8, 16), Inner()

    def run(activation, call):
        def forward(x):
            return checkpoint(call, activation(up(x)), use_reentrant=False)

        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
        with save_on_cpu() if around == "save_on_cpu" else contextlib.nullcontext():
            if around == "a checkpoint":
                out = checkpoint(forward, x, use_reentrant=False)
            else:
                out = forward(x)
        return torch.autograd.grad(out.square().sum(), [x, up.weight, inner.fc.weight])

    found = []
    for activation, call in (
        (F.gelu, inner),
        (partial(remade_value, F.gelu), lambda h: linear(h, inner.fc.weight, inner.fc.bias)),
    ):
        found.append(run(activation, call))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def gradients(call, *leaves):
    x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
    return torch.autograd.grad(call(x).square().sum(), [x, *leaves])


def test_a_layer_that_writes_to_its_input_saves_what_it_wrote():
    weight = torch.randn(4, 8, requires_grad=True)

    def layer(h):
        h.mul_(2)
        return h @ weight.T

    expected = gradients(lambda x: layer(torch.sin(x)), weight)
    found = gradients(lambda x: of_remade(layer, remade_value(torch.sin, x)), weight)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_data_that_is_replaced_has_no_recipe():
    h = remade_value(F.gelu, torch.randn(3, 8, requires_grad=True))
    assert recipe_of(h) is not None
    h.data = h.data.clamp(max=0.1)
    assert recipe_of(h) is None


def test_what_is_made_again_runs_on_the_backend_of_its_forward_in_its_thread_alone():
    weight = draw(4, 64)

    def weights(outside):
        x = torch.linspace(-2, 2, 512 * 64, device=DEVICE).view(512, 64).requires_grad_()
        out = tridrop.activation_dropout_linear(x, weight, p=0.5, activation="gelu", seed=1)
        with tridrop.backend("reference") if outside else contextlib.nullcontext():
            return torch.autograd.grad(out.sum(), [weight])[0]

    assert torch.equal(weights(False), weights(True))
    before, seen = backends.named(), []

    def look(name):
        with backends.in_this_thread(name):
            ready.wait()
            seen.append(backends.name_for(torch.device("cpu")) == name)
            ready.wait()

    ready = threading.Barrier(2)
    threads = [threading.Thread(target=look, args=(name,)) for name in ("reference", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True, True]
    assert backends.named() == before


def test_a_write_before_the_recipe_was_cast_is_seen():
    h = torch.randn(3, 8, requires_grad=True) * 1
    a = remade_value(torch.sin, h)
    with torch.no_grad():
        h.add_(1)
    weight = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(a, weight)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(out.sum(), weight)


@pytest.mark.parametrize("kind", ["sparse", "complex", "negative"])
def test_a_layer_may_save_what_is_no_plain_view(kind):
    weight = torch.randn(4, 8).to_sparse() if kind == "sparse" else torch.randn(4, 8)
    other = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)

    def layer(h):
        if kind == "sparse":
            return torch.sparse.mm(weight, h.T)
        pairs = torch.view_as_complex(h.view(3, 4, 2))
        if kind == "negative":
            return pairs.conj().imag @ other.real
        return torch.view_as_real(pairs @ other)

    leaves = [] if kind == "sparse" else [other]
    expected = gradients(lambda x: layer(torch.sin(x)), *leaves)
    found = gradients(lambda x: of_remade(layer, remade_value(torch.sin, x)), *leaves)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_a_result_with_a_recipe_is_saved_and_copied_without(tmp_path):
    x = torch.randn(3, 8, requires_grad=True)
    out = remade_layer_norm(x, None, None, 1e-5)
    assert recipe_of(out) is not None
    torch.save(out, tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), out)


def test_hooks_that_somebody_disabled_are_not_needed():
    weight = torch.randn(4, 8, requires_grad=True)
    expected = gradients(lambda x: F.linear(torch.sin(x), weight), weight)

    def call(x):
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return linear(remade_value(torch.sin, x), weight)

    for a, b in zip(expected, gradients(call, weight), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [Decimal("NaN"), Decimal("0.5"), "0.5", True, None, [0.5]])
def test_rates_are_checked_before_they_are_compared(p):
    x, weight = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    with pytest.raises(TypeError, match=r"p is .*give a number in \[0, 1\]"):
        tridrop.activation_dropout_linear(x, weight, p=p, activation="gelu")
