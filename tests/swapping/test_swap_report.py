"""The report of tridrop.swap: figures that can be counted by hand, words, code and JSON."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import random
import weakref

import numpy
import pytest
import torch
import transformers
from torch import nn

import tridrop
from tridrop.swapping.measure import Cost, Measurement, cost_of

BATCH, LENGTH, WIDTH, HEADS, INNER = 2, 6, 16, 2, 40
IDS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)


def bert(**changes) -> nn.Module:
    """One layer: embeddings and their norm, attention, two linear layers."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": INNER}
    config = transformers.BertConfig(
        vocab_size=20, num_hidden_layers=1, max_position_embeddings=LENGTH, **sizes, **changes
    )
    return transformers.BertModel(config, add_pooling_layer=False).train()


class Branch(nn.Module):
    """Ends in a linear layer with a dropout or without."""

    def __init__(self, p: float | None) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.out = nn.Identity() if p is None else nn.Dropout(p)

    def forward(self, x):
        return self.out(self.dense(torch.tanh(x)))


class Caller(nn.Module):
    """Takes over the ends of its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Branch(0.5)
        self.second = Branch(None)
        self.dropout = nn.Dropout(0.25)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.first(x)
        return self.norm(x + self.dropout(self.second(x)))


class Statistics(nn.Module):
    """Has buffers that a training forward changes, in place and by putting in others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.calls = self.calls + random.random() + numpy.random.rand()
        return self.dropout(self.norm(x))


# ------------------------------------------------------------------------------------- the figures


def test_figures_of_bert_are_those_counted_by_hand():
    stream = 4 * BATCH * LENGTH * WIDTH  # bytes in fp32
    inner = 4 * BATCH * LENGTH * INNER
    scores = 4 * BATCH * HEADS * LENGTH * LENGTH
    rows = 4 * BATCH * LENGTH
    indices = 8 * BATCH * LENGTH + 8 * LENGTH  # of tokens and types
    model = bert()
    found = tridrop.swap(model).verify(IDS).cost
    assert found.before == Cost(
        dropouts=4,  # embeddings, probabilities, the ends of both branches
        operators=6  # type indices, three embeddings and their two sums
        + (1 + 3)  # norm; bernoulli_, div_, mul
        + 3  # query, key, value
        + (2 + 2 + 1 + 1 + 3 + 1 + 1 + 1)  # scales, copies, bmm, softmax, dropout, copy, bmm, copy
        + (1 + 3 + 1 + 1)  # linear, dropout, sum, norm
        + 2  # linear, gelu
        + (1 + 3 + 1 + 1),
        saved_bytes=indices
        + (2 * stream + 2 * rows)  # norm's input, mask; mean and deviation
        + stream  # the input of query, key and value
        + (3 * stream + 3 * scores)  # these; the probabilities, the mask and their product
        + (3 * stream + 2 * rows)  # linear's input, mask, norm's input; mean and deviation
        + (stream + inner)  # input of the linear layer, and of gelu
        + (inner + 2 * stream + 2 * rows),
    )
    seed = 16
    assert found.after == Cost(
        dropouts=4,
        operators=6
        + 2  # the draw of a seed, norm with dropout
        + 3
        + 2  # seed, attention
        + 3  # product without bias, seed, all the rest
        + 2
        + 3,
        saved_bytes=indices
        + (stream + 2 * rows + seed)
        + stream
        + (4 * stream + 4 * BATCH * HEADS * LENGTH + seed)  # with the output and log-sum-exp
        + (stream + 2 * rows + seed)  # the linear layer's input is attention's output
        + (stream + inner)
        + (inner + stream + 2 * rows + seed),
    )


def test_masks_are_gone_from_what_is_saved():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    x = torch.ones(4, 8, requires_grad=True)
    found = tridrop.swap(model).verify(x).cost
    assert found.before == Cost(2, 6, 2 * x.nbytes, layers=2, layer_bytes=x.nbytes)
    assert found.after.dropouts == 2
    assert found.after.saved_bytes == 2 * 16


def test_rates_of_0_are_no_dropouts():
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = bert(**config)
    found = tridrop.swap(model).verify(IDS).cost
    assert (found.before.dropouts, found.after.dropouts) == (0, 0)


def test_attention_with_a_dropout_inside_is_one_launch():
    class Attends(nn.Module):
        def forward(self, x, p):
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)

    x = torch.ones(1, 1, 4, 8)
    assert [cost_of(Attends(), (x, p)).dropouts for p in (0.0, 0.5)] == [0, 1]


