"""``dropout_add(gate=)``: the gated residual of diffusion transformers, beside its composition."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE
from torch.func import vmap

import tridrop
from tridrop.backends.cpu import serving
from tridrop.backends.triton import elementwise as kernels
from tridrop.backends.triton import launch
from tridrop.commands.check.measure import error, tolerance
from tridrop.contract import mask
from tridrop.spec.elementwise import Options
from tridrop.spec.operands import ElementwiseBackward

SHAPES = {"tokens": (3, 7, 40), "images": (2, 4, 5, 24), "no tokens": (5, 24), "long": (2, 300, 8)}


BACKENDS = ["reference", "triton"]
if serving._has_numba and DEVICE == "cpu":
    BACKENDS.append("cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


def operands(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        return drawn.to(DEVICE, dtype).requires_grad_()

    return draw(*shape), draw(*shape), draw(shape[0], shape[-1])


def spread(gate, shape):
    return gate.reshape(shape[0], *(1 for _ in shape[1:-1]), shape[-1])


def composed(x, residual, gate, p, keep):
    scale = 2**32 / (2**32 - round(p * 2**32))
    return residual + spread(gate, x.shape) * torch.where(keep, x * scale, torch.zeros_like(x))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_and_gradients_are_the_compositions(backend, shape, dtype):
    tensors = operands(shape, dtype)
    incoming = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    keep = tridrop.keep_mask(5, shape, 0.25, device=DEVICE)
    out = tridrop.dropout_add(*tensors[:2], 0.25, gate=tensors[2], seed=5)
    found = (out, *torch.autograd.grad(out, tensors, incoming))
    results = []
    for wide in (torch.float64, dtype):
        leaves = [t.detach().to(wide).requires_grad_() for t in tensors]
        plain = composed(*leaves, 0.25, keep)
        results.append((plain, *torch.autograd.grad(plain, leaves, incoming.to(wide))))
    for ours, exact, eager in zip(found, *results, strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) <= tolerance(eager, exact)
    assert torch.equal(found[2], incoming)  # the residual's gradient, unread


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_mask_is_that_of_dropout(backend, shape):
    """Ones show it, forward and backward; a gate of ones changes nothing, bit for bit."""
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    gate = torch.full((shape[0], shape[-1]), 2.0, device=DEVICE)
    out = tridrop.dropout_add(x, torch.zeros_like(x), 0.5, gate=gate, seed=9)
    (grad,) = torch.autograd.grad(out.sum(), x)
    dropped = tridrop.dropout(x.detach(), 0.5, seed=9)
    assert torch.equal(out, 2 * dropped)
    assert torch.equal(grad, 2 * dropped)
    drawn, residual, _ = operands(shape)
    ones = torch.ones_like(gate)
    with_ones = tridrop.dropout_add(drawn, residual, 0.5, gate=ones, seed=9)
    assert torch.equal(with_ones, tridrop.dropout_add(drawn, residual, 0.5, seed=9))
    assert torch.equal(tridrop.dropout_add(x, residual, 0.5, gate=0 * gate, seed=9), residual)


def test_a_dropped_nan_is_the_residual(backend):
    x, residual, gate = (t.detach() for t in operands((3, 5, 16)))
    keep = tridrop.keep_mask(2, (3, 5, 16), 0.5, device=DEVICE)
    x[~keep] = math.nan
    x.requires_grad_()
    out = tridrop.dropout_add(x, residual, 0.5, gate=gate.requires_grad_(), seed=2)
    assert torch.equal(out[~keep], residual[~keep])
    dx, dgate = torch.autograd.grad(out.sum(), (x, gate))
    assert (dx[~keep] == 0).all()
    assert dgate.isfinite().all()


def test_forms_of_a_gate_are_one(backend):
    """[B, C], [B, 1, C], and the strided pieces of a modulation, in any dtype."""
    x, residual, _ = operands((4, 6, 16))
    modulation = torch.randn(4, 6 * 16, device=DEVICE)
    gate = modulation.chunk(6, dim=1)[2]
    wanted = tridrop.dropout_add(x, residual, 0.3, gate=gate.clone(), seed=1)
    spreads = modulation.view(4, 6, 16).chunk(6, dim=1)[2]
    for given in (gate, gate[:, None], spreads, gate if backend == "triton" else gate.double()):
        for _ in range(2):  # and again, as a call that is known
            found = tridrop.dropout_add(x, residual, 0.3, gate=given, seed=1)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    half = gate.to(torch.bfloat16).requires_grad_()
    out = tridrop.dropout_add(x, residual, 0.3, gate=half[:, None], seed=1)
    (grad,) = torch.autograd.grad(out.sum(), half)
    assert grad.dtype == torch.bfloat16
    assert grad.shape == (4, 16)


def test_all_stages_together(backend):
    x, _, _ = operands((6, 5, 32))
    residual = torch.randn(6, 5, 16, device=DEVICE)
    bias, gate = torch.randn(32, device=DEVICE), torch.randn(6, 16, device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in (x, residual, bias, gate)]
    x, residual, bias, gate = leaves
    out = tridrop.dropout_add(
        x, residual, 0.2, bias=bias, activation="swiglu", gate=gate, drop_path=0.4, seed=3
    )
    first, second = (x + bias).chunk(2, -1)
    keep = tridrop.keep_mask(3, (6, 5, 16), 0.2, device=DEVICE)
    path = tridrop.keep_mask(3, (6, 5, 16), 0.4, domain="drop_path", device=DEVICE)
    scales = [2**32 / (2**32 - round(p * 2**32)) for p in (0.2, 0.4)]
    factor = keep * path * math.prod(scales)
    wanted = residual + factor * gate[:, None] * F.silu(first) * second
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    incoming = torch.randn_like(out)
    grads = (torch.autograd.grad(o, leaves, incoming) for o in (out, wanted))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_shard_has_its_piece_of_the_mask(backend):
    x, residual, gate = (t.detach() for t in operands((4, 6, 32)))
    whole = tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=4)
    for where in ((2, 0, 0), (0, 3, 0), (1, 2, 12)):
        part = tuple(slice(n, None) for n in where)
        shard = tridrop.Shard((4, 6, 32), where)
        piece = gate[part[0], part[2]]
        found = tridrop.dropout_add(x[part], residual[part], 0.5, gate=piece, shard=shard, seed=4)
        assert torch.equal(found, whole[part])


def test_without_dropout_or_rows(backend):
    x, residual, gate = operands((3, 7, 24))
    out = tridrop.dropout_add(x, residual, 0.5, False, gate=gate)
    assert torch.equal(out, tridrop.dropout_add(x, residual, 0.0, gate=gate))
    torch.testing.assert_close(out, residual + gate[:, None] * x)
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        x, residual, gate = operands(shape)
        out = tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=1)
        grads = torch.autograd.grad(out.sum(), (x, residual, gate))
        assert [g.shape for g in grads] == [x.shape, x.shape, gate.shape]
        assert not grads[2].any()


def test_a_rate_in_a_tensor_and_fp64():
    x, residual, gate = operands((3, 7, 24), torch.float64)
    with tridrop.backend("reference"):
        wanted = tridrop.dropout_add(x, residual, 0.25, gate=gate, seed=1)
        rate = torch.tensor(0.25, device=DEVICE)
        found = tridrop.dropout_add(x, residual, rate, gate=gate, seed=1)
    torch.testing.assert_close(found, wanted)
    keep = tridrop.keep_mask(1, x.shape, 0.25, device=DEVICE)
    torch.testing.assert_close(wanted, composed(x, residual, gate, 0.25, keep))


def test_first_and_second_derivatives():
    tensors = operands((2, 3, 4), torch.float64)

    def call(x, residual, gate):
        with tridrop.backend("reference"):
            return tridrop.dropout_add(x, residual, 0.3, activation="silu", gate=gate, seed=2)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_the_double_backward_of_both_backends_is_one(backend):
    x, residual, gate = operands((3, 5, 16))
    out = tridrop.dropout_add(x, residual, 0.3, activation="gelu", gate=gate, seed=2)
    dx, dgate = torch.autograd.grad(out.square().sum(), (x, gate), create_graph=True)
    found = torch.autograd.grad(dx.sin().sum() + dgate.cos().sum(), (x, residual, gate))
    keep = tridrop.keep_mask(2, x.shape, 0.3, device=DEVICE)
    plain = composed(F.gelu(x), residual, gate, 0.3, keep)
    dx, dgate = torch.autograd.grad(plain.square().sum(), (x, gate), create_graph=True)
    wanted = torch.autograd.grad(dx.sin().sum() + dgate.cos().sum(), (x, residual, gate))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 300, 8), (5, 4, 24), (9, 24), (3, 300, 260)], ids=str)
def test_programs_keep_to_a_sample(shape):
    """The plan covers every row once, and the partial sums of samples lie apart."""
    x, _, gate = (t.detach() for t in operands(shape))
    options, seed = Options(p=0.5), mask.as_seed(1).to(DEVICE)
    plan = launch.plan(shape, options, launch.reduction_tile, launch.strip, samples=shape[0])
    assert plan.rows * shape[0] == math.prod(shape[:-1])
    assert plan.strips % shape[0] == 0
    assert plan.strips // shape[0] * plan.strip * plan.tile.rows >= plan.rows
    assert plan.sizes(0, 0).rows == plan.rows
    grad = torch.randn(shape, device=DEVICE)
    dtypes = (None, torch.float32, torch.float32)
    with tridrop.backend("triton"):
        found = [
            kernels.backward(
                ElementwiseBackward(grad, x, layer_scale=gate, seed=seed), options, dtypes
            )
            for _ in range(2)
        ]
    for a, b in zip(*(f[1:] for f in found), strict=True):
        assert torch.equal(a, b)
    keep = tridrop.keep_mask(1, shape, 0.5, device=DEVICE)
    factors = torch.where(keep, 2.0 * grad, 0.0)
    rows = (shape[0], -1, shape[-1])
    dgate = (factors * x).double().reshape(rows).sum(1).float()
    dbias = (factors * spread(gate, shape)).double().reshape(-1, shape[-1]).sum(0).float()
    torch.testing.assert_close(found[0][2], dgate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1], dbias, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- around the call


def test_under_vmap_a_sample_has_the_mask_that_it_has_alone(backend):
    x, residual, gate = (t.detach() for t in operands((2, 3, 5, 8)))
    gate = torch.randn(3, 8, device=DEVICE)
    many = torch.randn(2, 3, 8, device=DEVICE)

    def call(x, residual, gate):
        return tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=6)

    for gates, dim in ((gate, None), (many, 0)):
        found = vmap(call, in_dims=(0, 0, dim))(x, residual, gates)
        for i in range(2):
            alone = call(x[i], residual[i], gates if dim is None else gates[i])
            assert torch.equal(found[i], alone)


def test_compiled_in_one_graph(backend):
    tensors = operands((3, 7, 16))

    def step(x, residual, gate):
        return tridrop.dropout_add(x, residual, 0.3, gate=gate[:, None], seed=4)

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    incoming = torch.randn_like(out)
    plain = step(*tensors)
    assert torch.equal(out, plain)
    grads = (torch.autograd.grad(o, tensors, incoming) for o in (out, plain))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.modulate = torch.nn.Linear(6, 16)
        self.add = tridrop.nn.DropoutAdd(0.25)

    def forward(self, x, residual, condition):
        return self.add(x, residual, gate=self.modulate(condition))


def test_a_module_in_training_autocast_and_export():
    model = Gated().to(DEVICE)
    x, residual, _ = (t.detach() for t in operands((3, 7, 16)))
    condition = torch.randn(3, 6, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), tridrop.rng(2):
        out = model(x, residual, condition)  # a gate in bf16 from the linear layer
    assert out.dtype == torch.float32
    out.sum().backward()
    assert model.modulate.weight.grad.isfinite().all()
    model.eval()
    exported = torch.export.export(model, (x, residual, condition)).module()
    wanted = residual + model.modulate(condition)[:, None] * x
    torch.testing.assert_close(exported(x, residual, condition), wanted)


def test_backward_keeps_no_mask(backend):
    x, residual, gate = operands((3, 7, 40))
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=1)
    assert sum(saved.values()) <= x.nbytes + gate.nbytes + 16


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (X, {"gate": torch.ones(4)}, ValueError,
         "gate has shape (4,); for a branch of shape (2, 3, 4) it must be (2, 4) or (2, 1, 4)"),
        (X, {"gate": torch.ones(1, 4)}, ValueError, "gate has shape (1, 4)"),
        (X, {"gate": torch.ones(2, 3, 4)}, ValueError, "gate has shape (2, 3, 4)"),
        (X, {"gate": torch.ones(6, 4)}, ValueError, "gate has shape (6, 4)"),
        (X, {"gate": torch.ones(())}, ValueError, "gate has shape ()"),
        (X[:, 0], {"gate": torch.ones(4)}, ValueError, "it must be (2, 4), one gain"),
        (X[0, 0], {"gate": torch.ones(4)}, ValueError, "gate scales samples"),
        (X, {"gate": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "gate has dtype torch.int64"),
        (X, {"gate": torch.ones(2, 4, device="meta")}, ValueError, "gate is on meta"),
        (X, {"gate": 0.5}, TypeError, "gate is of type float"),
        (X, {"gate": torch.ones(2, 4), "layer_scale": torch.ones(4)}, ValueError,
         "gate and layer_scale are both given"),
    ],
)  # fmt: skip
def test_what_is_no_gate_is_refused(x, options, kind, message):
    for _ in range(2):
        with pytest.raises(kind, match=re.escape(message)):
            tridrop.dropout_add(x, x, 0.5, seed=1, **options)
        tridrop.dropout_add(x, x, 0.5, seed=1)


@pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")
def test_on_a_cpu_the_whole_call_goes_to_the_formulas(monkeypatch):
    x, residual, gate = (t.cpu() for t in operands((3, 7, 16)))

    def unused(*_):
        raise AssertionError("a loop was called")

    for name in ("forward", "backward"):
        monkeypatch.setattr(serving.kernels(), name, unused)
    for _ in range(2):  # and a call that is known
        out = tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=1)
        torch.autograd.grad(out.sum(), (x, residual, gate))
    with pytest.raises(AssertionError, match="a loop was called"):
        tridrop.dropout_add(x, residual, 0.5, seed=1)


@pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")
def test_a_gate_without_memory_is_named():
    x, residual, gate = (t.detach().cpu() for t in operands((3, 7, 16)))
    with tridrop.backend("cpu"):
        tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=1)
        gate.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="gate"):
            tridrop.dropout_add(x, residual, 0.5, gate=gate, seed=1)
