"""What somebody puts in the place of a class's methods, or of torch's functions, is what runs.

Before a swap and after it; also where another model of the class was swapped before. Values are
held against those of the same model in eager, whose dropouts get the swapped model's masks.
"""

import copy
import functools
import importlib
import linecache
import sys

import pytest
import torch
from swap_twin import logged, replayed
from torch import nn
from torch.nn import functional as F

import tridrop
from tridrop.swapping import source

WIDTH = 8


class Norm(nn.Module):
    """An RMSNorm as libraries write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-6

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        square = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(square + self.eps)
        return self.weight * x.to(dtype)


def residual_dropout(x, residual, p, training):
    out = F.dropout(x, p=p, training=training)
    out = residual + out
    return out


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.3)

    def forward(self, x, scale=1.0):
        return self.drop(self.down(self.act(self.up(x))) * scale)


class Block(nn.Module):
    """Something of every kind that is computed without calling it."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.layer_norm = Inner(), Norm(), nn.LayerNorm(WIDTH)
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.rates = (0.25, 0.15, 0.1)

    def attend(self, x):
        q, k, v = self.heads(x).chunk(3, -1)
        p = self.rates[0] if self.training else 0.0
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], dropout_p=p)[:, 0]

    def forward(self, x):
        x = self.norm(x + self.drop(self.linear(x)))
        x = self.layer_norm(x + self.inner(x))
        x = residual_dropout(self.attend(x), x, self.rates[1], self.training)
        return F.dropout(F.softmax(x, dim=-1), self.rates[2], self.training), x


