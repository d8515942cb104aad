"""The dropout family: torch.nn's and Keras' other kinds, beside :func:`tridrop.dropout`."""

import math
import warnings

import pytest
import torch
from hosts import DEVICE, PLAIN
from scipy import stats
from torch import nn

import tridrop
from tridrop.commands.check.measure import MAX_Z, error, tolerance
from tridrop.contract import noise
from tridrop.contract.mask import ONE, philox, threshold

BACKENDS = (PLAIN, "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


# ------------------------------------------------------------------------------- torch's values


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dropout1d", (6, 5, 7)), ("dropout1d", (5, 7)), ("dropout2d", (6, 5, 3, 4)),
        ("dropout3d", (2, 5, 2, 3, 4)), ("dropout3d", (5, 2, 3, 4)),
    ],
)  # fmt: skip
def test_feature_dropout_is_dropout_of_whole_channels(name, shape, backend):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    out = getattr(tridrop, name)(x, 0.4, seed=4)
    batched = shape if len(shape) in (3, 5) or name == "dropout2d" else (1, *shape)
    noise_shape = (None, None, *(1,) * (len(batched) - 2))
    keep = tridrop.keep_mask(4, batched, 0.4, noise_shape=noise_shape, device=DEVICE)
    expected = (x * (ONE / (ONE - threshold(0.4)))).where(keep.view(shape), 0)
    torch.testing.assert_close(out, expected)
    assert 0 < int(keep.sum()) < keep.numel()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, keep.view(shape))


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d"])
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5, 6])
def test_dimensions_are_taken_as_torch_takes_them(name, dims):
    """What torch refuses is refused, and what it warns of is warned of."""
    x = torch.ones(*range(2, 2 + dims))

    def outcome(module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                out = getattr(module, name)(x, 0.5, True)
            except (RuntimeError, ValueError):
                return "refused"
        # Whether a channel is whole, and which dimensions share it.
        shared = tuple(
            bool((out == out.select(dim, 0).unsqueeze(dim)).all()) for dim in range(1, dims)
        )
        return len(caught) > 0, tuple(out.shape), shared

    torch.manual_seed(2)
    ours, theirs = outcome(tridrop), outcome(torch.nn.functional)
    if "refused" in (ours, theirs):
        assert ours == theirs
    else:
        assert ours[:2] == theirs[:2]
        # The trailing dimensions of a map are shared in both.
        assert ours[2][2:] == theirs[2][2:]


# -------------------------------------------------------------------------------- alpha dropout


def alpha_eager(x, keep, p):
    """torch's formula, with a given mask."""
    a = ((noise.ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    kept = keep.to(x.dtype)
    return x * (kept * a) + ((kept - 1) * -noise.ALPHA * a - noise.ALPHA * a * p)


@pytest.mark.parametrize("noise_shape", [None, (None, 1, None), (None, None, 1)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_alpha_dropout_is_torchs_formula_with_the_exported_mask(p, noise_shape, backend):
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(6, 7, 40, dtype=torch.float64, generator=generator)
    x = wide.float().to(DEVICE).requires_grad_()
    keep = tridrop.keep_mask(3, x.shape, p, noise_shape=noise_shape, device=DEVICE)
    out = tridrop.alpha_dropout(x, p, True, noise_shape=noise_shape, seed=3)
    exact = threshold(p) / ONE
    expected = alpha_eager(x.double(), keep, exact)
    assert error(out.detach(), expected.detach()) <= tolerance(alpha_eager(x, keep, p), expected)
    grad = torch.randn(x.shape, generator=generator).to(DEVICE)
    (found,) = torch.autograd.grad(out, x, grad)
    a = noise.scale("alpha", threshold(p))
    torch.testing.assert_close(found, torch.where(keep, grad * a, 0.0))


def test_alpha_dropout_keeps_mean_and_variance(backend):
    """Of standard normal input; z-tests of both moments."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 400, generator=generator).to(DEVICE)
    for p in (0.1, 0.5):
        out = tridrop.alpha_dropout(x, p, True, seed=4).double()
        n = out.numel()
        deviation = float((out**2).std())
        assert abs(float(out.mean())) * math.sqrt(n) < MAX_Z
        assert abs(float((out**2).mean()) - 1) / deviation * math.sqrt(n) < MAX_Z


def test_alpha_dropout_at_the_ends(backend):
    x = torch.tensor([1.0, math.nan, math.inf, -2.0], device=DEVICE)
    assert torch.equal(tridrop.alpha_dropout(x, 1.0, True), torch.zeros(4, device=DEVICE))
    assert tridrop.alpha_dropout(x, 0.0, True) is x
    assert tridrop.alpha_dropout(x, 0.5) is x  # torch's default: not training
    dropped = ~tridrop.keep_mask(1, (4,), 0.5, device=DEVICE)
    out = tridrop.alpha_dropout(torch.full((4,), math.nan, device=DEVICE), 0.5, True, seed=1)
    assert torch.equal(out.isfinite(), dropped)


def test_feature_alpha_dropout_has_one_decision_a_map(backend):
    out = tridrop.feature_alpha_dropout(torch.randn(8, 6, 4, 4, device=DEVICE), 0.5, True, seed=1)
    keep = tridrop.keep_mask(1, out.shape, 0.5, noise_shape=(8, 6, 1, 1), device=DEVICE)
    maps = out.flatten(2)
    assert torch.equal((maps == maps[:, :, :1]).all(2), ~keep[:, :, 0, 0])
    with pytest.raises(ValueError, match="two dimensions or more"):
        tridrop.feature_alpha_dropout(torch.ones(3), 0.5, True)


# ----------------------------------------------------------------------------- Gaussian dropout


@pytest.mark.parametrize("noise_shape", [None, (None, 1, None), (None, None, 1)])
def test_gaussian_dropout_multiplies_by_the_exported_noise(noise_shape, backend):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 6, 43, generator=generator).to(DEVICE).requires_grad_()
    n = tridrop.normal_noise(3, x.shape, noise_shape=noise_shape, device=DEVICE)
    sigma = math.sqrt(0.3 / 0.7)
    out = tridrop.gaussian_dropout(x, 0.3, noise_shape=noise_shape, seed=3)
    expected = x.double() * (1 + sigma * n.double())
    assert error(out.detach(), expected.detach()) <= tolerance(x * (1 + sigma * n), expected)
    grad = torch.randn(x.shape, generator=generator).to(DEVICE)
    (found,) = torch.autograd.grad(out, x, grad)
    wide = grad.double() * (1 + sigma * n.double())
    assert error(found, wide) <= tolerance(grad * (1 + sigma * n), wide)
    again = tridrop.gaussian_dropout(x, torch.tensor(0.3, device=DEVICE), True, seed=3,
                                     noise_shape=noise_shape)  # fmt: skip
    torch.testing.assert_close(again, out)


def test_normal_numbers_are_box_and_mullers():
    """Against fp64, at the ends of both words and in between."""
    torch.manual_seed(0)
    ends = [0, 1, 127, (1 << 29) - 1, 1 << 29, (1 << 30) - 1, 1 << 30, ONE // 2, ONE - 129, ONE - 1]
    first, second = torch.meshgrid(
        torch.cat((torch.tensor(ends), torch.randint(ONE, (500,)))),
        torch.cat((torch.tensor(ends), torch.randint(ONE, (500,)))),
        indexing="ij",
    )
    u = (first.float() + 0.5).double() * 2.0**-32
    part = second % (1 << 30)
    part = torch.where(part >= 1 << 29, part - (1 << 30), part)
    angle = (second >> 30).double() * (math.pi / 2) + part.double() * (2 * math.pi / ONE)
    radius = torch.sqrt(-2 * torch.log(u))
    for found, direction in zip(
        noise.box_muller(first, second), (torch.cos(angle), torch.sin(angle)), strict=True
    ):
        difference = (found.double() - radius * direction).abs()
        assert float(difference.max()) < 8 * torch.finfo(torch.float32).eps


def test_normal_numbers_are_standard_normal_and_independent():
    n = tridrop.normal_noise(11, (512, 2048)).double()
    size = n.numel()
    assert stats.kstest(n.flatten()[::7].numpy(), "norm").pvalue > 1e-6
    assert abs(float(n.mean())) * math.sqrt(size) < MAX_Z
    assert abs(float((n**2).mean()) - 1) * math.sqrt(size / 2) < MAX_Z
    for lag in range(1, 9):  # neighbours in a call, in a pair and across calls; and their squares
        for t in (n, n**2 - 1):
            together = t[:, lag:] * t[:, :-lag]
            z = float(together.mean()) / float(together.std()) * math.sqrt(together.numel())
            assert abs(z) < MAX_Z


def test_normal_numbers_follow_the_contract():
    """docs/mask-contract.md, computed for single elements."""
    seed, shape = (5 << 33) + 3, (3, 4, 21)
    n = tridrop.normal_noise(seed, shape)
    key = [torch.tensor(seed % ONE), torch.tensor(seed // ONE)]
    for index in ((0, 0, 0), (1, 3, 20), (2, 1, 6), (0, 2, 11)):
        row, col = index[0] * 4 + index[1], index[2]
        counter = [torch.tensor(w) for w in (col // 4, row, 0, 3 << 28)]
        words = philox(counter, key)
        pair = words[:2] if col % 4 < 2 else words[2:]
        assert noise.box_muller(*pair)[col % 2] == n[index]


def test_shards_have_the_noise_of_the_whole(backend):
    whole = tridrop.normal_noise(7, (12, 37), device=DEVICE)
    shard = tridrop.Shard((12, 37), (5, 3))
    part = tridrop.normal_noise(7, (4, 22), shard=shard, device=DEVICE)
    assert error(part, whole[5:9, 3:25]) <= 8 * torch.finfo(torch.float32).eps
    x = torch.ones(4, 22, device=DEVICE)
    out = tridrop.gaussian_dropout(x, 0.5, shard=shard, seed=7)
    torch.testing.assert_close(out, 1 + part)


def test_gaussian_dropout_refuses_infinite_noise():
    with pytest.raises(ValueError, match=r"p = 1\.0; Gaussian dropout"):
        tridrop.gaussian_dropout(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        tridrop.gaussian_dropout(torch.ones(2), 1.5)


# ----------------------------------------------------------------------- what all of them share

FUNCTIONS = {
    "dropout1d": (4, 6, 8), "dropout2d": (2, 6, 4, 4), "dropout3d": (2, 4, 2, 4, 4),
    "alpha_dropout": (6, 40), "feature_alpha_dropout": (4, 6, 8), "gaussian_dropout": (6, 40),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_transformed_and_differentiated_twice(name):
    function = getattr(tridrop, name)
    x = torch.randn(FUNCTIONS[name], dtype=torch.float64, requires_grad=True)
    seed = tridrop.new_seed()

    def call(x):
        return function(x, 0.3, True, seed=seed)

    expected = call(x)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    torch.autograd.gradcheck(call, x)
    torch.autograd.gradgradcheck(call, x)
    pulled = torch.func.vjp(call, x)[1](torch.ones_like(expected))[0]
    assert torch.equal(pulled, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_of_the_noise_is_saved(name):
    kept = []
    x = torch.randn(FUNCTIONS[name], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(tridrop, name)(x, 0.3, True)
    assert sum(t.nbytes for t in kept) == 16


# ------------------------------------------------------------------------------------- modules

MODULES = ("Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
INPUTS = {"Dropout1d": (4, 6, 8), "Dropout2d": (2, 6, 4, 4), "Dropout3d": (2, 4, 2, 4, 4),
          "AlphaDropout": (6, 40), "FeatureAlphaDropout": (4, 6, 8)}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs_by_name_arguments_and_type(name):
    theirs, ours = getattr(nn, name)(0.3, True), getattr(tridrop.nn, name)(0.3, True)
    assert isinstance(ours, getattr(nn, name))
    assert (repr(ours), ours.state_dict()) == (repr(theirs), theirs.state_dict())
    x = torch.randn(INPUTS[name])
    assert ours.eval()(x) is x
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        getattr(tridrop.nn, name)(1.5)
    for inplace in (False, True):
        module = getattr(tridrop.nn, name)(0.5, inplace)
        given = x.clone()
        with tridrop.rng(3):
            out = module(given)
        assert (out is given) == inplace
        with tridrop.rng(3):
            assert torch.equal(module(x.clone()), out)
        assert not torch.equal(out, x)


@pytest.mark.parametrize("name", MODULES)
def test_swap_takes_them_over_and_gives_them_back(name):
    model = nn.Sequential(nn.Identity(), getattr(nn, name)(0.5)).train()
    tridrop.nn.number_sites(model)
    report = tridrop.swap(model)
    assert "0 fused, 1 swapped, 0 left" in str(report)
    assert type(model[1]) is not getattr(nn, name)
    assert isinstance(model[1], getattr(tridrop.nn, name))
    x = torch.randn(INPUTS[name])
    with tridrop.rng(5):
        first = model(x)
    with tridrop.rng(5):
        assert torch.equal(model(x), first)
    tridrop.unswap(model)
    assert type(model[1]) is getattr(nn, name)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_keras_spatial_dropout(dimensions, data_format):
    layer = getattr(tridrop.nn, f"SpatialDropout{dimensions}D")(0.5, data_format, seed=1)
    x = torch.ones(4, *range(2, 2 + dimensions), 16)
    if data_format == "channels_first":
        x = x.movedim(-1, 1)
    assert layer.eval()(x) is x
    first, second = layer(x, training=True), layer(x, training=True)
    assert not torch.equal(first, second)
    maps = (first.movedim(-1, 1) if data_format == "channels_last" else first).flatten(2)
    assert bool((maps == maps[:, :, :1]).all())
    assert set(maps.unique().tolist()) == {0.0, 2.0}
    other = type(layer)(0.5, data_format, seed=1)
    assert torch.equal(other(x, training=True), first)
    assert torch.equal(other.train()(x), second)
    assert layer.train()(x, training=False) is x
    with pytest.raises(ValueError, match=f"takes {dimensions + 2} dimensions"):
        layer(torch.ones(2, 2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="data_format"):
        type(layer)(0.5, "last")


@pytest.mark.parametrize("refused", [[1.0, 2.0], torch.ones(3, dtype=torch.int64), 1.0])
def test_a_refused_call_of_a_layer_with_a_seed_does_not_count(refused):
    layer = tridrop.nn.GaussianDropout(0.5, seed=1)
    with pytest.raises(TypeError, match="input"):
        layer(refused)
    x = torch.ones(64)
    assert torch.equal(layer(x), tridrop.nn.GaussianDropout(0.5, seed=1)(x))


def test_a_layers_own_sequence_of_seeds_cannot_be_recomputed():
    layer = tridrop.nn.GaussianDropout(0.5, seed=1)
    x = torch.ones(8, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="being recomputed in backward"):
        out.sum().backward()
    with tridrop.rng(3):
        layer.site = 0
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert repr(layer) == "GaussianDropout(rate=0.5, seed=1)"
