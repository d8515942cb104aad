"""tridrop.mc_dropout and mc_predict: what is on, and which network each member is."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tridrop

CLASSES = 3


def mlp(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), tridrop.nn.Dropout(p), nn.Tanh(), nn.Dropout(p), nn.Linear(8, CLASSES)
    ).double()


def attention() -> nn.Module:
    torch.manual_seed(0)
    block = tridrop.nn.TransformerBlock(8, 2, p=0.2, attention_p=0.3, activation_p=0.2)
    tridrop.nn.number_sites(block)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(7 * 8, CLASSES)).double()


def encoder(swapped: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(56, CLASSES),
    ).double()
    if swapped:
        tridrop.swap(model)
    return model


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.5),
        nn.Flatten(), tridrop.nn.Dropout(0.5), nn.Linear(64, CLASSES),
    ).double()  # fmt: skip


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


MODELS = {
    "mlp": (mlp, (6,)),
    "attention": (attention, (7, 8)),
    "torch's encoder": (lambda: encoder(False), (7, 8)),
    "swapped encoder": (lambda: encoder(True), (7, 8)),
    "cnn": (cnn, (1, 6, 6)),
}
models = pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of sums in matrix products: float64, numbers of about 1."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


class Own(nn.Module):
    """A forward that drops by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.rate = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return F.dropout(x, self.rate, self.training)


class OwnRate(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout_p = self.rate if self.training else 0.0
        return F.dropout(self.norm(x), dropout_p)


class Both(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + 1
        return F.dropout(x, self.rate, training=self.training)


def test_only_what_drops_is_in_training_mode_and_all_comes_back():
    model = cnn().train()
    model[5].eval()
    before = [m.training for m in model.modules()]
    with tridrop.mc_dropout(model) as names:
        on = {name for name, m in model.named_modules() if m.training}
        assert on == set(names) == {"3", "5"}
        model(draw(4, 1, 6, 6))
    assert [m.training for m in model.modules()] == before
    assert int(model[1].num_batches_tracked) == 0


def test_modes_come_back_after_an_error():
    model = mlp().train()
    with pytest.raises(KeyError), tridrop.mc_dropout(model):
        raise KeyError
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", [Own, OwnRate])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_forward_that_drops_by_its_own_training(kind, swapped):
    model = nn.Sequential(kind()).eval()
    if swapped:
        tridrop.swap(model)
    with tridrop.mc_dropout(model) as names, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names == ("0",)
        assert not model[0].norm.training
        assert 0 < int((model(torch.ones(50, 6)) == 0).sum()) < 300


def test_other_uses_of_training_are_warned_of():
    with pytest.warns(UserWarning, match=r"Both.forward, line \d+"), tridrop.mc_dropout(Both()):
        pass


def test_what_cannot_be_read_is_turned_on_and_warned_of():
    names: dict[str, object] = {"nn": nn, "F": F}
    exec(
        "class Hidden(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return F.dropout(x, 0.5, self.training)\n",
        names,
    )
    model = names["Hidden"]().eval()
    with pytest.warns(UserWarning, match="could not be read"), tridrop.mc_dropout(model):
        assert int((model(torch.ones(1000)) == 0).sum()) > 0


def test_torch_scripts_are_warned_of():
    model = nn.Sequential(nn.Dropout(0.5), torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.warns(UserWarning, match="TorchScript"), tridrop.mc_dropout(model):
        pass


def test_nothing_that_drops_raises():
    for model in (nn.Linear(2, 2), nn.LSTM(2, 2, 2), nn.MultiheadAttention(4, 2)):
        with pytest.raises(ValueError, match="nothing in this"), tridrop.mc_dropout(model):
            pass
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"), tridrop.mc_dropout(len):
        pass


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(2, 3, 2, dropout=0.5), lambda: nn.MultiheadAttention(4, 2, 0.5)]
)
def test_torchs_own_that_drop_inside(make):
    model = make().eval()
    with tridrop.mc_dropout(model):
        assert model.training
    assert not model.training


def test_torchs_encoder_leaves_its_inference_path():
    model, x = encoder(False).eval(), draw(2, 7, 8)
    with torch.no_grad():
        plain = model(x)
        with tridrop.mc_dropout(model):
            assert float((model(x) - plain).abs().max()) > 0.01


def test_a_member_is_the_exported_masks():
    model = nn.Sequential(nn.Linear(6, 8), tridrop.nn.Dropout(0.5), nn.Linear(8, 2)).double()
    tridrop.nn.number_sites(model)
    x = draw(4, 6)
    p = tridrop.mc_predict(model, x, samples=3, seed=9, keep_samples=True)
    for s in range(3):
        keep = tridrop.keep_mask(tridrop.fold_in(tridrop.fold_in(9, s), 0), (1, 8), 0.5)
        expected = model[2](torch.where(keep, model[0](x) * 2, 0))
        close(p.samples[s], expected)


@models
def test_an_input_alone_is_the_same_as_in_a_batch(make, shape):
    model, x = make(), draw(5, *shape)
    whole = tridrop.mc_predict(model, x, samples=4, seed=3, keep_samples=True).samples
    alone = tridrop.mc_predict(model, x[2:3], samples=4, seed=3, keep_samples=True).samples
    close(alone[:, 0], whole[:, 2])
    assert float(whole.std(0).min()) > 0


@models
@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 1000])
def test_chunks_do_not_matter(make, shape, chunk):
    model, x = make(), draw(5, *shape)
    arguments = {"samples": 4, "seed": 3, "output": "logits", "keep_samples": True}
    first = tridrop.mc_predict(model, x, **arguments)
    second = tridrop.mc_predict(model, x, **arguments, chunk=chunk)
    for name in ("mean", "spread", "entropy", "mutual_information", "samples"):
        close(getattr(second, name), getattr(first, name))