def make(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        block = Block()
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(0.5 * torch.randn_like(p) + 0.1)
    return block


def plain(model):
    """A copy whose rates are 0, in training mode."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Block):
            module.rates = (0.0, 0.0, 0.0)
    return model


def call(model, x):
    """A result, and the gradients of everything."""
    x = x.clone().requires_grad_()
    parts = model(x)
    loss = sum(
        (part * torch.arange(1.0, 1 + part.numel()).view(part.shape).cos()).sum() for part in parts
    )
    given = [x, *model.parameters()]
    return *parts, *torch.autograd.grad(loss, given, allow_unused=True)


X = torch.linspace(-3, 3, 2 * 3 * WIDTH).view(2, 3, WIDTH).sin()


def assert_eager(swapped, report, original, masks=True):
    """Of a swapped model, and its original in eager, with the same masks, or without any."""
    if not masks:
        torch.testing.assert_close(call(plain(swapped), X), call(plain(original), X))
        return None
    with logged() as log:
        found = call(swapped, X)
    with replayed(log, report, original):
        expected = call(original, X)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return log


def doubled(original):
    return lambda self, x, *args: original(self, x, *args) * 2


def shifted(original):
    return lambda *args, **kwargs: original(*args, **kwargs) + 0.5


def damped(original):
    """No dropout, and other values."""
    return lambda x, p=0.5, training=True, inplace=False: x * (1 - p) + 0.25


def averaged(original):
    """No attention, and no dropout."""
    return lambda query, key, value, *args, **kwargs: value.mean(-2, keepdim=True) + 0 * query


HERE = sys.modules[__name__]
PATCHES = {
    "a block": (Block, "forward", lambda f: lambda self, x: [2 * part for part in f(self, x)]),
    "another method": (Block, "attend", doubled),
    "a child": (Inner, "forward", doubled),
    "an RMSNorm": (Norm, "forward", doubled),
    "Linear": (nn.Linear, "forward", doubled),
    "LayerNorm": (nn.LayerNorm, "forward", doubled),
    "Dropout": (nn.Dropout, "forward", doubled),
    "GELU": (nn.GELU, "forward", doubled),
    "linear": (F, "linear", shifted),
    "layer_norm": (F, "layer_norm", lambda f: lambda *args: torch.layer_norm(*args) * 2),
    "gelu": (F, "gelu", shifted),
    "softmax": (F, "softmax", lambda f: lambda x, dim: torch.softmax(x, dim) * 2),
    "dropout": (F, "dropout", damped),
    "attention": (F, "scaled_dot_product_attention", averaged),
    "a function of the module": (HERE, "residual_dropout", shifted),
}
each_patch = pytest.mark.parametrize("name", PATCHES)


@pytest.fixture(scope="module", autouse=True)
def earlier():
    """Another model of the classes was swapped before: what is kept by class is there."""
    model = make(1)
    tridrop.swap(model)
    model(X)


def apply(patch, name):
    owner, attribute, change = PATCHES[name]
    original = getattr(owner, attribute)
    patch.setattr(owner, attribute, change(original))


@each_patch
def test_a_patch_before_the_swap_is_what_runs(name, monkeypatch):
    model = make()
    unpatched = plain(model)(X)
    apply(monkeypatch, name)
    differ = [not torch.allclose(*pair) for pair in zip(unpatched, plain(model)(X), strict=True)]
    assert any(differ), "the patch changes nothing"
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    assert report.changed() == []
    assert_eager(ours, report, model, masks=name != "a block")  # which is one place, of one number


@each_patch
def test_a_patch_after_the_swap_is_what_runs_until_it_is_undone(name, monkeypatch):
    model = make()
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    before = assert_eager(ours, report, model)
    masks = name != "softmax"  # without it a dropout's mask is one of attention no more
    with monkeypatch.context() as patch:
        apply(patch, name)
        assert_eager(ours, report, model, masks)
        assert report.changed()
        assert report.changed()[0] in str(report)
        again = tridrop.swap(copy.deepcopy(model))  # of another model, meanwhile
        assert again.changed() == []
        assert_eager(ours, report, model, masks)
    assert assert_eager(ours, report, model) == before
    assert report.changed() == []


@pytest.mark.parametrize("name", ["Linear", "an RMSNorm", "a child", "a block", "Dropout"])
def test_code_and_defaults_replaced_in_place_are_what_runs(name, monkeypatch):
    """As autoreload does: the function stays, with another code."""
    owner, attribute, _ = PATCHES[name]
    function = getattr(owner, attribute)
    code, defaults = function.__code__, function.__defaults__
    model = make()
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)

    def replaced(self, x, scale=3.0):
        if hasattr(self, "out_features"):
            return x @ self.weight.T * scale
        return [x * scale, x * scale] if hasattr(self, "inner") else x * scale

    monkeypatch.setattr(function, "__code__", replaced.__code__)
    monkeypatch.setattr(function, "__defaults__", replaced.__defaults__)
    assert_eager(ours, report, model)
    assert report.changed()
    later = copy.deepcopy(model)
    assert_eager(later, tridrop.swap(later), model)
    assert function.__code__ is not code
    monkeypatch.undo()
    assert (function.__code__, function.__defaults__) == (code, defaults)
    assert_eager(ours, report, model)


def test_another_default_is_what_runs(monkeypatch):
    model = make()
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    monkeypatch.setattr(Inner.forward, "__defaults__", (0.5,))
    assert_eager(ours, report, model)
    assert report.changed() == ["Inner"]


def test_a_decorated_forward_is_the_decorator_and_the_text(monkeypatch):
    """A wrapper may do anything: a norm with one is no norm, a block keeps it."""

    def outer(original):
        @functools.wraps(original)
        def wrapper(self, x):
            return original(self, x) * 2

        return wrapper

    model = make()
    monkeypatch.setattr(Norm, "forward", outer(Norm.forward))
    monkeypatch.setattr(Inner, "forward", outer(Inner.forward))
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    assert_eager(ours, report, model)
    monkeypatch.undo()
    assert_eager(ours, report, model)


def test_a_patched_class_of_torch_is_read_for_what_it_drops(monkeypatch):
    """A linear layer that drops is not one that cannot."""

    def forward(self, x):
        return F.dropout(F.linear(x, self.weight, self.bias), 0.4, self.training)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    assert [(site.kind, site.p, site.status) for site in report.sites] == [
        ("Linear", 0.4, "swapped")
    ]
    with logged() as log:
        found = ours(X)
    with replayed(log, report, model):
        torch.testing.assert_close(found, model(X))
    tridrop.unswap(ours)
    assert type(ours[0]) is nn.Linear


def test_what_torch_keeps_in_a_patched_dropout_is_reported(monkeypatch):
    monkeypatch.setattr(F, "dropout", damped(F.dropout))
    report = tridrop.swap(make())
    left = {site.reason for site in report.sites if site.kind == "Dropout"}
    assert left == {"Dropout.forward, or a function of torch that it calls, was replaced"}


def test_a_patched_sequential_is_not_unrolled(monkeypatch):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2))
    before = copy.deepcopy(model)
    tridrop.swap(before)
    forward = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: forward(self, x) * 3)
    after = copy.deepcopy(model)
    tridrop.swap(after)
    for ours in (before, after):
        with tridrop.rng(3):
            found = ours(X)
        with tridrop.rng(3):
            torch.testing.assert_close(found, 3 * ours[1](ours[0](X)))


def test_attention_of_torch_with_another_function_is_torchs(monkeypatch):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    layer.self_attn.dropout = 0.3
    ours = copy.deepcopy(layer)
    tridrop.swap(ours)
    monkeypatch.setattr(F, "scaled_dot_product_attention", averaged(None))
    torch.testing.assert_close(ours(X), layer(X))
    later = copy.deepcopy(layer)
    report = tridrop.swap(later)
    assert "was replaced" in next(s.reason for s in report.sites if s.kind == "MultiheadAttention")
    torch.testing.assert_close(later(X), layer(X))


def test_compiled_code_sees_a_patch(monkeypatch):
    torch._dynamo.reset()
    model = make()
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    seed = tridrop.fold_in(7, 0)
    with tridrop.rng(seed):
        found = compiled(X)
    with tridrop.rng(seed):
        torch.testing.assert_close(found, ours(X))
    assert not report.changed()
    model, ours = plain(model), plain(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), tuple(model(X)))
    for name in ("Linear", "an RMSNorm", "a child"):
        with monkeypatch.context() as patch:
            apply(patch, name)
            torch.testing.assert_close(compiled(X), tuple(model(X)))
    torch._dynamo.reset()


def test_a_file_that_was_edited_is_not_taken_for_what_runs(tmp_path, monkeypatch):
    """Its text then says another thing, with the same names and constants."""
    text = """
from torch import nn

class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x, y):
        return x + self.drop(y)
"""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_later.py"
    path.write_text(text)
    kind = importlib.import_module("edited_later").Edited
    path.write_text(text.replace("x + self.drop(y)", "x - self.drop(y)"))
    linecache.checkcache()
    model = plain(kind())
    report = tridrop.swap(model)
    torch.testing.assert_close(model(X, X), 2 * X)
    assert "add" not in report.sites[0].parts


def test_every_forward_of_torchs_modules_reads_as_what_runs():
    """Calls of imported names with many arguments, as MultiheadAttention's, are compiled in a way
    of their own."""
    forwards = [
        c.forward for c in vars(nn).values() if isinstance(c, type) and "forward" in vars(c)
    ]
    assert len(forwards) > 100
    for forward in forwards:
        assert source.parse(source.unwrap(forward)[0]).name == forward.__name__
