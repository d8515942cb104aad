"""Results and gradients lie in memory as torch's do; masks know nothing of it.

Every op is compiled with static sizes for two layouts, and with dynamic ones for one of them, in
turn; for both where TRIDROP_FEATURES=all is set.
"""

import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from ranks import outcomes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import tridrop
from tridrop.base.strides import laid_out, order_of
from tridrop.functional import known

BACKENDS = ["cpu", "reference", "triton"] if PLAIN == "cpu" else ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(known, "_known", {})
    with tridrop.backend(request.param):
        yield request.param


def significant(t):
    """The strides that say something: of dimensions with more than one index."""
    return [stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1]


# -------------------------------------------------------------------------------------- the rule


def anyhow(shape, choose):
    """A tensor of any strides: permuted, with gaps, expanded."""
    dims = list(range(len(shape)))
    choose.shuffle(dims)
    steps = [choose.choice([1, 1, 1, 2]) for _ in shape]
    t = torch.zeros([shape[i] * steps[i] for i in dims]).permute(
        [dims.index(i) for i in range(len(shape))]
    )
    for i, step in enumerate(steps):
        t = t[(slice(None),) * i + (slice(None, None, step),)]
        if choose.random() < 0.1:
            t = t.narrow(i, 0, 1).expand([*t.shape[:i], shape[i], *t.shape[i + 1 :]])
    return t


def test_the_rule_is_torchs():
    choose, differ = random.Random(0), 0
    for count in [1, 2, 3] * 1500:
        shape = [choose.choice([1, 2, 2, 3, 4]) for _ in range(choose.randint(1, 5))]
        given = [anyhow(shape, choose) for _ in range(count)]
        expected = [torch.neg, torch.add, torch.addcmul][count - 1](*given)
        found = laid_out(torch.zeros(shape), order_of(*given))
        assert significant(found) == significant(expected), [t.stride() for t in given]
        differ += not found.is_contiguous()
    assert differ > 1000


# ------------------------------------------------------------------------------------- every op

SHAPE = (2, 6, 4, 10)
LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "two dimensions exchanged": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "samples inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second of a permuted one": lambda t: (
        torch.stack((t, t), 2).flatten(1, 2).transpose(0, 2).contiguous().transpose(0, 2)[:, ::2]
    ),
    "a slice of a wider one": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
}