@models
def test_one_at_a_time_is_the_same(make, shape):
    model, x = make(), draw(3, *shape)
    first = tridrop.mc_predict(model, x, samples=3, seed=3, keep_samples=True)
    second = tridrop.mc_predict(model, x, samples=3, seed=3, keep_samples=True, vectorize=False)
    close(first.samples, second.samples)


@models
def test_a_member_alone_is_the_same_as_among_others(make, shape):
    model, x = make(), draw(3, *shape)
    all_ = tridrop.mc_predict(model, x, samples=5, seed=3, keep_samples=True)
    some = tridrop.mc_predict(model, x, members=[4, 1], seed=3, keep_samples=True)
    close(some.samples, all_.samples[[4, 1]])
    assert some.members == (4, 1)
    other = tridrop.mc_predict(model, x, members=[4], seed=4, keep_samples=True)
    assert float((other.samples - some.samples[:1]).abs().max()) > 1e-3


def test_torchs_generator_is_left_alone():
    model = mlp()
    state = torch.get_rng_state()
    tridrop.mc_predict(model, draw(2, 6), samples=2, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_drawn_seed_is_returned_and_repeats():
    model, x = mlp(), draw(2, 6)
    first = tridrop.mc_predict(model, x, samples=3)
    assert torch.equal(tridrop.mc_predict(model, x, samples=3, seed=first.seed).mean, first.mean)
    assert tridrop.mc_predict(model, x, samples=3).seed != first.seed


@pytest.mark.parametrize("output", ["values", "logits", "probabilities"])
def test_the_figures_are_those_of_the_samples(output):
    model, x = mlp(), draw(4, 6)
    if output == "probabilities":
        model.append(nn.Softmax(-1))
    p = tridrop.mc_predict(model, x, samples=7, seed=2, output=output, keep_samples=True)
    torch.testing.assert_close(p.mean, p.samples.mean(0))
    torch.testing.assert_close(p.spread, p.samples.std(0))
    if output == "values":
        assert p.entropy is None
        assert p.mutual_information is None
        return
    mean = p.samples.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    information = entropy + (p.samples * p.samples.log()).sum(-1).mean(0)
    torch.testing.assert_close(p.entropy, entropy)
    torch.testing.assert_close(p.mutual_information, information)
    close(p.samples.sum(-1), torch.ones(7, 4).double())


def test_members_that_agree_and_members_that_do_not():
    """Two classes: certain members that disagree have all of ln 2, a model of no spread has 0."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = tridrop.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            said = self.drop(torch.ones(len(x), 1)) > 0
            return torch.cat((said, ~said), 1).float()

    p = tridrop.mc_predict(Sure(), torch.ones(2, 1), samples=200, seed=1, output="probabilities")
    torch.testing.assert_close(p.entropy, p.mutual_information)
    share = p.mean[0, 0].item()
    assert abs(share - 0.5) < 6 * math.sqrt(0.25 / 200)
    assert p.entropy[0].item() == pytest.approx(
        -share * math.log(share) - (1 - share) * math.log(1 - share)
    )
    none = tridrop.mc_predict(mlp(p=0.0), draw(2, 6), samples=5, output="logits")
    close(none.mutual_information, torch.zeros(2).double())
    close(none.spread, torch.zeros(2, CLASSES).double())


def test_one_member_has_no_spread():
    assert tridrop.mc_predict(mlp(), draw(2, 6), members=[0]).spread.isnan().all()


def test_the_class_dimension_may_be_another():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), tridrop.nn.Dropout(0.5)).double()
    p = tridrop.mc_predict(model, draw(2, 1, 3, 3), samples=3, output="logits", dim=1)
    assert p.entropy.shape == (2, 3, 3)
    torch.testing.assert_close(p.mean.sum(1), torch.ones(2, 3, 3).double())


def test_several_inputs_and_calls():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = tridrop.nn.Dropout(0.5)

        def forward(self, a, b):
            return {"out": self.drop(a) + b}

    x = (draw(3, 4), draw(3, 4))
    model = Two()
    p = tridrop.mc_predict(model, x, samples=2, seed=1, call=lambda a, b: model(a, b)["out"])
    assert p.mean.shape == (3, 4)
    with pytest.raises(TypeError, match=r"returned a dict; give call=lambda"):
        tridrop.mc_predict(model, x)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = tridrop.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) if x.sum() > 0 else -self.drop(x)


def test_models_that_vmap_does_not_take():
    x = draw(3, 4)
    with pytest.raises(RuntimeError, match="pass vectorize=False"):
        tridrop.mc_predict(Branch(), x)
    assert tridrop.mc_predict(Branch(), x, vectorize=False, samples=2).mean.shape == (3, 4)
    lstm = nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True).double()
    p = tridrop.mc_predict(
        lstm, draw(3, 5, 4), call=lambda x: lstm(x)[0], samples=4, seed=1, vectorize=False
    )
    assert float(p.spread.max()) > 0
    again = tridrop.mc_predict(
        lstm, draw(3, 5, 4)[1:2], call=lambda x: lstm(x)[0], samples=4, seed=1, vectorize=False
    )
    close(again.mean, p.mean[1:2])


def test_half_precision_is_summed_in_float32():
    p = tridrop.mc_predict(mlp().bfloat16(), draw(3, 6).bfloat16(), samples=3, output="logits")
    assert p.mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"output": "classes"}, ValueError, "known: 'values'"),
        ({"samples": 0}, ValueError, "number of members"),
        ({"members": []}, ValueError, "at least one"),
        ({"members": [-1]}, ValueError, "0 or more"),
        ({"chunk": 0}, ValueError, "1 or more"),
        ({"seed": 1.5}, TypeError, "seed is 1.5"),
        ({"output": "probabilities"}, ValueError, "the outputs have values below 0"),
        ({"output": "logits", "dim": 0}, ValueError, "give dim"),
        ({"x": "text"}, TypeError, "give a tensor"),
        ({"x": torch.ones(0, 6)}, ValueError, "one or more"),
        ({"x": (torch.ones(2, 6), torch.ones(3, 6))}, ValueError, "first dimension"),
        ({"call": lambda x: x.sum()}, ValueError, "for a batch of one"),
        ({"call": lambda x: x.long()}, TypeError, "dtype torch.int64"),
    ],
)
def test_errors(arguments, error, match):
    arguments = {"x": draw(2, 6), "samples": 2, **arguments}
    with pytest.raises(error, match=match):
        tridrop.mc_predict(mlp(), arguments.pop("x"), **arguments)


def test_the_progress_bar_counts_members(capsys):
    tridrop.mc_predict(mlp(), draw(2, 6), samples=3, progress=True)
    assert "100%" in capsys.readouterr().out
