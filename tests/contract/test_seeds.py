"""tridrop.rng and the numbering of sites: which mask a call gets."""

import warnings

import pytest
import torch
from hosts import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.contract.mask import as_seed


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


def lasting_seeds():
    """What a user may make once and keep, by name."""
    yield "an int", 7
    yield "a tensor", as_seed(7)
    yield "new_seed", tridrop.new_seed("cpu")
    yield "new_seed of a generator", tridrop.new_seed("cpu", torch.Generator())
    yield "fold_in", tridrop.fold_in(7, 3)


def test_what_is_made_in_inference_mode_serves_training():
    model = tridrop.nn.Dropout(0.5)
    model.site = 0

    def trained(x):
        weight = torch.ones(64, requires_grad=True)
        (model(x * weight) + tridrop.dropout(weight, 0.5)).sum().backward()
        return weight.grad

    x = torch.randn(64)
    with torch.inference_mode():
        made = dict(lasting_seeds())
    for name, seed in made.items():
        assert isinstance(seed, int) or not seed.is_inference(), name
        with tridrop.rng(seed):
            with torch.inference_mode():  # an evaluation, which makes the tables
                model.train()(torch.ones(64)), tridrop.dropout(torch.ones(64), 0.5)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*called twice")
                found = trained(x)
        keep = tridrop.keep_mask(tridrop.fold_in(seed, 0), (64,), 0.5)
        with tridrop.rng(seed):
            tridrop.dropout(x, 0.5)
            counted = tridrop.dropout(torch.ones(64), 0.5)
        assert torch.equal(found, torch.where(keep, 2 * x, 0.0) + counted), name
    with torch.inference_mode(), tridrop.rng(3):
        inside = model(x)
    with tridrop.rng(3):
        assert torch.equal(model(x), inside)


def test_a_block_outlives_a_fake_mode_in_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with tridrop.rng(3):
        expected = tridrop.dropout(torch.ones(64), 0.5)
    with tridrop.rng(3):
        with FakeTensorMode():
            assert tridrop.dropout(torch.ones(64), 0.5).shape == (64,)
        second = tridrop.dropout(torch.ones(64), 0.5)
    with tridrop.rng(3):
        assert torch.equal(tridrop.dropout(torch.ones(64), 0.5), expected)
        assert torch.equal(tridrop.dropout(torch.ones(64), 0.5), second)


@pytest.mark.parametrize("seed", ["a", 1.5, True, torch.zeros(2)])
def test_bad_seeds_raise(seed):
    with pytest.raises(TypeError, match="seed"), tridrop.rng(seed):
        pass
