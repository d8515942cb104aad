"""Structured drops: branches, layers, tokens, heads, blocks of feature maps."""

import copy
import math

import numpy as np
import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import nn
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.commands import check
from tridrop.commands.check.measure import MAX_Z
from tridrop.contract import choice, mask
from tridrop.contract.mask import ONE, threshold
from tridrop.masks import numpy_mask

BACKENDS = (PLAIN, "triton")
SCALE = ONE / (ONE - threshold(0.4))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def vision():
    return pytest.importorskip("torchvision.ops")


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def z(found, expected, variance, n):
    """A rate of n independent trials against the expected one, in standard errors."""
    return abs(found - expected) / math.sqrt(variance / n)


# ------------------------------------------------------------------------- a choice of exactly k


@pytest.mark.parametrize("shape", [(13,), (3, 8), (2, 3, 21), (5, 700), (1030, 2), (), (3, 0)])
def test_bits_are_those_that_a_mask_compares(shape, backend):
    seed = tridrop.fold_in(5, 3).to(DEVICE)
    bits = tridrop.backends.load(backend).decision_bits(seed, shape)
    assert torch.equal(bits, choice.bits(seed, shape))
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(bits >= threshold(p), tridrop.keep_mask(seed, shape, p))


@pytest.mark.parametrize("k", [0, 1, 5, 8])
def test_kept_indices_are_those_that_a_rising_rate_drops_last(k, backend):
    shape = (3, 4, 8)
    kept = tridrop.kept_indices(7, shape, k, device=DEVICE).cpu()
    bits = choice.bits(mask.as_seed(7), shape)
    chosen = torch.zeros(shape, dtype=torch.bool).scatter(-1, kept, True)
    assert kept.shape == (3, 4, k)
    assert bool((chosen.sum(-1) == k).all())
    lowest = bits.masked_fill(~chosen, ONE).amin(-1)
    assert bool((bits.masked_fill(chosen, -1).amax(-1) <= lowest).all())
    falling = bits.gather(-1, kept)
    assert bool((falling.diff(dim=-1) <= 0).all())


def test_kept_indices_follow_the_contract():
    """docs/mask-contract.md, by NumPy."""
    bits = numpy_mask.bits((9, 4), (3, 50, 24)).astype(np.int64)
    order = np.argsort(-bits, axis=-1, kind="stable")[..., :7]
    found = tridrop.kept_indices(tridrop.fold_in(9, 4), (3, 50, 24), 7)
    assert np.array_equal(found.numpy(), order)


def test_every_element_is_kept_as_often_as_any_other_and_every_pair():
    k, n, rows = 3, 10, 20_000
    kept = tridrop.kept_indices(1, (rows, n), k)
    chosen = torch.zeros(rows, n).scatter(-1, kept, 1.0).double()
    rate = k / n
    assert z(float(chosen.sum(1).mean()), k, 1e-30, 1) == 0
    for found in chosen.mean(0).tolist():
        assert z(found, rate, rate * (1 - rate), rows) < MAX_Z
    pairs, together = chosen.T @ chosen / rows, rate * (k - 1) / (n - 1)
    worst = float((pairs - together).triu(1).where(torch.ones(n, n).triu(1) > 0, 0).abs().max())
    assert z(worst, 0, together * (1 - together), rows) < MAX_Z
    # The order is random, too: the first of them is each with equal probability.
    first = torch.bincount(kept[:, 0], minlength=n) / rows
    assert all(z(f, 1 / n, (1 - 1 / n) / n, rows) < MAX_Z for f in first.tolist())


def test_kept_indices_refuses():
    with pytest.raises(ValueError, match=r"k = 9 for shape \(2, 8\)"):
        tridrop.kept_indices(1, (2, 8), 9)
    with pytest.raises(ValueError, match="the last dimension"):
        tridrop.kept_indices(1, (), 0)
    with pytest.raises(TypeError, match="how many to keep"):
        tridrop.kept_indices(1, (8,), 0.5)


