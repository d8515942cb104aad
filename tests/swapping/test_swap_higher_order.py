"""Models that call torch's operators that take functions: flex_attention, cond."""

import warnings

import pytest
import torch
from hosts import DEVICE
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tridrop
from tridrop.swapping.verify import AS_REPORTED, SILENT

# Of flex_attention torch has no backward on a CPU.
TRAINS = DEVICE != "cpu"


@pytest.fixture(autouse=True)
def uncompiled():
    """Without torch.compile flex_attention warns that it makes all scores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


class Flex(nn.Module):
    """An attention layer whose own dropout its attention has no argument for."""

    def __init__(self, p=0.2):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.attention_drop, self.drop = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x):
        parts = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        causal = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, x.shape[1], x.shape[1], x.device
        )
        y = flex_attention(*parts, block_mask=causal).transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.drop(self.out(y)))


def flex_of(x):
    q = x.view(*x.shape[:2], 2, 16).transpose(1, 2)
    return flex_attention(q, q, q).transpose(1, 2).reshape(x.shape)


def helper(x, training):
    return F.dropout(flex_of(x), 0.5, training)


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(helper(x, self.training))


def data():
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def test_flex_attention_is_left_and_the_rest_is_fused_and_verified():
    torch.manual_seed(0)
    model = Flex().to(DEVICE).train().requires_grad_(TRAINS)
    expected = model.eval()(data())
    report = tridrop.swap(model.train())
    found = report.verify(data())
    verdicts = {c.site.code: c.verdict for c in found.sites}
    assert verdicts["self.drop(self.out(y))"] == AS_REPORTED
    # A dropout for attention that nothing calls, as where flex_attention took its place.
    assert sum(v != AS_REPORTED for v in verdicts.values()) == 1
    assert found.unaccounted() == []
    assert found.cost.before.dropouts == found.cost.after.dropouts == 1
    torch.testing.assert_close(model.eval()(data()), expected)


def test_flex_attention_in_a_helper_that_drops():
    """It runs while torch's functions are caught."""
    model = Helped().to(DEVICE).train().requires_grad_(TRAINS)
    report = tridrop.swap(model)
    assert report.verify(data()).counts()[AS_REPORTED] == 1
    stream = report.sites[0].stream
    with tridrop.rng(5):
        found = model(data())
    seed = tridrop.fold_in(torch.tensor([5, 0], device=DEVICE), stream)
    attended = tridrop.dropout(flex_of(data()), 0.5, seed=seed)
    torch.testing.assert_close(found, model.linear(attended))


class Chosen(nn.Module):
    """Drops in functions that do not name the module, of which an operator runs one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        return torch.cond(
            y.sum() > y.sum() - 1, lambda z: F.dropout(z, 0.5), lambda z: F.dropout(z, 0.25), (y,)
        )


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (lambda z: F.dropout(z, 0.5))(self.linear(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_function_that_an_operator_is_given_is_seen(frozen):
    """With gradients cond traces its functions first, with tensors that stand for others."""
    model = Chosen().to(DEVICE).train().requires_grad_(not frozen)
    report = tridrop.swap(model)
    found = report.verify(torch.ones(4, 8, device=DEVICE))
    assert found.unaccounted() == []
    run, other = found.sites
    assert (run.verdict, run.site.p) == (AS_REPORTED, 0.5)
    assert run.before == run.after == 1
    assert other.before == other.after == 0
    assert other.verdict == "never called" if frozen else SILENT
    assert found.cost.before.dropouts == found.cost.after.dropouts == 1
    kept = 4 * 8 * 4  # what the linear layer keeps
    assert frozen or kept <= found.cost.after.saved_bytes <= 4 * kept


def test_a_function_that_does_not_name_its_module():
    model = Called().to(DEVICE).train()
    (checked,) = tridrop.swap(model).verify(torch.ones(4, 8, device=DEVICE)).sites
    assert (checked.verdict, checked.before, checked.after) == (AS_REPORTED, 1, 1)
