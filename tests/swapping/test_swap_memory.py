"""Classes that a model was made of go when it goes; a text that is not theirs is left."""

import copy
import gc
import importlib.util
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tridrop
from tridrop.swapping import kinds
from tridrop.swapping.class_cache import cache_of, cached

WIDTH = 8


def classes():
    """New classes, as a function makes them: one of every kind that swap keeps something of."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * x

    class Path(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_prob = 0.1

        def forward(self, x):
            if self.drop_prob == 0.0 or not self.training:
                return x
            return x * (torch.rand(x.shape[0], 1, 1) > self.drop_prob) / (1 - self.drop_prob)

    class Sequence(nn.Sequential):
        pass

    class Drop(nn.Dropout):
        pass

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

        def forward(self, x):
            return self.drop(self.linear(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.path, self.own = Inner(), Norm(), Path(), Drop(0.1)
            self.sequence = Sequence(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2))

        def forward(self, x):
            x = self.norm(x + self.inner(x))
            return x + self.path(self.sequence(self.own(F.dropout(x, 0.1, self.training))))

    return Block


X = torch.linspace(-1, 1, 2 * 3 * WIDTH).view(2, 3, WIDTH)


def used(model, verified):
    """Swap, run and unswap it; weak references to its classes, before the swap and after it."""
    report = tridrop.swap(model)
    assert report.counts()["fused"] >= 2
    model(X).sum().backward()
    str(report)
    if verified:
        report.verify(X)
    copied = pickle.loads(pickle.dumps(model.sequence[1]))
    found = {type(module) for module in (*model.modules(), *copy.deepcopy(model).modules(), copied)}
    tridrop.unswap(model)
    found |= {type(module) for module in model.modules()}
    return [weakref.ref(kind) for kind in found if kind.__module__ == __name__]


@pytest.mark.parametrize("verified", [False, True])
def test_classes_made_in_functions_are_freed(verified):
    refs = [ref for _ in range(10) for ref in used(classes()(), verified)]
    assert len(refs) >= 80
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


def test_a_model_that_is_not_unswapped_is_freed_with_its_classes():
    model = classes()()
    tridrop.swap(model)
    refs = [weakref.ref(type(module)) for module in model.modules()]
    refs = [ref for ref in refs if ref().__module__ == __name__]
    assert len(refs) == 6
    del model
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


def test_a_class_remembers_for_itself_alone():
    kind = classes()
    made = type("Made", (kind,), {})
    model = kind()
    tridrop.swap(model)
    first = type(model)
    assert cached(kind).of is kind
    assert cached(made) is None
    assert cache_of(made) is not cached(kind)
    tridrop.unswap(model)
    tridrop.swap(model)
    assert type(model) is first  # the class is read once
    assert kinds.cached_kind(nn.Linear).name == "linear"


def test_a_class_that_is_pickled_by_value_goes_without():
    kind = classes()
    tridrop.swap(kind())
    assert pickle.loads(pickle.dumps(cached(kind))) is None


def test_a_model_that_was_swapped_can_be_scripted():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.LayerNorm(WIDTH))
    tridrop.swap(model)
    tridrop.unswap(model)
    model.eval()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


# ------------------------------------------------------------------------------- a changed file

TEXT = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.25)

    def forward(self, x):
        return x + self.drop(self.linear(x)) * 2.0
"""


@pytest.fixture(params=["absolute", "relative"])
def block(request, tmp_path, monkeypatch):
    """A class of a file, compiled with an absolute or a relative name, and the file's path."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / f"blocks_{request.param}.py"
    path.write_text(TEXT)
    if request.param == "relative":
        monkeypatch.chdir(tmp_path)
        space = {"__name__": "executed"}
        exec(compile(TEXT, path.name, "exec"), space)
        return space["Block"], path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module.Block, path


def test_a_file_that_was_not_changed_is_fused(block):
    kind, _ = block
    assert tridrop.swap(kind()).counts() == {"fused": 1, "swapped": 0, "left": 0}


@pytest.mark.parametrize(
    "change", [("2.0", "3.0"), ("x + self", "x - self"), ("self.linear(x)", "x")]
)
def test_a_file_that_was_changed_is_not_what_runs(block, change):
    kind, path = block
    model = kind()
    path.write_text(TEXT.replace(*change))
    plain = copy.deepcopy(model).eval()
    report = tridrop.swap(model)
    assert report.counts()["fused"] == 0
    assert "its source is not what runs" in str(report)
    assert torch.equal(model.eval()(X), plain(X))
    # Without dropout the training is the original's, too: nothing of the text was taken.
    model.drop.p = plain.drop.p = 0.0
    assert torch.equal(model.train()(X), plain.train()(X))