# ------------------------------------------------------------------------------ stochastic depth


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_is_dropout_with_a_shared_decision(mode, backend):
    x = normal(6, 3, 5).requires_grad_()
    noise_shape = (None if mode == "row" else 1, 1, 1)
    keep = tridrop.keep_mask(9, x.shape, 0.4, noise_shape=noise_shape, device=DEVICE)
    out = tridrop.stochastic_depth(x, 0.4, mode, seed=9)
    torch.testing.assert_close(out, (x * SCALE).where(keep, 0))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, keep)
    assert tridrop.stochastic_depth(x, 0.4, mode, False) is x
    rows = torch.stack(
        [tridrop.stochastic_depth(x[:2], 0.4, mode, seed=s)[:, 0, 0] != 0 for s in range(40)]
    )
    assert bool((rows[:, 0] == rows[:, 1]).all()) == (mode == "batch")
    assert 0 < int(rows[:, 0].sum()) < 40


def test_stochastic_depth_is_a_drop_in_for_torchvisions(vision):
    ours, theirs = (
        tridrop.nn.StochasticDepth(0.2, "row"),
        vision.StochasticDepth(0.2, "row"),
    )
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict()
    x = normal(4, 3)
    assert ours.eval()(x) is x
    for module in (tridrop, vision):
        with pytest.raises(ValueError, match="mode"):
            module.stochastic_depth(x, 0.2, "column")
        with pytest.raises(ValueError, match="probability"):
            module.stochastic_depth(x, 1.2, "row")
        assert not module.stochastic_depth(x, 1.0, "row").any()
    with pytest.raises(ValueError, match="scalar"):
        tridrop.stochastic_depth(torch.ones(()), 0.2, "row")


# ------------------------------------------------------------------ the branch of a subset alone


def subset_eager(x, branch, p, seed):
    k = max(1, int(len(x) * (1 - p)))
    kept = tridrop.kept_indices(seed, (len(x),), k, device=x.device).sort().values
    out = x.clone()
    out[kept] = x[kept] + branch(x[kept]) * (len(x) / k)
    return out, kept


