"""report.verify: what drops by any route is a site of the report, or is said to belong to none."""

from __future__ import annotations

import functools
import random
import types

import numpy
import pytest
import torch
from swap_verified import X, attend, half, module, verified
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import dropout as other_name

import tridrop
from tridrop.swapping.verify import AS_REPORTED, NEVER

# ------------------------------------------------------------------- what is swapped, by any name


def helper_that_drops(x):
    return F.dropout(x, 0.5)


def helper_that_attends(x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def helper_of_a_helper(x):
    return helper_that_attends(x)


class Tool:
    """No module: a plain object with a method that drops."""

    def apply(self, x):
        return half(x)


def by_other_name(self, x):
    return other_name(x, 0.5)


def by_partial(self, x):
    return half(x)


def by_torch_dropout(self, x):
    return torch.dropout(x, 0.5, self.training)


def by_torch_dropout_with_names(self, x):
    return torch.dropout(input=x, p=0.5, train=self.training)


def by_a_variable(self, x):
    drop = F.dropout
    return drop(x, 0.5)


def by_a_partial_in_a_variable(self, x):
    drop = functools.partial(F.dropout, p=0.5)
    return drop(x)


def by_a_default(self, x, drop=half):
    return drop(x)


def by_an_attribute(self, x):
    return self.function(x)


def by_a_list(self, x):
    for i in range(1):
        x = self.functions[i](x)
    return x


def by_a_tool(self, x):
    return self.tool.apply(x)


def by_a_helper(self, x):
    return helper_that_drops(x)


def by_computed_arguments(self, x):
    return F.dropout(x, **dict(p=0.5))  # noqa: C408


def attention_by_a_helper(self, x):
    return helper_that_attends(x)


def attention_by_a_helper_of_a_helper(self, x):
    return helper_of_a_helper(x)


def attention_by_computed_arguments(self, x):
    return F.scaled_dot_product_attention(x, x, x, **dict(dropout_p=0.5))  # noqa: C408


def attention_by_an_attribute(self, x):
    return self.function(x, x, x, dropout_p=0.5)


def attention_by_another_name(self, x):
    return attend(x, x, x, dropout_p=0.5)


def attention_by_a_variable(self, x):
    function = F.scaled_dot_product_attention
    return function(x, x, x, None, 0.5)


def attention_by_an_argument(self, x, function):
    return function(x, x, x, dropout_p=0.5)


SWAPPED = [
    (by_other_name, {}, ()),
    (by_partial, {}, ()),
    (by_torch_dropout, {}, ()),
    (by_torch_dropout_with_names, {}, ()),
    (by_a_variable, {}, ()),
    (by_a_partial_in_a_variable, {}, ()),
    (by_a_default, {}, ()),
    (by_an_attribute, {"function": F.dropout}, ()),
    (by_an_attribute, {"function": half}, ()),
    (by_an_attribute, {"function": helper_that_drops}, ()),
    (by_a_list, {"functions": [half]}, ()),
    (by_a_list, {"functions": {0: F.dropout}}, ()),
    (by_a_tool, {"tool": Tool()}, ()),
    (by_a_helper, {}, ()),
    (by_computed_arguments, {}, ()),
    (attention_by_a_helper, {}, ()),
    (attention_by_a_helper_of_a_helper, {}, ()),
    (attention_by_computed_arguments, {}, ()),
    (attention_by_an_attribute, {"function": F.scaled_dot_product_attention}, ()),
    (attention_by_an_attribute, {"function": functools.partial(attend, is_causal=True)}, ()),
    (attention_by_another_name, {}, ()),
    (attention_by_a_variable, {}, ()),
    (attention_by_an_argument, {}, (F.scaled_dot_product_attention,)),
]


@pytest.mark.parametrize(("forward", "attributes", "more"), SWAPPED)
def test_dropouts_by_other_names_are_swapped_and_seen(forward, attributes, more):
    model = module(forward, **attributes)
    report, found = verified(model, X, *more)
    (site,) = report.sites
    attention = forward.__name__.startswith("attention")
    assert site.status == ("fused" if attention else "swapped")
    assert [c.verdict for c in found.sites] == [AS_REPORTED]
    assert found.sites[0].before == found.sites[0].after == 1
    assert "tridrop." in found.sites[0].detail
    report.raise_if_unaccounted()
    with tridrop.rng(5):  # the mask is that of the site's number
        first = model(X, *more)
    seed = tridrop.fold_in(5, site.stream)
    if attention:
        causal = "is_causal" in getattr(getattr(model, "function", None), "keywords", {})
        wanted = tridrop.scaled_dot_product_attention(
            X, X, X, dropout_p=0.5, seed=seed, is_causal=causal
        )
    else:
        wanted = tridrop.dropout(X, 0.5, seed=seed)
    torch.testing.assert_close(first, wanted)


@pytest.mark.parametrize("switch", ["dropout", "attention"])
def test_the_switches_hold_for_what_is_caught(switch):
    def both(self, x):
        return helper_that_attends(helper_that_drops(x))

    model = module(both)
    report = tridrop.swap(model, **{switch: False})
    found = report.verify(X)
    assert sorted(s.status for s in report.sites) == sorted(
        ["left", "swapped" if switch == "attention" else "fused"]
    )
    assert {c.verdict for c in found.sites} == {AS_REPORTED}


# ------------------------------------------------------------------------------ what is left


class Own(nn.Module):
    """Holds a MultiheadAttention, and computes attention with its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)

    def forward(self, x):
        a, o = self.attention.in_proj_weight, self.attention.out_proj
        bias, p = self.attention.in_proj_bias, self.attention.dropout
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, a, bias, None, None, False, p, o.weight, o.bias, self.training
        )[0]


class Both(Own):
    """The same, and calls the module as well."""

    def forward(self, x):
        return super().forward(x) + self.attention(x, x, x)[0]


def native(self, x):
    return torch.native_dropout(x, 0.5, True)[0]


def operator(self, x):
    return torch.ops.aten.native_dropout(x, 0.5, True)[0]


def feature(self, x):
    return torch.feature_dropout(x, 0.5, True)


def in_place(self, x):
    return torch.dropout_(x.clone(), 0.5, True)


def bernoulli(self, x):
    return x * torch.bernoulli(torch.full_like(x, 0.5))


def bernoulli_of_a_tensor(self, x):
    return x * torch.empty_like(x).bernoulli_(0.5)


def layer_drop_of_torch(self, x):
    return x if torch.rand([]) < 0.5 else x + 1


def layer_drop_of_python(self, x):
    return x if random.uniform(0, 1) < 0.5 else x + 1


def layer_drop_of_numpy(self, x):
    chance = numpy.random.uniform(0, 1)
    return x if chance < 0.5 else x + 1


def _drop_path(x):
    return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


def drop_path_of_a_helper(self, x):
    return _drop_path(x)


LEFT = [native, operator, feature, in_place, bernoulli, bernoulli_of_a_tensor, layer_drop_of_torch,
        layer_drop_of_python, layer_drop_of_numpy, drop_path_of_a_helper]  # fmt: skip


@pytest.mark.parametrize("forward", LEFT)
def test_what_draws_otherwise_is_left_and_seen(forward):
    report, found = verified(module(forward), X)
    (site,) = report.sites
    assert site.status == "left"
    assert site.reason
    assert [(c.verdict, c.before, c.after) for c in found.sites] == [(AS_REPORTED, 1, 1)]
    report.raise_if_unaccounted()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("sub", [False, True])
def test_recurrent_layers_are_left(kind, sub):
    own = type("OwnLayer", (kind,), {}) if sub else kind
    report, found = verified(own(8, 8, num_layers=3, dropout=0.5), torch.randn(3, 2, 8))
    (site,) = report.sites
    assert (site.status, site.p) == ("left", 0.5)
    assert "between its layers" in site.reason
    assert [(c.verdict, c.before, c.after) for c in found.sites] == [(AS_REPORTED, 2, 2)]
    assert not tridrop.swap(kind(8, 8, num_layers=2)).sites


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(8, 8), nn.Dropout(0.5)],
        (nn.Dropout(0.5),),
        {"a": [nn.Dropout(0.5)]},
        [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))],
    ],
)
def test_modules_in_plain_containers_are_left(layers):
    def forward(self, x):
        todo = self.layers.values() if isinstance(self.layers, dict) else self.layers
        for layer in todo:
            for part in layer if isinstance(layer, list) else [layer]:
                x = part(x)
        return x

    report, found = verified(module(forward, layers=layers), X)
    (site,) = report.sites
    assert site.status == "left"
    assert "plain list or dict" in site.reason
    assert site.module.startswith("layers[")
    assert [(c.verdict, c.before) for c in found.sites] == [(AS_REPORTED, 1)]


def test_attention_whose_parts_alone_are_used_is_not_called_fused():
    report, found = verified(Own().train(), torch.randn(4, 2, 8))
    own, attention = report.sites
    assert (own.status, own.p) == ("left", None)  # its rate is a variable
    assert attention.status == "left"
    assert "unknown" in attention.reason
    assert "report.verify(batch)" in attention.reason
    assert [c.verdict for c in found.sites] == [AS_REPORTED, NEVER]
    report, found = verified(Both(), torch.randn(4, 2, 8))
    assert [c.verdict for c in found.sites if c.site.module] == [AS_REPORTED]
    assert report.sites[-1].status == "fused"
    report.raise_if_unaccounted()


def test_a_subclass_of_attention_or_dropout_has_its_true_reason():
    class Attention(nn.MultiheadAttention):
        pass

    class Plain(nn.Dropout):
        pass

    class Doubled(nn.Dropout):
        def forward(self, x):
            return 2 * super().forward(x)

    class Noise(nn.Dropout):
        def forward(self, x):
            return x * torch.rand_like(x)

    x = torch.randn(4, 2, 8)
    report, found = verified(Attention(8, 2, dropout=0.5), x, x, x)
    assert {s.reason for s in report.sites} == {"tridrop has no counterpart of this function"}
    assert sum(c.verdict == AS_REPORTED for c in found.sites) == 1
    for kind, status in ((Plain, "swapped"), (Doubled, "swapped"), (Noise, "left")):
        report, found = verified(nn.Sequential(kind(0.5)), x)
        assert [s.status for s in report.sites] == [status], kind
        assert [c.verdict for c in found.sites] == [AS_REPORTED]
        assert "in place" not in str(report)
    report, found = verified(nn.Sequential(Plain(0.5, inplace=True)), x)
    assert [s.reason for s in report.sites] == ["it works in place"]
    assert [c.verdict for c in found.sites] == [AS_REPORTED]


def test_hooks_scripts_and_forwards_of_instances_are_left():
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5))
    before = nn.Sequential(nn.Linear(8, 8))
    before.register_forward_pre_hook(lambda module, args: half(*args))
    own = nn.Sequential(nn.Linear(8, 8))
    own.forward = lambda x: F.dropout(x, 0.5)
    bound = nn.Sequential(nn.Linear(8, 8))
    bound.forward = types.MethodType(lambda self, x: helper_that_attends(x), bound)
    script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    for model in (hooked, before, own, bound, script):
        report, found = verified(model.train(), X)
        assert [s.status for s in report.sites] == ["left"]
        assert [c.verdict for c in found.sites] == [AS_REPORTED]
        report.raise_if_unaccounted()


def test_torchs_modules_that_draw_and_do_not_drop_are_sites():
    model = nn.Sequential(nn.RReLU(), nn.FractionalMaxPool2d(2, output_size=2))
    report, found = verified(model, torch.randn(1, 1, 6, 6))
    assert [s.reason for s in report.sites] == ["it draws random numbers, and drops nothing"] * 2
    assert {c.verdict for c in found.sites} == {AS_REPORTED}
