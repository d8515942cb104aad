"""Schedules of drop rates: their values, what they set, and that nothing compiles again."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tridrop
from tridrop.schedules import Cosine, Curriculum, DropoutSchedule, Early, Late, Linear

SCHEDULES = {
    "linear": (Linear(0.1, 0.5, 10), lambda t: 0.1 + 0.4 * min(t, 10) / 10),
    "cosine": (Cosine(0.5, 0.1, 8), lambda t: 0.3 + 0.2 * math.cos(math.pi * min(t, 8) / 8)),
    "curriculum": (Curriculum(0.5, 0.1), lambda t: 0.5 * (1 - math.exp(-0.1 * t))),
    "early": (Early(0.3, 4), lambda t: 0.3 if t < 4 else 0),
    "early, linear": (Early(0.3, 4, linear=True), lambda t: max(0, 0.3 * (1 - t / 4))),
    "late": (Late(0.3, 4), lambda t: 0 if t < 4 else 0.3),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), tridrop.nn.Dropout(0.5), nn.Linear(8, 8))


def layer() -> nn.Module:
    return tridrop.nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)


def swapped() -> nn.Module:
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    tridrop.swap(model)
    return model


def block() -> nn.Module:
    return tridrop.nn.TransformerBlock(8, 2, p=0.2, attention_p=0.3, activation_p=0.1)


def path() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 8), tridrop.nn.DropPath(0.5), tridrop.nn.DropPath(0.25, False)
    )


MODELS = {"mlp": mlp, "layer": layer, "swapped": swapped, "block": block, "path": path}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_values(schedule, expected):
    for t in range(30):
        assert schedule(t) == pytest.approx(expected(t), rel=1e-14, abs=1e-16)
        assert 0 <= schedule(t) <= 1


@pytest.mark.parametrize(("schedule", "_"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_site_drops_at_the_rate_of_the_step(schedule, _):
    model = nn.Sequential(tridrop.nn.Dropout(0.5))
    made = DropoutSchedule(model, schedule)
    x = torch.ones(1, 64)
    for t in range(6):
        with tridrop.rng(7):
            found = model(x)
        with tridrop.rng(7):
            assert torch.equal(found, tridrop.dropout(x, schedule(t)))
        made.step()


@models
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_new_rate_does_not_compile_again(make, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, x = make(), torch.randn(2, 5, 8, requires_grad=True)
    schedule = DropoutSchedule(model, Linear(0.1, 0.8, 4), relative=make is block)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    results, compilations = [], []
    for _ in range(4):
        found = []
        for run in (model, compiled):
            with tridrop.rng(torch.tensor([7, 0])):
                out = run(x)
                found.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        results.append(found[0][0])
        compilations.append(counter.frame_count)
        schedule.step()
    assert compilations[0] > 0  # AOT Autograd may take two for the first call
    assert len(set(compilations)) == 1
    assert not torch.equal(results[0], results[3])


def test_torchs_own_dropout_takes_numbers_and_compiles_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    schedule = DropoutSchedule(model, Linear(0.1, 0.8, 4))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(2):
        compiled(torch.randn(2, 8))
        schedule.step()
    assert isinstance(model[1].p, float)
    assert counter.frame_count == 2


@models
@pytest.mark.parametrize("relative", [False, True])
def test_rates_are_set_and_given_back_and_no_key_changes(make, relative):
    model = make()
    keys = list(model.state_dict())
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    schedule = DropoutSchedule(model, Linear(0.0, 0.5, 2), relative=relative)
    assert list(model.state_dict()) == keys
    schedule.step()
    assert schedule.value == 0.25
    for rate in schedule._rates:
        value = getattr(rate.module, rate.attribute)
        assert isinstance(value, torch.Tensor)
        assert value.item() == (rate.base * 0.25 if relative else 0.25)
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    schedule.release()
    for name, module in model.named_modules():
        now = {k: v for k, v in vars(module).items() if "drop" in k or k == "p"}
        assert now == {k: before[name][k] for k in now}


def test_torchs_modules_and_drop_paths_of_libraries_are_set():
    class DropPath(nn.Module):  # timm's
        def __init__(self, drop_prob: float) -> None:
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x):
            if self.drop_prob == 0.0 or not self.training:
                return x
            keep_prob = 1 - self.drop_prob
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            random_tensor = torch.rand(shape, dtype=x.dtype, device=x.device)
            random_tensor = torch.floor(random_tensor + keep_prob)
            return x.div(keep_prob) * random_tensor

    model = nn.ModuleDict(
        {
            "drop": nn.Dropout(0.1),
            "spatial": nn.Dropout2d(0.1),
            "alpha": nn.AlphaDropout(0.1),
            "attention": nn.MultiheadAttention(4, 2, 0.1),
            "lstm": nn.LSTM(2, 2, 2, dropout=0.1),
            "path": DropPath(0.1),
            "none": nn.Dropout(0.0),
        }
    )
    schedule = DropoutSchedule(model, Linear(0.5, 0.5, 1))
    assert set(schedule.names) == set(model) - {"none"}
    for name, attribute in [("drop", "p"), ("attention", "dropout"), ("lstm", "dropout")]:
        assert getattr(model[name], attribute) == 0.5
    assert model["path"].drop_prob == 0.5
    assert model["none"].p == 0


def test_where_chooses():
    model = nn.Sequential(tridrop.nn.Dropout(0.5), tridrop.nn.DropPath(0.2))
    chosen = DropoutSchedule(
        model, Early(0.1, 3), where=lambda name, m: not isinstance(m, tridrop.nn.DropPath)
    )
    assert chosen.names == ("0",)
    assert model[1].drop_prob == 0.2


def test_rates_of_ones_own_are_warned_of():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = tridrop.nn.Dropout(0.1)
            self.hidden_dropout = 0.3

        def forward(self, x):
            return F.dropout(self.first(x), self.hidden_dropout, self.training)

    with pytest.warns(UserWarning, match=r"not scheduled: hidden_dropout = 0\.3"):
        DropoutSchedule(Own(), Early(0.1, 3))


@pytest.mark.parametrize("relative", [False, True])
def test_a_state_dict_brings_the_step_back(relative, tmp_path):
    model = layer()
    schedule = DropoutSchedule(model, Curriculum(0.5, 0.3), relative=relative)
    for _ in range(5):
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "state")
    fresh = layer()
    for drop in (fresh.dropout, fresh.dropout1):
        drop.p = 0.9  # the saved rates count
    other = DropoutSchedule(fresh, Curriculum(0.5, 0.3), relative=relative)
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert other.steps == 5
    for a, b in zip(schedule._rates, other._rates, strict=True):
        assert getattr(a.module, a.attribute) == getattr(b.module, b.attribute)
    schedule.step()
    other.step()
    assert model.dropout1.p == fresh.dropout1.p
    with pytest.raises(ValueError, match="other sites than this model"):
        DropoutSchedule(mlp(), Early(0.1, 3)).load_state_dict(schedule.state_dict())


def test_a_step_between_forward_and_backward_raises():
    model = mlp()
    schedule = DropoutSchedule(model, Linear(0.1, 0.5, 10))
    out = model(torch.randn(2, 8)).sum()
    schedule.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_schedule_made_in_inference_mode_serves_training():
    model = mlp()
    with torch.inference_mode():
        DropoutSchedule(model, Linear(0.4, 0.5, 2))
    with tridrop.rng(1):
        model(torch.ones(3, 8)).sum().backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    model[1].p = 0.4
    with tridrop.rng(1):
        model(torch.ones(3, 8)).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, found)


def test_a_copy_of_the_model_is_its_own():
    model = mlp()
    schedule = DropoutSchedule(model, Linear(0.0, 0.5, 2))
    copied = copy.deepcopy(model)
    schedule.step()
    assert model[1].p.item() == 0.25
    assert copied[1].p.item() == 0.0


def test_rate_zero_and_evaluation_are_the_identity():
    model = nn.Sequential(tridrop.nn.Dropout(0.5))
    DropoutSchedule(model, Early(0.5, 3))
    x = torch.randn(4, 4)
    assert torch.equal(model.eval()(x), x)
    model.train()[0].p.fill_(0.0)
    assert torch.equal(model(x), x)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Linear(0.0, 1.5, 3), ValueError, "end = 1.5"),
        (lambda: Linear(0.0, 0.5, 0), ValueError, "1 or more"),
        (lambda: Cosine(-1, 0.5, 3), ValueError, "start = -1"),
        (lambda: Curriculum(0.5, 0.0), ValueError, "positive"),
        (lambda: Early(0.5, 2.0), ValueError, "steps = 2.0"),
        (lambda: Late(2.0, 2), ValueError, "p = 2"),
        (lambda: DropoutSchedule(nn.Linear(2, 2), Early(0.1, 2)), ValueError, "none has a rate"),
        (lambda: DropoutSchedule(mlp(), 0.5), TypeError, "function of the step"),
        (lambda: DropoutSchedule(len, Early(0.1, 2)), TypeError, "give a torch"),
        (lambda: DropoutSchedule(mlp(), lambda t: 2.0), ValueError, r"must lie in \[0, 1\]"),
        (
            lambda: [DropoutSchedule(m, Early(0.1, 2)) for m in [mlp()] * 2],
            ValueError,
            "call that schedule's release",
        ),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()