@pytest.mark.parametrize("p", [0.1, 0.4, 0.99])
def test_a_subset_of_the_samples_goes_through_the_branch(p):
    layer = nn.Linear(5, 5).to(DEVICE)
    seen = []

    def branch(x):
        seen.append(len(x))
        return layer(x).tanh()

    x = normal(10, 3, 5).requires_grad_()
    out = tridrop.drop_path_subset(x, branch, p, seed=3)
    assert seen == [max(1, int(10 * (1 - p)))]
    expected, kept = subset_eager(x, branch, p, 3)
    torch.testing.assert_close(out, expected)
    assert len(kept) == seen[0] < 10
    upstream = normal(10, 3, 5, seed=1)
    operands = (x, layer.weight, layer.bias)
    for found, wanted in zip(
        torch.autograd.grad(out, operands, upstream),
        torch.autograd.grad(expected, operands, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_a_subset_has_the_expectation_of_the_branch():
    x, n = torch.zeros(7, 1), 1000
    outs = torch.stack(
        [tridrop.drop_path_subset(x, torch.ones_like, 0.4, seed=s) for s in range(n)]
    )
    k = int(7 * 0.6)
    variance = (7 / k) ** 2 * (k / 7) * (1 - k / 7)
    for found in outs.mean(0).flatten().tolist():
        assert z(found, 1.0, variance, n) < MAX_Z


def test_a_subset_at_the_ends_and_of_bad_input():
    x = normal(4, 3)
    assert torch.equal(tridrop.drop_path_subset(x, torch.sin, 0.0), x + x.sin())
    assert torch.equal(tridrop.drop_path_subset(x, torch.sin, 0.5, False), x + x.sin())

    def never(x):
        raise AssertionError("called")

    assert tridrop.drop_path_subset(x, never, 1.0) is x
    assert tridrop.drop_path_subset(x[:0], torch.sin, 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match=r"made \(2, 1\) of \(2, 3\)"):
        tridrop.drop_path_subset(x, lambda t: t[:, :1], 0.5)
    with pytest.raises(TypeError, match="p is a tensor"):
        tridrop.drop_path_subset(x, torch.sin, torch.tensor(0.5))
    # as x + branch(x) promotes
    half = tridrop.drop_path_subset(x, lambda t: t.bfloat16(), 0.5, seed=1)
    assert half.dtype == torch.float32
    assert tridrop.drop_path_subset(x.bfloat16(), lambda t: t.float(), 0.5).dtype == torch.float32


class Counted(nn.Module):
    """A branch with a dropout, that counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.calls = nn.Linear(6, 6), tridrop.nn.Dropout(0.3), 0

    def forward(self, x):
        self.calls += 1
        return self.drop(self.linear(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [
    lambda: tridrop.nn.DropPathSubset(Counted(), 0.5),
    lambda: tridrop.nn.LayerDrop([Counted() for _ in range(6)], 0.5),
    lambda: nn.Sequential(tridrop.nn.PatchDropout(0.5), Counted()),
    lambda: nn.Sequential(Counted(), tridrop.nn.HeadDropout(0.5, rescale="kept")),
], ids=["subset", "layers", "patches", "heads"])  # fmt: skip
@pytest.mark.parametrize("seeded", [False, True])
def test_what_is_recomputed_is_what_was_computed(make, use_reentrant, seeded):
    model = make().to(DEVICE)
    tridrop.nn.number_sites(model)
    branches = [m for m in model.modules() if isinstance(m, Counted)]

    def grads(run):
        model.zero_grad()
        x = normal(8, 5, 6).requires_grad_()
        torch.manual_seed(11)
        if seeded:
            with tridrop.rng(5):
                run(x).square().sum().backward()
        else:
            run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    expected = grads(model)
    calls = [m.calls for m in branches]
    found = grads(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert [m.calls for m in branches] == [3 * n for n in calls]  # plain, forward, recomputed
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------- LayerDrop


class Step(nn.Module):
    """Appends a number to a list, and adds what it is given."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, *more, shift=0):
        return [*x, self.number + sum(more) + shift]


def test_layers_are_skipped_by_the_mask_of_the_seed():
    layers = tridrop.nn.LayerDrop([Step(i) for i in range(9)], 0.4)
    layers.site = 3
    with tridrop.rng(8):
        found = layers([])
    keep = tridrop.keep_mask(tridrop.fold_in(8, 3), (9,), 0.4)
    assert found == [i for i in range(9) if keep[i]]
    assert tridrop.layer_drop(range(9), 0.4, seed=tridrop.fold_in(8, 3)) == found
    assert 0 < len(found) < 9
    with tridrop.rng(tridrop.new_seed(DEVICE)):
        once = [layer.number for layer in layers.kept()]
    assert set(once) <= set(range(9))
    assert layers.eval()([]) == list(range(9))
    assert layers([], 10, shift=100) == [i + 110 for i in range(9)]
    assert tridrop.nn.LayerDrop([Step(0)], 1.0)("as it was") == "as it was"


def test_layers_are_skipped_at_the_rate_and_apart():
    n = 1500
    kept = torch.tensor(
        [[i in tridrop.layer_drop(range(6), 0.3, seed=s) for i in range(6)] for s in range(n)]
    ).double()
    for found in kept.mean(0).tolist():
        assert z(found, 0.7, 0.3 * 0.7, n) < MAX_Z
    both = float((kept[:, 0] * kept[:, 1]).mean())
    assert z(both, 0.49, 0.49 * 0.51, n) < MAX_Z


def test_layer_drop_is_a_list_of_modules():
    layers = tridrop.nn.LayerDrop([nn.Linear(2, 2) for _ in range(4)], 0.99)
    plain = nn.ModuleList(layers)  # all of them, in training too
    assert list(layers.state_dict()) == list(plain.state_dict())
    assert len(plain) == len(list(layers)) == 4
    assert repr(layers).count("Linear") == 1
    assert "(0-3): 4 x Linear" in repr(layers)
    assert isinstance(layers[1:], tridrop.nn.LayerDrop)
    assert layers[1:].p == 0.99
    assert layers[2] is plain[2]
    layers.append(nn.Linear(2, 2))
    assert len(tridrop.nn.LayerDrop()) == 0
    assert len(copy.deepcopy(layers)) == 5
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        tridrop.nn.LayerDrop([], 1.5)


def test_the_hosts_decision_moves_no_generator_but_the_cpus():
    """And takes no draw where there is nothing to decide."""
    layers = tridrop.nn.LayerDrop([Step(i) for i in range(9)], 0.5)
    torch.manual_seed(0)
    first = layers([])
    assert layers([]) != first
    torch.manual_seed(0)
    assert layers([]) == first
    state = torch.get_rng_state()
    with tridrop.rng(4):
        layers([])
    layers.p = 0.0
    layers([])
    layers.eval()([])
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------- PatchDropout


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("ordered", [False, True])
def test_patches_that_stay_are_those_of_the_seed(prefix, ordered):
    x = normal(4, prefix + 20, 6).requires_grad_()
    out, indices = tridrop.patch_dropout(
        x, 0.3, num_prefix_tokens=prefix, ordered=ordered, return_indices=True, seed=6
    )
    kept = tridrop.kept_indices(6, (4, 20), 14, device=DEVICE)
    assert torch.equal(indices, kept.sort(-1).values if ordered else kept)
    rows = torch.arange(4, device=DEVICE)[:, None]
    expected = torch.cat((x[:, :prefix], x[:, prefix:][rows, indices]), 1)
    assert torch.equal(out, expected)
    upstream = normal(*out.shape, seed=1)
    (found,) = torch.autograd.grad(out, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(found, wanted)
    assert not torch.equal(indices[0].sort().values, indices[1].sort().values)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("tokens", [2, 11, 197])
def test_patch_dropout_keeps_as_many_as_timms(p, tokens, timm):
    x = normal(2, tokens, 3)
    ours, theirs = tridrop.nn.PatchDropout(p), timm.layers.PatchDropout(p)
    assert ours(x).shape == theirs(x).shape
    assert ours.eval()(x) is x
    assert torch.equal(ours.train()(x)[:, :1], x[:, :1])


def test_patch_dropout_in_a_model_of_timms(timm):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, patch_drop_rate=0.5
    )
    theirs = model.patch_drop
    model.patch_drop = tridrop.nn.PatchDropout(
        theirs.prob, theirs.num_prefix_tokens, theirs.ordered
    )
    shapes = []
    model.blocks[0].register_forward_hook(lambda module, inputs, out: shapes.append(out.shape[1]))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    model.eval()(torch.randn(2, 3, 32, 32))
    assert shapes == [1 + 2, 1 + 4]


def test_patch_dropout_takes_any_tokens_and_refuses_the_rest():
    ids = torch.arange(24, device=DEVICE).view(2, 12)
    out, indices = tridrop.patch_dropout(ids, 0.5, num_prefix_tokens=2, return_indices=True, seed=3)
    assert torch.equal(out[:, 2:] - 2 - ids[:, :1], indices)
    assert tridrop.patch_dropout(ids[:, :1], 0.5).shape == (2, 1)  # a prefix alone
    assert tridrop.patch_dropout(ids[:0], 0.5).shape == (0, 1 + 5)
    assert tridrop.patch_dropout(ids, 0.5, False, return_indices=True) == (ids, None)
    module = tridrop.nn.PatchDropout(0.5, return_indices=True)
    assert [t.shape[1] for t in module(ids)] == [6, 5]
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"probability|leaves no token"):
            tridrop.patch_dropout(ids, rate)
        with pytest.raises(ValueError, match=r"probability|leaves no token"):
            tridrop.nn.PatchDropout(rate)
    with pytest.raises(ValueError, match="num_prefix_tokens = 13 of 12"):
        tridrop.patch_dropout(ids, 0.5, num_prefix_tokens=13)
    with pytest.raises(ValueError, match="batch, tokens"):
        tridrop.patch_dropout(ids[0], 0.5)


# ----------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("dim", [1, 2, -2])
@pytest.mark.parametrize("rescale", ["expected", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_dropped_whole_for_each_sample(dim, rescale, dtype, backend):
    x = normal(5, 6, 8, 3, dtype=dtype).requires_grad_()
    at = dim % 4
    noise_shape = tuple(None if i in (0, at) else 1 for i in range(4))
    keep = tridrop.keep_mask(2, x.shape, 0.4, noise_shape=noise_shape, device=DEVICE)
    scale = torch.full((5, 1, 1, 1), SCALE, device=DEVICE)
    if rescale == "kept":
        heads = keep.amax([i for i in range(1, 4) if i != at], keepdim=True)
        scale = x.shape[at] / heads.sum(at, keepdim=True)
        assert len(scale.unique()) > 1
    expected = (x.float() * scale).to(dtype).where(keep, 0)
    out = tridrop.head_dropout(x, 0.4, dim=dim, rescale=rescale, seed=2)
    torch.testing.assert_close(out, expected)
    upstream = normal(*x.shape, dtype=dtype, seed=1)
    (grad,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(grad, (upstream.float() * scale).to(dtype).where(keep, 0))


def test_heads_at_the_rate_and_by_expectation():
    x, n = torch.ones(2000, 4, 1, 1), 2000
    for rescale, expected in (("expected", 1.0), ("kept", 1 - 0.4**4)):
        out = tridrop.head_dropout(x, 0.4, rescale=rescale, seed=1)[:, :, 0, 0].double()
        for head in range(4):
            assert z(float((out[:, head] == 0).double().mean()), 0.4, 0.24, n) < MAX_Z
            variance = float(out[:, head].var())
            assert z(float(out[:, head].mean()), expected, variance, n) < MAX_Z


def test_heads_at_the_ends_and_of_bad_input():
    x = torch.full((2, 3, 2, 2), math.nan)
    for rescale in ("expected", "kept"):
        assert torch.equal(tridrop.head_dropout(x, 1.0, rescale=rescale), torch.zeros_like(x))
        assert tridrop.head_dropout(x, 0.0, rescale=rescale) is x
        assert tridrop.head_dropout(x, 0.5, False, rescale=rescale) is x
    for dim in (0, 4, -4):
        with pytest.raises(ValueError, match=f"dim = {dim}"):
            tridrop.head_dropout(x, 0.5, dim=dim)
    with pytest.raises(ValueError, match="rescale = 'all'"):
        tridrop.head_dropout(x, 0.5, rescale="all")


# ------------------------------------------------------------------------------------- DropBlock


def torchvisions(function, x, keep_starts, p, block, monkeypatch):
    """torchvision's function, its random numbers replaced by the given starts of blocks."""

    def bernoulli(self, rate, **_):
        assert self.shape == keep_starts.shape
        valid = math.prod(keep_starts.shape[2:])
        assert rate == pytest.approx(p * x[0, 0].numel() / (block ** (x.dim() - 2) * valid))
        return self.copy_(~keep_starts)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bernoulli_", bernoulli)
        return function(x, p, block)


@pytest.mark.parametrize(
    ("shape", "p", "block"),
    [((3, 4, 9, 7), 0.2, 3), ((2, 3, 12, 12), 0.5, 5), ((2, 3, 4, 3), 0.3, 7),
     ((2, 5, 6, 5), 0.4, 1), ((2, 3, 5, 4, 6), 0.3, 3)],
)  # fmt: skip
def test_blocks_are_torchvisions_by_the_exported_starts(
    shape, p, block, backend, vision, monkeypatch
):
    name = "drop_block2d" if len(shape) == 4 else "drop_block3d"
    x = normal(*shape).requires_grad_()
    size = min(block, *shape[2:])
    starts = (*shape[:2], *(n - size + 1 for n in shape[2:]))
    gamma = p * math.prod(shape[2:]) / (size ** (len(shape) - 2) * math.prod(starts[2:]))
    keep = tridrop.keep_mask(3, starts, gamma, device=DEVICE)
    expected = torchvisions(getattr(vision, name), x, keep, p, size, monkeypatch)
    out = getattr(tridrop, name)(x, p, block, seed=3)
    assert 0 < int((out == 0).sum()) < out.numel()
    torch.testing.assert_close(out, expected)
    upstream = normal(*shape, seed=1)
    (found,) = torch.autograd.grad(out, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(found, wanted)


def test_blocks_fall_at_the_rate_of_the_paper():
    """An inner element falls unless none of the b^2 blocks over it begins."""
    p, block, n = 0.25, 3, 4000
    out = tridrop.drop_block2d(torch.ones(n, 1, 8, 8), p, block, seed=4)
    gamma = p * 64 / (9 * 36)
    rate = 1 - (1 - gamma) ** 9
    inner = float((out[:, 0, 4, 4] == 0).double().mean())
    corner = float((out[:, 0, 0, 0] == 0).double().mean())
    assert z(inner, rate, rate * (1 - rate), n) < MAX_Z
    assert z(corner, gamma, gamma * (1 - gamma), n) < MAX_Z
    assert float(out.mean()) == pytest.approx(1, abs=1e-5)  # scaled by the number kept


def test_drop_block_is_a_drop_in_for_torchvisions(vision):
    x = normal(2, 3, 5, 5)
    for name in ("DropBlock2d", "DropBlock3d"):
        ours, theirs = (getattr(m, name)(0.2, 3, True) for m in (tridrop.nn, vision))
        assert repr(ours) == repr(theirs)
        assert ours.eval()(x if name == "DropBlock2d" else x[None]) is not None
    for module in (tridrop, vision):
        with pytest.raises(ValueError, match="odd"):
            module.drop_block2d(x, 0.2, 2)
        with pytest.raises(ValueError, match="odd"):
            module.drop_block2d(x[..., :4, :4], 0.2, 7)
        with pytest.raises(ValueError, match="probability"):
            module.drop_block2d(x, 1.2, 3)
        with pytest.raises(ValueError, match="input"):
            module.drop_block2d(x[0], 0.2, 3)
        assert module.drop_block2d(x, 0.2, 2, training=False) is x
        assert not module.drop_block2d(x, 1.0, 5).any()
    given = x.clone()
    assert tridrop.drop_block2d(given, 0.3, 3, inplace=True, seed=1) is given
    assert torch.equal(given, tridrop.drop_block2d(x, 0.3, 3, seed=1))
    assert not torch.equal(given, x)
    with pytest.raises(TypeError, match="block_size"):
        tridrop.drop_block2d(x, 0.2, 3.0)
    dropped = tridrop.drop_block2d(torch.full_like(x, math.nan), 0.5, 3, seed=1) == 0
    assert torch.equal(dropped, tridrop.drop_block2d(torch.ones_like(x), 0.5, 3, seed=1) == 0)
    assert bool(dropped.any())


# ----------------------------------------------------------------------- what all of them share

CALLS = {
    "rows": (lambda x, s: tridrop.stochastic_depth(x, 0.4, "row", seed=s), 16),
    "batch": (lambda x, s: tridrop.stochastic_depth(x, 0.4, "batch", seed=s), 16),
    "subset": (lambda x, s: tridrop.drop_path_subset(x, lambda t: 2 * t, 0.4, seed=s), 2 * 8 * 3),
    "patches": (lambda x, s: tridrop.patch_dropout(x, 0.5, seed=s), 8 * 6 * 4),
    "heads": (lambda x, s: tridrop.head_dropout(x, 0.4, seed=s), 16),
    "heads kept": (lambda x, s: tridrop.head_dropout(x, 0.4, rescale="kept", seed=s), 16),
    "blocks": (lambda x, s: tridrop.drop_block2d(x, 0.4, 3, seed=s), 16),
}
calls = pytest.mark.parametrize(("call", "saved"), CALLS.values(), ids=CALLS)
INPUT = (6, 7, 5, 5)


@calls
def test_nothing_of_the_masks_is_saved(call, saved):
    """A seed of 16 bytes, and of what is chosen its indices."""
    kept = []
    x = normal(*INPUT).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(x, None)
    assert sum(t.untyped_storage().nbytes() for t in kept) == saved


@calls
def test_compiled_transformed_and_differentiated_twice(call, saved):
    x = normal(2, 3, 3, 3, dtype=torch.float64).requires_grad_()
    seed = tridrop.new_seed(DEVICE)
    expected = call(x, seed)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, seed), expected)
    grads = [torch.autograd.grad(f(x, seed).square().sum(), x)[0] for f in (call, compiled)]
    assert torch.equal(*grads)
    torch.autograd.gradcheck(lambda x: call(x, seed), x)
    torch.autograd.gradgradcheck(lambda x: call(x, seed), x)


@calls
def test_each_seed_of_a_vmap_is_a_call_of_its_own(call, saved):
    x = normal(*INPUT)
    seeds = torch.stack([tridrop.fold_in(5, i).to(DEVICE) for i in range(3)])
    for dim in (None, 0):
        given = x if dim is None else torch.stack([x, 2 * x, 3 * x])
        found = torch.vmap(call, (dim, 0))(given, seeds)
        for i in range(3):
            torch.testing.assert_close(found[i], call(x if dim is None else given[i], seeds[i]))


@calls
def test_the_seed_alone_decides(call, saved, backend):
    x = normal(*INPUT)
    assert torch.equal(call(x, 3), call(x, 3))
    assert any(not torch.equal(call(x, s), call(x, 3)) for s in (4, 5, 6))
    torch.manual_seed(2)
    first = [call(x, None) for _ in range(4)]
    torch.manual_seed(2)
    assert all(torch.equal(call(x, None), t) for t in first)
    assert any(not torch.equal(first[0], t) for t in first)


def model():
    """One of each that goes on tokens [B, L, D]."""
    return nn.Sequential(
        tridrop.nn.PatchDropout(0.5), tridrop.nn.DropPathSubset(nn.Linear(4, 4), 0.5),
        tridrop.nn.LayerDrop([nn.Linear(4, 4) for _ in range(3)], 0.5), nn.Unflatten(2, (2, 2)),
        tridrop.nn.HeadDropout(0.5, dim=2), tridrop.nn.StochasticDepth(0.5, "batch"),
        nn.Flatten(2), nn.Unflatten(1, (1, -1)), tridrop.nn.DropBlock2d(0.3, 3),
    )  # fmt: skip


def test_modules_have_streams_of_their_own():
    layers = model()
    assert tridrop.nn.number_sites(layers) == 6
    x = normal(4, 13, 4)
    layers.to(DEVICE)

    def run(sites):
        droppers = [m for m in layers.modules() if hasattr(m, "site")]
        for module, site in zip(droppers, sites, strict=True):
            module.site = site
        with tridrop.rng(3):
            return layers(x)

    first = run(range(6))
    assert torch.equal(run(range(6)), first)
    found = [run([*range(i), 70 + i, *range(i + 1, 6)]) for i in range(6)]
    changed = [t.shape != first.shape or not torch.equal(t, first) for t in found]
    assert sum(changed) >= 4


def test_monte_carlo_and_schedules_know_them():
    layers = model().eval()
    with tridrop.mc_dropout(layers) as names:
        assert names == ("0", "1", "2", "4", "5", "8")
        assert [m.training for m in layers] == [i not in (3, 6, 7) for i in range(9)]
    flat = nn.Sequential(layers[:2], layers[3:6], nn.Flatten(1), nn.LazyLinear(2)).to(DEVICE)
    flat.train()(normal(1, 9, 4))
    x = normal(5, 9, 4)
    both = [tridrop.mc_predict(flat, x, samples=8, seed=1, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(both[0].mean, both[1].mean)
    assert float(both[0].spread.min()) > 0
    with pytest.raises(RuntimeError, match="vectorize=False"):
        tridrop.mc_predict(nn.Sequential(layers[2]).to(DEVICE), x, samples=3, seed=1)
    tridrop.mc_predict(layers[2], x, samples=3, seed=1, vectorize=False)
    schedule = tridrop.DropoutSchedule(
        layers, tridrop.schedules.Linear(0.0, 0.4, steps=4), relative=True
    )
    schedule.step()
    assert schedule.names == ("0", "1", "2", "4", "5", "8")
    assert layers[0].prob == pytest.approx(0.05)
    assert layers[8].p == pytest.approx(0.03)


def test_swap_leaves_them_and_fuses_around_them():
    layers = model().train()
    layers[1].branch = Residual()
    layers[2] = tridrop.nn.LayerDrop([Residual() for _ in range(3)], 0.4)
    report = tridrop.swap(layers)
    assert "4 fused, 0 swapped" in str(report)
    assert "no such module" not in str(report)
    assert "left: it is tridrop's own" in str(report)
    assert layers.to(DEVICE)(normal(4, 13, 4)).dim() == 4
    tridrop.unswap(layers)


class Residual(nn.Module):
    """A block that swap fuses."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.3), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.drop(self.linear(x)))


# ---------------------------------------------------------------------------- tridrop check sees


def failures(op):
    results = check.run([op], [torch.float32], ["reference"], DEVICE, seeds=24)
    assert any(r.passed for r in results)
    return {r.check.removeprefix("invariant ") for r in results if r.passed is False}


def test_what_is_broken_is_found(monkeypatch):
    plain = choice.left
    monkeypatch.setattr(choice, "left", lambda n, p: plain(n, p) + 1)
    assert "kept" in failures("patch_dropout")
    assert "kept" in failures("drop_path_subset")
    depth, drop_block = tridrop.functional.depth, tridrop.functional.drop_block
    left = depth.left_layers
    monkeypatch.setattr(depth, "left_layers", lambda layers, p, seed: left(layers, p / 2, seed))
    assert "rate |z|" in failures("layer_drop")
    blocks = drop_block._blocks
    monkeypatch.setattr(
        drop_block, "_blocks", lambda seed, shape, p, size, eps: blocks(seed, shape, p, 1, eps)
    )
    assert {"outside blocks", "rate |z|"} <= failures("drop_block2d")