def test_what_is_left_is_counted_after_the_swap():
    model = nn.Sequential(nn.Dropout(0.5)).train()
    model.append(type("Own", (nn.AlphaDropout,), {})(0.5).train())  # a subclass may do anything
    found = tridrop.swap(model).verify(torch.ones(4, 8)).cost
    assert (found.before.dropouts, found.after.dropouts) == (2, 2)


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x + 1)
        ctx.kept = [x + 2]
        return x + 3

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_functions_own_savings_count_and_parameters_do_not():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))
            self.register_buffer("other", torch.ones(4, 8))

        def forward(self, x):
            return {"out": [Keeps.apply(x * self.weight) + x * self.other]}

    x = torch.ones(4, 8, requires_grad=True)
    assert cost_of(Uses(), (x,)).saved_bytes == 3 * x.nbytes  # x, and what Keeps keeps


def test_views_and_allocations_compute_nothing():
    class Moves(nn.Module):
        def forward(self, x):
            return x.view(-1).unsqueeze(0).expand(3, -1).detach(), x.new_empty(3), x + 1

    assert cost_of(Moves(), (torch.ones(2, 3),)).operators == 1


# ------------------------------------------------------------------------- nothing else is changed


def state(model: nn.Module) -> list[object]:
    """All that a verification might leave changed."""
    found: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    found.append(numpy.random.get_state()[1].tolist())
    for module in model.modules():
        own = {n: v for n, v in module.__dict__.items() if "tridrop" in n or n == "site"}
        found.append((type(module), module.training, own))
        config = getattr(module, "config", None)
        found.append(getattr(config, "_attn_implementation", None))
        found += [(n, id(b), b.tolist()) for n, b in module._buffers.items()]
        found += [
            (n, id(p), p.tolist(), p.grad) for n, p in module._parameters.items() if p is not None
        ]
    return found


