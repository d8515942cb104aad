"""The verdicts of report.verify, what it leaves as it was, and models of libraries."""

from __future__ import annotations

import random
import sys
from unittest import mock

import numpy
import pytest
import torch
from swap_verified import X, half, module, verified
from torch import nn
from torch.nn import functional as F

import tridrop
from tridrop.swapping import generators
from tridrop.swapping.verify import AS_REPORTED, NEVER, OTHERWISE, READ, SILENT

# ------------------------------------------------------------------------------ other verdicts


class Reads(nn.Module):
    """Has three dropouts: it calls the first, reads the rate of the second, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Dropout(p) for p in (0.5, 0.25, 0.125))

    def forward(self, x, scale=False):
        p = self.second.p
        x = self.first(x)
        return x * p if scale else x


def test_what_is_never_called_and_whose_rate_is_only_read():
    report, found = verified(Reads(), X)
    assert [c.verdict for c in found.sites] == [AS_REPORTED, READ, NEVER]
    assert __file__ in found.sites[1].detail
    assert all("report.verify(batch)" in s.reason for s in report.sites[1:])
    assert "never called" in str(report)
    report.raise_if_unaccounted()
    assert "p" in vars(nn.Dropout(0.5))
    assert not hasattr(nn.modules.dropout._DropoutNd, "p")


def test_a_branch_that_is_not_taken_and_a_rate_of_0_are_no_drops():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.drop = 0.5, nn.Dropout(0.0)

        def forward(self, x, alibi=None):
            if alibi is not None:
                return F.scaled_dot_product_attention(x, x, x, dropout_p=self.p)
            return self.drop(F.scaled_dot_product_attention(x, x, x, dropout_p=0.0))

    model = Branches().train()
    report, found = verified(model, X)
    assert [c.verdict for c in found.sites] == [NEVER, SILENT]
    assert not found.drops()
    assert "Nothing in this model drops" not in str(report)  # of this batch alone
    found = report.verify(X, alibi=1)
    assert [c.verdict for c in found.sites] == [AS_REPORTED, NEVER]


def test_what_was_passed_in_belongs_to_no_site_and_raises():
    def forward(self, x, function):
        return function(x, x, x, None, 0.5)

    model = module(forward)
    report = tridrop.swap(model)
    assert not report.sites
    assert "Nothing in this model drops" not in str(report)
    assert "run report.verify(batch)" in str(report)
    with pytest.raises(RuntimeError, match=r"report\.verify\(batch\) first"):
        report.raise_if_unaccounted()
    found = report.verify(X, F.scaled_dot_product_attention)
    (draw,) = found.unreported
    line = forward.__code__.co_firstlineno + 1
    assert draw.line == f"{__file__}:{line}"
    assert draw.code == "return function(x, x, x, None, 0.5)"
    assert (draw.p, draw.before, draw.after) == (0.5, 1, 1)
    assert "belongs to no site" in str(report)
    with pytest.raises(RuntimeError, match="return function"):
        report.raise_if_unaccounted()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: random.gauss(0, 1),
        lambda: numpy.random.rand(),
        lambda: numpy.random.binomial(1, 0.5),
        lambda: torch.rand(1),
        lambda: torch.rand(1, generator=GENERATOR),
    ],
)
def test_generators_are_seen_by_their_moves(draw):
    def forward(self, x):
        _ = len(self.functions)
        for function in self.functions:
            x = x + float(function())
        return x

    model = module(forward)
    model.functions = {draw}  # what is called is known to nobody who reads
    _, found = verified(model, X)
    (seen,) = found.unreported
    assert __file__ in seen.line
    assert "lambda" in seen.code
    assert seen.before == seen.after >= 1


GENERATOR = torch.Generator()


def test_a_site_that_torch_draws_after_all_is_no_drop_as_reported():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    report = tridrop.swap(model)
    model[1].__class__ = nn.Dropout
    model[1].register_forward_hook(lambda *_: None)
    found = report.verify(X)
    assert [c.verdict for c in found.sites] == [OTHERWISE]
    assert "torch drew there" in found.sites[0].detail
    with pytest.raises(RuntimeError, match="torch drew there"):
        report.raise_if_unaccounted()


def test_a_rate_that_changed_since_the_report_is_told():
    model = nn.Sequential(nn.Dropout(0.5)).train()
    report = tridrop.swap(model)
    model[0].p = 0.25
    (checked,) = report.verify(X).sites
    assert checked.verdict == OTHERWISE
    assert "0.25, not 0.5" in checked.detail


def test_tridrops_own_modules_and_functions_are_accounted_for():
    def forward(self, x):
        return self.drop(tridrop.dropout(x, 0.25))

    _, found = verified(module(forward, drop=tridrop.nn.DropPath(0.5)), X)
    assert [c.verdict for c in found.sites] == [AS_REPORTED]
    assert [draw.by for draw in found.unreported] == ["tridrop.forward"]


# --------------------------------------------------------------------- nothing else is changed


def test_a_dry_run_says_whether_a_model_drops_and_where():
    model = Reads().eval()
    report = tridrop.swap(model, dry_run=True)
    found = report.verify(X)
    assert [c.verdict for c in found.sites] == [AS_REPORTED, READ, NEVER]
    assert found.cost.before.dropouts == found.cost.after.dropouts == 1
    assert type(model.first) is nn.Dropout
    assert not model.training
    assert report.to_dict()["verification"]["counts"][AS_REPORTED] == 1


def test_nothing_drops_is_said_where_it_is_so():
    linear = tridrop.swap(nn.Linear(8, 8))
    assert linear.certain
    assert "Nothing in this model drops" in str(linear)
    model = module(lambda self, x: x + 1)
    report = tridrop.swap(model)
    assert "Whether it drops is unknown" in str(report)
    report.verify(X)
    assert "Nothing in this model drops" in str(report)
    report.raise_if_unaccounted()


def test_generators_of_modules_and_of_everybody_are_put_back():
    def forward(self, x):
        x = x + torch.rand(1, generator=self.own) + self.python.random()
        return half(x) + self.numpy.random() + random.random() + numpy.random.rand()

    model = module(forward, own=torch.Generator(), python=random.Random(3))
    model.numpy = numpy.random.default_rng(3)

    def states():
        return [
            torch.get_rng_state().tolist(), model.own.get_state().tolist(), random.getstate(),
            model.python.getstate(), model.numpy.bit_generator.state,
            [str(s) for s in numpy.random.get_state()],
        ]  # fmt: skip

    before = states()
    _, found = verified(model, X)
    assert states() == before
    seen = {(draw.by, draw.before) for draw in found.unreported}
    by_site = {c.detail.partition(" ")[0] for c in found.sites}
    assert ("numpy.Generator", 1) in seen or "numpy.Generator" in by_site
    assert all(c.verdict == AS_REPORTED for c in found.sites)


def test_generators_of_accelerators_are_put_back():
    """On MPS there is one, whose functions take no device; elsewhere one a device."""
    state = {"mps": torch.tensor([1]), "xpu": torch.tensor([2])}
    for kind in state:
        backend = mock.Mock(spec=["get_rng_state", "set_rng_state"])

        def read(*device, kind=kind):
            assert len(device) == (kind != "mps")
            return state[kind]

        backend.get_rng_state = read
        backend.set_rng_state = lambda new, *device, kind=kind: state.update({kind: new})
        tensor = mock.Mock(device=torch.device(kind, 0))
        with mock.patch.object(torch, "get_device_module", lambda k, b=backend: b):
            found = generators.Generators(nn.Linear(1, 1), [tensor])
            with found.kept():
                state[kind] = torch.tensor([7])
        assert int(state[kind]) == {"mps": 1, "xpu": 2}[kind]


def test_a_profile_function_and_an_rng_block_are_left_as_they_are():
    events = []

    def profile(*event):
        events.append(event)

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    report = tridrop.swap(model)
    with tridrop.rng(3):
        expected = model(X)
    sys.setprofile(profile)
    try:
        with tridrop.rng(3):
            report.verify(X)
            found = model(X)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------- models of libraries


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.arange(8).reshape(2, 4)


def test_wavlm_is_left_in_its_attention_and_layer_drop_is_a_site():
    transformers = pytest.importorskip("transformers")
    sizes = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_buckets": 8}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.WavLMConfig(
        **{**SMALL, "num_hidden_layers": 2}, **sizes, intermediate_size=32,
        num_feat_extract_layers=2, layerdrop=1e-9,
    )  # fmt: skip
    report, found = verified(transformers.WavLMModel(config).train(), torch.randn(2, 200))
    checked = {c.site.code.partition("(")[0]: c for c in found.sites}
    attention = checked["F.multi_head_attention_forward"]
    assert (attention.site.status, attention.site.p) == ("left", 0.1)
    assert attention.verdict == AS_REPORTED
    drop = checked["torch.rand"]
    assert (drop.site.status, drop.verdict) == ("left", AS_REPORTED)
    report.raise_if_unaccounted()


@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_drops_in_the_branch_that_it_takes(alibi):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(**SMALL, alibi=alibi, attention_dropout=0.5)
    report, found = verified(transformers.FalconModel(config).train(), IDS)
    attention = [c for c in found.sites if "scaled_dot_product" in c.site.code]
    assert [(c.site.p, c.verdict) for c in attention] == [
        (0.5, AS_REPORTED if alibi else NEVER)
    ]  # fmt: skip
    report.raise_if_unaccounted()


def adapted(**options) -> nn.Module:
    """BERT without a dropout of its own, with adapters of PEFT's."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SMALL, **rates, intermediate_size=32)
    model = transformers.BertModel(config, add_pooling_layer=False)
    kind = getattr(peft, options.pop("kind"))
    return peft.get_peft_model(model, kind(target_modules=["query"], **options)).train()


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.5)])
@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_the_draws_of_loha_and_lokr_are_sites(kind, rates):
    model = adapted(kind=kind, r=4, module_dropout=rates[0], rank_dropout=rates[1])
    torch.manual_seed(1)
    report, found = verified(model, IDS)
    drawn = [c for c in found.sites if "torch.rand" in c.site.code]
    assert {c.site.code for c in drawn} == {"torch.rand(1)", "torch.rand(weight.size(0))"}
    verdicts = {c.site.code: c.verdict for c in drawn}
    assert verdicts["torch.rand(1)"] == AS_REPORTED  # whatever the rates
    assert verdicts["torch.rand(weight.size(0))"] == (AS_REPORTED if rates[1] else NEVER)
    assert {c.site.status for c in drawn} == {"left"}
    report.raise_if_unaccounted()


def test_the_dropout_of_oft_is_never_called():
    _, found = verified(adapted(kind="OFTConfig", r=0, oft_block_size=4, module_dropout=0.5), IDS)
    (checked,) = [c for c in found.sites if "oft_dropout" in c.site.module]
    assert (checked.site.status, checked.verdict) == ("left", NEVER)
    assert "Linear.forward does not name it" in checked.site.reason
    assert not found.drops()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_the_dropout_of_lora_drops_as_reported(options):
    model = adapted(kind="LoraConfig", r=4, lora_dropout=0.5, **options)
    report, found = verified(model, IDS)
    (checked,) = [c for c in found.sites if "lora_dropout" in c.site.module]
    assert checked.verdict == AS_REPORTED
    report.raise_if_unaccounted()
