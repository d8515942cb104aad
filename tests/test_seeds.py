"""tridrop.rng and the numbering of sites: which mask a call gets."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tridrop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ones(*shape):
    return torch.ones(*shape, device=DEVICE)


def test_calls_in_a_block_differ_and_blocks_repeat():
    def block():
        with tridrop.rng(11):
            return tridrop.dropout(ones(256), 0.5), tridrop.dropout(ones(256), 0.5)

    first, second = block()
    assert not torch.equal(first, second)
    for a, b in zip(block(), (first, second), strict=True):
        assert torch.equal(a, b)


def test_int_and_tensor_seeds_are_the_same():
    with tridrop.rng(5):
        a = tridrop.dropout(ones(64), 0.5)
    with tridrop.rng(torch.tensor([5, 0], device=DEVICE)):
        b = tridrop.dropout(ones(64), 0.5)
    assert torch.equal(a, b)


def test_an_explicit_seed_goes_first_and_takes_no_number():
    with tridrop.rng(5):
        expected = tridrop.dropout(ones(64), 0.5)
    with tridrop.rng(5):
        explicit = tridrop.dropout(ones(64), 0.5, seed=1)
        assert torch.equal(tridrop.dropout(ones(64), 0.5), expected)
    assert torch.equal(explicit, tridrop.dropout(ones(64), 0.5, seed=1))


def test_rng_leaves_torch_generator_alone():
    state = torch.get_rng_state()
    with tridrop.rng(5):
        tridrop.dropout(torch.ones(64), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_nest():
    with tridrop.rng(1):
        outer = tridrop.dropout(ones(64), 0.5)
        with tridrop.rng(2):
            inner = tridrop.dropout(ones(64), 0.5)
        after = tridrop.dropout(ones(64), 0.5)
    with tridrop.rng(1):
        assert torch.equal(tridrop.dropout(ones(64), 0.5), outer)
        assert torch.equal(tridrop.dropout(ones(64), 0.5), after)
    with tridrop.rng(2):
        assert torch.equal(tridrop.dropout(ones(64), 0.5), inner)


def test_a_site_takes_fold_in_of_its_number():
    model = nn.Sequential(tridrop.nn.Dropout(0.5), tridrop.nn.Dropout(0.5))
    assert tridrop.nn.number_sites(model, first=40) == 42
    with tridrop.rng(9):
        found = model[1](ones(64))
    assert torch.equal(
        found, tridrop.dropout(ones(64), 0.5, seed=tridrop.fold_in(9, 41).to(DEVICE))
    )


def test_sites_do_not_depend_on_the_order_of_calls():
    model = nn.ModuleList(tridrop.nn.Dropout(0.5) for _ in range(4))
    tridrop.nn.number_sites(model)
    with tridrop.rng(3):
        forwards = [m(ones(64)) for m in model]
    with tridrop.rng(3):
        backwards = [m(ones(64)) for m in reversed(model)]
    for a, b in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(a, b)


def test_more_sites_and_calls_than_the_table_holds():
    module = tridrop.nn.Dropout(0.5)
    module.site = 5000
    with tridrop.rng(3):
        found = module(ones(64))
    assert torch.equal(
        found, tridrop.dropout(ones(64), 0.5, seed=tridrop.fold_in(3, 5000).to(DEVICE))
    )
    with tridrop.rng(3):
        masks = {tuple(tridrop.dropout(ones(64), 0.5).tolist()) for _ in range(1100)}
    assert len(masks) == 1100


def test_a_site_called_twice_warns():
    module = tridrop.nn.Dropout(0.5)
    module.site = 0
    with tridrop.rng(3):
        module(ones(4))
        with pytest.warns(UserWarning, match="called twice"):
            module(ones(4))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_numbered_sites_survive_recomputation_without_generator(use_reentrant):
    model = nn.Sequential(nn.Linear(8, 8), tridrop.nn.Dropout(0.5), nn.Linear(8, 8)).to(DEVICE)
    model.append(tridrop.nn.DropoutAdd(0.3))
    tridrop.nn.number_sites(model)
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)

    def run(x):
        return model[3](model[2](model[1](model[0](x))), x)

    def gradient(function):
        with tridrop.rng(7), warnings.catch_warnings():
            warnings.simplefilter("error")
            return torch.autograd.grad(function(x).square().sum(), model[0].weight)[0]

    def backward(function):
        model.zero_grad()
        with tridrop.rng(7):
            function(x).square().sum().backward()
        return model[0].weight.grad.clone()

    def recomputed(x):
        return checkpoint(run, x, use_reentrant=use_reentrant, preserve_rng_state=False)

    torch.testing.assert_close(backward(recomputed), gradient(run))


def test_an_unnumbered_call_cannot_be_recomputed_in_a_block():
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    with tridrop.rng(7):
        out = checkpoint(lambda x: tridrop.dropout(x, 0.5).exp(), x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="number_sites"):
            out.sum().backward()


def test_recomputation_outside_the_block_raises():
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    with tridrop.rng(7):
        out = checkpoint(lambda x: tridrop.dropout(x, 0.5).exp(), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="inside the block"):
        out.sum().backward()
    # and a later step without rng is not disturbed by it
    out = checkpoint(lambda x: tridrop.dropout(x, 0.5).exp(), x, use_reentrant=False)
    out.sum().backward()


@pytest.mark.parametrize("seed", ["a", 1.5, True, torch.zeros(2)])
def test_bad_seeds_raise(seed):
    with pytest.raises(TypeError, match="seed"), tridrop.rng(seed):
        pass