MODELS = {
    "bert": (bert, IDS),
    "caller": (Caller, torch.ones(2, 3, 8)),
    "statistics": (Statistics, torch.randn(3, 8)),
    "torch": (lambda: nn.TransformerEncoderLayer(8, 2, 16), torch.ones(2, 3, 8)),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_restored(name, train, dry_run):
    make, x = MODELS[name]
    model = make().train(train)
    next(iter(model.children())).train(not train)
    report = tridrop.swap(model, dry_run=dry_run)
    tridrop.nn.number_sites(model, first=1000)
    before = state(model)
    with torch.no_grad():
        report.verify(x)
    assert state(model) == before
    if not dry_run:
        tridrop.unswap(model)
        assert not any(hasattr(type(m), "_tridrop_base") for m in model.modules())


def test_everything_is_restored_where_the_forward_raises():
    model = bert()
    report = tridrop.swap(model)
    before = state(model)
    with pytest.raises(IndexError):
        report.verify(IDS + 1000)
    assert state(model) == before
    assert report.verification is None
    report.verify(IDS)


def test_no_graph_is_kept():
    model, outputs = Caller(), []
    report = tridrop.swap(model)
    model.norm.register_forward_hook(lambda m, args, out: outputs.append(weakref.ref(out)))
    report.verify(torch.ones(2, 3, 8))
    gc.collect()
    assert len(outputs) == 2
    assert not any(ref() is not None for ref in outputs)


def test_parts_in_eval_mode_stay_there_in_a_model_that_trains():
    model = Caller().train()
    model.first.eval()
    assert tridrop.swap(model).verify(torch.ones(2, 3, 8)).cost.before.dropouts == 1
    assert tridrop.swap(model.eval()).verify(torch.ones(2, 3, 8)).cost.before.dropouts == 2


def test_a_dry_run_and_an_unswapped_model_are_swapped_for_the_time():
    model = Caller().train()
    x = torch.ones(2, 3, 8)
    wanted = tridrop.swap(model).verify(x).cost
    assert wanted.after.operators < wanted.before.operators
    late = tridrop.swap(model)
    tridrop.unswap(model)
    assert late.verify(x).cost == wanted
    assert tridrop.swap(model, dry_run=True).verify(x).cost == wanted
    assert type(model) is Caller


def test_a_report_verifies_its_own_levels():
    model, x = Caller().train(), torch.ones(2, 3, 8)
    everything = tridrop.swap(model)
    wanted = everything.verify(x).cost
    alone = tridrop.swap(model, inside=False, across=False).verify(x).cost
    assert wanted.after.operators < alone.after.operators
    assert everything.verify(x).cost == wanted


def test_a_report_does_not_keep_its_model():
    model = Caller()
    report = tridrop.swap(model)
    text = str(report)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert str(report) == text
    with pytest.raises(ValueError, match="no longer exists"):
        report.verify(IDS)
    with pytest.raises(ValueError, match="no longer exists"):
        report.source("")


# -------------------------------------------------------------------------------- words and tables


def test_what_callers_and_called_do_is_told_in_words():
    model = Caller()
    found = tridrop.swap(model)
    words = dict(zip((s.module for s in found.sites), found.became(), strict=True))
    assert words == {
        "": "(second's linear) + dropout + add + norm",
        "first": "linear + dropout, added by Caller",
    }
    assert tridrop.swap(Caller(), dry_run=True).became() == found.became()


def test_methods_take_over_from_each_other():
    found = tridrop.swap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert any("by forward" in text for text in found.became())


class NoiseDropout(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


def test_the_table_has_a_line_a_kind_of_site_and_the_figures():
    model = nn.Sequential(*(Caller() for _ in range(3)), NoiseDropout())
    report = tridrop.swap(model)
    text = str(report)
    (line,) = (line for line in text.splitlines() if "added by Caller" in line)
    assert line.split()[1] == "3"
    assert "left: it draws random numbers from a generator" in text
    assert "6 fused, 0 swapped, 1 left" in text
    assert "saved for backward" not in text
    found = report.verify(torch.ones(2, 3, 8)).cost
    last = str(report).splitlines()[-4:]
    assert [line.split() for line in last[1:3]] == [
        ["dropout", "launches", "7", "7", "1.00"],
        ["operators", str(found.before.operators), str(found.after.operators),
         f"{found.ratios()['operators']:.2f}"],
    ] or last  # fmt: skip
    assert f"operators {found.before.operators} -> {found.after.operators} (x " in str(found)


def test_long_code_is_cut_to_one_line_and_brackets_are_kept():
    class Long(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x[..., [0]] + x[..., [1]] + x[..., [2]], 0.5, True)

    text = str(tridrop.swap(Long()))
    assert sum("nn.functional.dropout(x[..., [0]]" in line for line in text.splitlines()) == 1
    assert "True)" not in text


def test_a_model_without_dropout_says_so():
    assert "Nothing in this model drops" in str(tridrop.swap(nn.Linear(2, 2)))


def test_json_and_pickle_have_everything():
    model = Caller()
    report = tridrop.swap(model)
    assert report.to_dict()["verification"] is None
    found = report.verify(torch.ones(2, 3, 8)).cost
    there = report.to_dict()
    assert json.loads(json.dumps(there, allow_nan=False)) == there
    assert there["verification"]["cost"]["ratios"] == found.ratios()
    assert there["verification"]["cost"]["before"]["dropouts"] == 2
    assert [site["became"] for site in there["sites"]] == report.became()
    assert there["counts"] == {"fused": 2, "swapped": 0, "left": 0}
    again = pickle.loads(pickle.dumps(report))
    assert again.to_dict() == there
    assert str(again) == str(report)
    nothing = Measurement(Cost(0, 0, 0), Cost(0, 1, 0))
    assert nothing.ratios() == {"dropouts": None, "operators": None, "saved_bytes": None}
    assert "nan" not in str(nothing)


# ---------------------------------------------------------------------------------------- the code


def test_source_is_what_runs():
    model = Caller()
    report = tridrop.swap(model)
    text = report.source("")
    assert "_tridrop.call(self.first, 'forward', x)" in text
    assert "_tridrop.dropout(self, 0, self.dropout, _tridrop.call(self.second, 'forward', x))" in (
        text
    )
    compile(text, "source", "exec")
    both = report.source("first")
    assert "def forward(self, x)" in both
    assert "# For callers" in both
    assert "def _tridrop_forward(self, x)" in both
    other = Caller()
    assert tridrop.swap(other, dry_run=True).source("first") == both


@pytest.mark.parametrize(
    ("name", "message"),
    [("third", "no module named 'third'"), ("norm", "nothing in it was rewritten"),
     ("other", "became tridrop's own class")],
)  # fmt: skip
def test_source_of_what_was_not_rewritten(name, message):
    model = Caller()
    model.other = nn.Dropout(0.5)
    with pytest.raises(ValueError, match=message):
        tridrop.swap(model).source(name)


def test_on_a_gpu_the_figures_are_those_of_its_operators():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = Caller().cuda().train()
    state = torch.cuda.get_rng_state()
    found = tridrop.swap(model).verify(torch.ones(2, 3, 8, device="cuda")).cost
    assert (found.before.dropouts, found.after.dropouts) == (2, 2)
    assert found.after.saved_bytes < found.before.saved_bytes
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_report_in_the_place_of_a_model_says_what_to_write():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    kept, model = model, tridrop.swap(model)
    lines = (
        r"in place and returns a report.*\n    report = tridrop.swap\(model\)\n    out = model\(x\)"
    )
    with pytest.raises(TypeError, match=lines):
        model(torch.ones(1, 4))
    for name in ("parameters", "train", "to", "state_dict", "generate", "config"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}': .*{lines}"):
            getattr(model, name)
    with pytest.raises(AttributeError, match=r"'Report' object has no attribute '_sites'\Z"):
        _ = model._sites  # what libraries look for
    assert not hasattr(model, "__setstate__")
    assert copy.deepcopy(model).sites == pickle.loads(pickle.dumps(model)).sites == model.sites
    assert kept(torch.ones(1, 4)).shape == (1, 4)