def numbers(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


BIAS = numbers((10,))
OTHER = numbers()
# (tridrop's call, the eager one that a model would have written)
OPS = {
    "dropout": (lambda x: tridrop.dropout(x, 0.5, seed=1), lambda x: F.dropout(x, 0.5)),
    "dropout, eval": (lambda x: tridrop.dropout(x, 0.5, False), lambda x: F.dropout(x, 0.5, False)),
    "dropout, p = 1": (lambda x: tridrop.dropout(x, 1.0, seed=1), lambda x: F.dropout(x, 1.0)),
    "dropout, p a tensor": (
        lambda x: tridrop.dropout(x, torch.tensor(0.5), seed=1),
        lambda x: F.dropout(x, 0.5),
    ),
    "dropout1d": (lambda x: tridrop.dropout1d(x[0], 0.5, seed=1), lambda x: F.dropout1d(x[0], 0.5)),
    "dropout2d": (lambda x: tridrop.dropout2d(x, 0.5, seed=1), lambda x: F.dropout2d(x, 0.5)),
    "dropout3d": (lambda x: tridrop.dropout3d(x, 0.5, seed=1), lambda x: F.dropout3d(x, 0.5)),
    "alpha_dropout": (
        lambda x: tridrop.alpha_dropout(x, 0.5, True, seed=1),
        lambda x: F.alpha_dropout(x, 0.5, True),
    ),
    "feature_alpha_dropout": (
        lambda x: tridrop.feature_alpha_dropout(x, 0.5, True, seed=1),
        lambda x: F.feature_alpha_dropout(x, 0.5, True),
    ),
    "gaussian_dropout": (
        lambda x: tridrop.gaussian_dropout(x, 0.5, seed=1),
        lambda x: x * (1 + torch.randn_like(x)),
    ),
    "stochastic_depth": (
        lambda x: tridrop.stochastic_depth(x, 0.5, "row", seed=1),
        lambda x: x * torch.rand(len(x), 1, 1, 1, device=x.device).round(),
    ),
    "head_dropout": (
        lambda x: tridrop.head_dropout(x, 0.5, seed=1),
        lambda x: x * torch.rand(*x.shape[:2], 1, 1, device=x.device).round(),
    ),
    "head_dropout, by the number kept": (
        lambda x: tridrop.head_dropout(x, 0.5, rescale="kept", seed=1),
        lambda x: x * torch.rand(*x.shape[:2], 1, 1, device=x.device).round(),
    ),
    "drop_block2d": (
        lambda x: tridrop.drop_block2d(x, 0.5, 3, seed=1),
        lambda x: x * torch.rand(x.shape, device=x.device).round(),  # torchvision's noise
    ),
    "locked_dropout": (
        lambda x: tridrop.locked_dropout(x[0], 0.5, batch_first=True, seed=1),
        lambda x: x[0] * torch.rand(x.shape[1], 1, x.shape[3], device=x.device).round(),
    ),
    "activation_dropout": (
        lambda x: tridrop.activation_dropout(x, 0.5, activation="gelu", bias=BIAS, seed=1),
        lambda x: F.dropout(F.gelu(x + BIAS), 0.5),
    ),
    "activation_dropout, gated": (
        lambda x: tridrop.activation_dropout(x, 0.5, activation="swiglu", seed=1),
        lambda x: F.dropout(F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 0.5),
    ),
    "activation_dropout, eval": (
        lambda x: tridrop.activation_dropout(x, 0.5, False, activation="silu"),
        F.silu,
    ),
    "dropout_add": (
        lambda x: tridrop.dropout_add(x, x * 2, 0.5, bias=BIAS, layer_scale=BIAS, seed=1),
        lambda x: x * 2 + F.dropout((x + BIAS), 0.5) * BIAS,
    ),
    "dropout_add, a contiguous residual": (
        lambda x: tridrop.dropout_add(x, OTHER, 0.5, drop_path=0.3, seed=1),
        lambda x: OTHER + F.dropout(x, 0.5),
    ),
    "dropout_add, a contiguous branch": (
        lambda x: tridrop.dropout_add(OTHER, x, 0.5, seed=1),
        lambda x: x + F.dropout(OTHER, 0.5),
    ),
    "dropout_add, an expanded residual": (
        lambda x: tridrop.dropout_add(x, x[:1, :1].expand(x.shape), 0.5, seed=1),
        lambda x: x[:1, :1].expand(x.shape) + F.dropout(x, 0.5),
    ),
    "dropout_add, eval": (
        lambda x: tridrop.dropout_add(x, x * 2, 0.5, False),
        lambda x: x * 2 + x,
    ),
    "softmax_dropout": (
        lambda x: tridrop.softmax_dropout(x, 0.5, seed=1),
        lambda x: F.dropout(x.softmax(-1), 0.5),
    ),
    "dropout_add_layer_norm": (
        lambda x: tridrop.dropout_add_layer_norm(x, x * 2, None, None, 0.5, seed=1),
        lambda x: F.layer_norm(x * 2 + F.dropout(x, 0.5), x.shape[-1:]),
    ),
    "dropout_add_layer_norm's stream": (
        lambda x: tridrop.dropout_add_layer_norm(
            x, x * 2, None, None, 0.5, prenorm=True, seed=1
        )[1],
        lambda x: x * 2 + F.dropout(x, 0.5),
    ),
    "layer_norm_dropout": (
        lambda x: tridrop.layer_norm_dropout(x, None, None, 0.5, seed=1),
        lambda x: F.dropout(F.layer_norm(x, x.shape[-1:]), 0.5),
    ),
    "layer_norm_dropout, residual": (
        lambda x: tridrop.layer_norm_dropout(x, None, None, 0.5, residual=x, seed=1),
        lambda x: x + F.dropout(F.layer_norm(x, x.shape[-1:]), 0.5),
    ),
    "dropout_add_rms_norm": (
        lambda x: tridrop.dropout_add_rms_norm(x, x * 2, None, None, 0.5, seed=1),
        lambda x: rms(x * 2 + F.dropout(x, 0.5)),
    ),
    "rms_norm_dropout": (
        lambda x: tridrop.rms_norm_dropout(x, None, p=0.5, seed=1),
        lambda x: F.dropout(rms(x), 0.5),
    ),
    "rms_norm_dropout, residual": (
        lambda x: tridrop.rms_norm_dropout(x, None, p=0.5, residual=x, seed=1),
        lambda x: x + F.dropout(rms(x), 0.5),
    ),
}  # fmt: skip
# Gradients whose strides are not those of an elementwise composition: torch makes contiguous ones
# of chunks, of a softmax and of norms.
NOT_ELEMENTWISE = ("softmax", "norm", "gated")


def rms(x):
    """As models write it."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def gradient(call, x, incoming=None):
    x = x.detach().requires_grad_()
    out = call(x)
    total = (out if incoming is None else out * incoming).sum()
    return out.detach(), torch.autograd.grad(total, x, allow_unused=True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:dropout3d is for", "ignore:.*dropout3d.*input")
def test_results_and_gradients_lie_as_eagers(op, layout, backend):
    call, eager = OPS[op]
    x, relaid = numbers(), LAYOUTS[layout](numbers())
    assert not relaid.is_contiguous()
    incoming = torch.randn_like(call(x))  # dense and of the result's order, as a layer gives it
    expected, expected_grad = gradient(call, x, incoming)
    assert expected.is_contiguous()
    own = torch.empty_like(call(relaid)).copy_(incoming)
    for _ in range(2):  # a call that is met first, and one that is known
        out, grad = gradient(call, relaid, own)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad, expected_grad)
        assert significant(out) == significant(eager(relaid))
        if not any(word in op for word in NOT_ELEMENTWISE):
            _, of_eager = gradient(eager, relaid, own)
            assert significant(grad) == significant(of_eager)
    same = gradient(call, x, incoming)  # in between, nothing of the other layout is remembered
    assert torch.equal(same[0], expected)
    assert same[0].stride() == expected.stride()


@pytest.mark.parametrize("op", ["dropout", "alpha_dropout", "activation_dropout"])
def test_gradients_of_no_order(op, backend):
    """That of a sum is expanded, and a constant one contiguous: then eager's kept mask decides."""
    call, eager = OPS[op]
    x = LAYOUTS["channels last"](numbers())
    for incoming in (None, torch.ones(SHAPE, device=DEVICE)):
        _, expected = gradient(eager, x, incoming)
        _, found = gradient(call, x, incoming)
        assert significant(found) == significant(expected)


def test_second_derivatives(backend):
    x = LAYOUTS["channels last"](numbers()).requires_grad_()
    y = numbers().requires_grad_()

    def second(x):
        out = tridrop.activation_dropout(x, 0.5, activation="silu", seed=1)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return first.stride(), torch.autograd.grad(first.square().sum(), x)[0]

    stride, found = second(x)
    torch.testing.assert_close(found, second(y)[1])
    assert stride == x.stride()


# ------------------------------------------------------------------------- compilers, vmap, meshes


COMPILED = [op for op in OPS if "p = 1" not in op and "locked" not in op]
EXCHANGED = ("channels last", "two dimensions exchanged")
# Several ops to a compiled function, since each compilation takes a time of its own; but with
# sizes that are symbols it takes longer the more ops there are, and half of the layouts are left
# to TRIDROP_FEATURES=all.
STATIC = [(COMPILED[i::4], False, EXCHANGED) for i in range(4)]
ALL = os.environ.get("TRIDROP_FEATURES") == "all"
DYNAMIC = [
    ([op], True, EXCHANGED if ALL else EXCHANGED[i % 2 :][:1]) for i, op in enumerate(COMPILED)
]


@pytest.mark.parametrize(("ops", "dynamic", "layouts"), [*STATIC, *DYNAMIC], ids=str)
@pytest.mark.filterwarnings("ignore:dropout3d is for", "ignore:.*dropout3d.*input")
def test_compiled(ops, dynamic, layouts):
    """Between other operations, so that the strides are those the compiler believes in."""

    def between(*given):
        return [OPS[op][0](x * 1.5).sin() for op, x in zip(ops, given, strict=True)]

    def gradients(call, x):
        given = [x.detach().requires_grad_() for _ in ops]
        results = call(*given)
        return results, torch.autograd.grad([out.sum() for out in results], given)

    torch._dynamo.reset()
    compiled = torch.compile(between, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in layouts:
        x = LAYOUTS[name](numbers())
        every = zip(ops, *gradients(between, x), *gradients(compiled, x), strict=True)
        for op, expected, expected_grad, out, grad in every:
            torch.testing.assert_close(out, expected, msg=lambda said, op=op: f"{op}: {said}")
            torch.testing.assert_close(grad, expected_grad, msg=lambda said, op=op: f"{op}: {said}")
            assert significant(out) == significant(expected), op


def test_inductor_and_views_of_what_it_gives():
    x = numbers((4, 6, 10)).transpose(1, 2)

    def step(x, dropout):
        return dropout(x * 2).transpose(1, 2).view(len(x), -1).sin()

    compiled = torch.compile(
        lambda x: step(x, lambda t: tridrop.dropout(t, 0.5, seed=1)), fullgraph=True
    )
    out, grad = gradient(compiled, x)
    expected, expected_grad = gradient(
        lambda x: step(x, lambda t: tridrop.dropout(t, 0.5, seed=1)), x
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("name", ["forward", "norm_forward", "backward"])
def test_operators_agree_with_their_fakes(name):
    x = LAYOUTS["channels last"](numbers())
    seed = tridrop.new_seed(x.device)
    options = ("none", 0.5, 0.0, [], [], [], "mask", "reference")
    norm = ("rms_norm", 1e-5, False, False, True, torch.float32, torch.float32)
    arguments = {
        "forward": (x, None, None, x * 2, seed, None, *options),
        "norm_forward": (x, None, None, x * 2, None, None, seed, None, *options, *norm),
        "backward": (
            x.sum().expand(x.shape), None, None, None, seed, None, *options,
            order_of(x), torch.float32, None, None,
        ),
    }[name]  # fmt: skip
    operator = getattr(torch.ops.tridrop, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    found = operator(*arguments)
    assert (found if name == "forward" else found[0]).stride() == x.stride()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness):
    x = numbers((3, *SHAPE))
    for in_dim, layout in [(0, "channels last"), (0, "reversed"), (2, "channels last")]:
        relaid = torch.stack([LAYOUTS[layout](t) for t in x])
        relaid = relaid.new_empty(relaid.shape).copy_(relaid)
        order = order_of(LAYOUTS[layout](x[0]))
        relaid = laid_out(relaid, (0, *(1 + d for d in order))).movedim(0, in_dim)

        def call(t, dropout, in_dim=in_dim):
            return torch.vmap(dropout, in_dim, randomness=randomness)(t)

        out = call(relaid, lambda t: tridrop.dropout_add(t, t, 0.5, seed=1))
        expected = call(relaid, lambda t: t + F.dropout(t, 0.5))
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out[1], tridrop.dropout_add(x[1], x[1], 0.5, seed=1))
        # A call for each sample, since a dropped sample is an index of its own first dimension.
        out = call(relaid, lambda t: tridrop.dropout_add(t, t, 0.5, drop_path=0.5, seed=1))
        assert out.stride() == expected.stride()


def pieces_keep_their_order():
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    whole = numbers().repeat_interleave(2, 0)
    wanted = LAYOUTS["channels last"](whole).stride()
    piece = LAYOUTS["channels last"](whole[2 * rank : 2 * rank + 2])
    x = DTensor.from_local(piece, mesh, [Shard(0)], shape=whole.shape, stride=wanted)
    x.requires_grad_()
    out = tridrop.dropout(x, 0.5, seed=1)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    for t in (out, out.to_local(), grad.to_local()):
        assert t.stride() == wanted
    assert torch.equal(out.full_tensor(), tridrop.dropout(whole, 0.5, seed=1))


def test_dtensors(tmp_path):
    assert outcomes(tmp_path, 2, [pieces_keep_their_order]) == {"pieces_keep_their_order": ""}


# ---------------------------------------------------------------------------------------- models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.maps, self.head = nn.Dropout2d(0.3), nn.Linear(8, 5)
        self.alpha, self.seen = nn.AlphaDropout(0.1), []

    def forward(self, x):
        x = self.first(x).relu()
        self.seen = [x]
        x = F.dropout(x, 0.3, self.training)
        self.seen.append(x)
        x = self.second(self.maps(x))
        self.seen.append(x)
        x = x + F.dropout(self.alpha(x), 0.3, self.training)
        self.seen.append(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_a_convnet_stays_channels_last(training):
    model = Net().to(memory_format=torch.channels_last).train(training)
    tridrop.swap(model)
    model(numbers((2, 3, 6, 6)).contiguous(memory_format=torch.channels_last)).sum().backward()
    for x in model.seen:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert not x.is_contiguous()
    assert model.first.weight.grad.is_contiguous(memory_format=torch.channels_last)


class Views(nn.Module):
    """What a transpose, a dropout and the transpose back give is contiguous in torch."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6 * 10, 4), nn.Dropout(0.2)

    def forward(self, x):
        x = F.dropout(x.transpose(1, 2), 0.3, self.training).transpose(1, 2)
        x = x + self.drop(x.transpose(1, 2)).transpose(1, 2)
        return self.linear(x.view(len(x), -1))


def test_views_of_a_transposed_result():
    model, x = Views(), numbers((4, 6, 10)).cpu()
    model(x).sum().backward()
    tridrop.swap(model)
    model(x).sum().backward()
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    model.eval()(x)
