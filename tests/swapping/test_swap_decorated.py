"""A block's residual takes up what a decorated method drops, where its decorator hands the result
on as it is, and not where it might do anything else with it."""

import contextlib
import copy
import functools

import pytest
import torch
from swap_twin import logged, replayed
from torch import nn

import tridrop
from tridrop.swapping import source

WIDTH = 8


def renames(function):
    """As transformers deprecates an argument: read names, change arguments, hand the result on."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "old" in kwargs:
            kwargs["scale"] = kwargs.pop("old")
            kwargs.pop(f"a word for {function.__name__}", None)
        return function(*args, **kwargs)

    return wrapper


def loops(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        for _ in range(2):
            if self is not None:
                return function(self, *args, **kwargs)
        return None

    return wrapper


def doubles(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return wrapper


def keeps(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        out = function(*args, **kwargs)
        return out

    return wrapper


def surrounds(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with contextlib.nullcontext():
            return function(*args, **kwargs)

    return wrapper


def catches(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            pass

    return wrapper


def passes_itself(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return (lambda f: f(*args, **kwargs))(function)

    return wrapper


HAND_ON = [(renames,), (loops,), (renames, loops)]
DO_MORE = [(doubles,), (keeps,), (surrounds,), (catches,), (passes_itself,), (renames, doubles),
           (doubles, renames)]  # fmt: skip


def decorate(function, decorators):
    for decorator in decorators:
        function = decorator(function)
    return function


def block_of(decorators, **names):
    """A block around a layer whose forward is decorated."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

        def forward(self, x, scale=1.0):
            return self.drop(self.linear(x) * scale)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return x + self.inner(x, **names)

    Inner.forward = decorate(Inner.forward, decorators)
    torch.manual_seed(0)
    return Block()


def joined(report):
    """Whether the block takes up what drops in the layer, and adds its residual in one op."""
    (site,) = report.sites
    return "return" in site.parts


@pytest.mark.parametrize(
    "decorators", HAND_ON + DO_MORE, ids=lambda d: "-".join(f.__name__ for f in d)
)
def test_values_are_those_of_the_decorated_model(decorators):
    names = {"old": 0.5} if renames in decorators else {"scale": 0.5}
    model = block_of(decorators, **names)
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    assert joined(report) == (decorators in HAND_ON)
    x = torch.randn(4, WIDTH)
    with logged() as log:
        found = ours(x)
    with replayed(log, report, model):
        expected = model(x)
    torch.testing.assert_close(found, expected)
    assert len(log) == 1


def test_a_decorator_that_changes_its_mind_is_followed(monkeypatch):
    """The chain of wrappers is a part of the text that runs."""
    model = block_of((renames,))
    ours = copy.deepcopy(model)
    report = tridrop.swap(ours)
    kind = type(model.inner)
    monkeypatch.setattr(kind, "forward", doubles(kind.forward))
    x = torch.randn(4, WIDTH)
    model.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), model(x))
    assert report.changed()


def test_a_wrapper_without_text_does_more():
    namespace = {"functools": functools}
    text = (
        "def outer(function):\n"
        "    @functools.wraps(function)\n"
        "    def wrapper(*args, **kwargs):\n"
        "        return function(*args, **kwargs)\n"
        "    return wrapper\n"
    )
    exec(text, namespace)
    assert source.hands_on(renames(loops))
    assert not source.hands_on(namespace["outer"](loops))
