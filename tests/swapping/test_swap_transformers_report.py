"""What tridrop.swap says of models of transformers, and what it leaves alone in them."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from swap_families import LLM, MAIN, NEWEST, OLDEST, RELEASE, batch, make
from swap_helpers import assert_same, classes_of, swapped_outcome, twin_outcome

import tridrop


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


LINEAR_OUT = "linear + dropout + add + norm"
ATTENDS = "softmax + dropout + matmul"
BERT_PARTS = {"norm + dropout": 1, ATTENDS: 2, LINEAR_OUT: 4}
T5_PARTS = {
    "dropout": 2,  # embeddings
    "norm + dropout": 2,  # ends of the stacks
    "dropout + add": 5,
    "activation + dropout": 2,
    ATTENDS: 3,
}
SPEECH_PARTS = {
    "dropout": 1,  # before the head
    "linear + dropout": 1,
    "norm + dropout": 1,
    "call + dropout + add + norm": 2,
    ATTENDS: 2,
    "linear + activation + dropout": 2,
    "linear + dropout + return": 2,
}
# Of every place that drops, what it became.
PARTS = {
    "BERT": BERT_PARTS,
    "GPT-2": {"dropout": 3, ATTENDS: 2, "linear + dropout + return": 4},
    "T5": T5_PARTS,
    "T5 gated": {"dropout": 4, "norm + dropout": 2, "dropout + add": 5, ATTENDS: 3},
    "BART": {
        "norm + dropout": 2,
        "call + dropout + add + norm": 3,
        "linear + activation + dropout": 2,
        LINEAR_OUT: 2,
        ATTENDS: 3,
    },
    "ViT": {
        "dropout": 1,
        "call + dropout + add + norm": 2,
        "call + dropout + add": 2,
        ATTENDS: 2,
    },
    "wav2vec2": SPEECH_PARTS,
    "wav2vec2 stable": SPEECH_PARTS | {"dropout": 2, "norm + dropout": 0},
    "Llama": {ATTENDS: 2},
    "DINOv2": {
        "dropout": 1,
        "call + scale + drop_path + add + norm": 2,
        "call + scale + drop_path + add": 2,
        ATTENDS: 2,
    },
}
# Modules were written otherwise in the first release of 5: norms behind which another variable is
# dropped, T5's attention before it came to the interface, ViT's layers.
OLDEST_PARTS = PARTS | {
    "T5": {"dropout": 7, "dropout + add": 5, "activation + dropout": 2},
    "T5 gated": {"dropout": 9, "dropout + add": 5},
    "BART": PARTS["BART"] | {"dropout": 2, "norm + dropout": 0},
    "ViT": {
        "dropout": 1,
        ATTENDS: 2,
        "linear + dropout + return": 2,
        "linear + dropout + add": 2,
    },
    "wav2vec2": SPEECH_PARTS | {"dropout": 2, "norm + dropout": 0},
    "DINOv2": PARTS["DINOv2"] | {"linear + dropout + return": 2},
}


# LayerDrop, and the masked time steps and features of speech models, which drop no element.
DRAWN = {"BART": 2, "wav2vec2": 3, "wav2vec2 stable": 3}


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.skipif(OLDEST < RELEASE < NEWEST, reason="models were rewritten between these")
def test_report_names_what_became_of_every_place(name):
    report = tridrop.swap(make(name))
    expected = Counter((PARTS if RELEASE >= NEWEST else OLDEST_PARTS)[name])
    swapped = expected["dropout"]
    fused = sum(expected.values()) - swapped
    expected[""] = left = DRAWN.get(name, 0)
    assert Counter(" + ".join(site.parts) for site in report.sites) == +expected
    assert report.counts() == {"fused": fused, "swapped": swapped, "left": left}
    assert f"{fused} fused, {swapped} swapped, {left} left" in str(report)
    streams = [site.stream for site in report.sites if site.parts]
    assert len(set(streams)) == len(streams)
    assert None not in streams
    assert {s.reason for s in report.sites if not s.parts} <= {
        "it draws random numbers from a generator"
    }


@pytest.mark.parametrize("name", [*MAIN, "Falcon", "Longformer"])
def test_dry_run_reports_the_same_and_changes_nothing(name):
    model = make(name)
    before = classes_of(model), [set(vars(module)) for module in model.modules()]
    planned = tridrop.swap(model, dry_run=True)
    assert (classes_of(model), [set(vars(module)) for module in model.modules()]) == before
    assert model.config._attn_implementation == "eager"
    done = tridrop.swap(model)
    assert [replace(site, stream=None) for site in done.sites] == [
        replace(site, stream=None) for site in planned.sites
    ]
    assert "(dry run)" in str(planned)
    assert "(dry run)" not in str(done)


def test_model_without_dropouts_is_unchanged():
    config = transformers.LlamaConfig(**LLM)
    model = transformers.LlamaForCausalLM(config)
    before, attention = classes_of(model), model.config._attn_implementation
    report = tridrop.swap(model)
    assert classes_of(model) == before
    assert model.config._attn_implementation == attention
    assert report.counts()["fused"] == report.counts()["swapped"] == 0
    assert {site.reason for site in report.sites} <= {"its dropout is 0"}


# What becomes of the attention of families that do not look their function up.
BYPASSING = {
    "DeBERTa": "softmax + dropout",
    "DeBERTa-v2": "softmax + dropout",
    "Bloom": "softmax + dropout",
    "GPT-J": "softmax + dropout",
    "BigBird": "softmax + dropout",
    "Falcon": "softmax + dropout",
    "Longformer": "dropout",
}


@pytest.mark.parametrize("name", BYPASSING)
def test_attention_in_methods_is_softmax_and_dropout(name):
    sites = tridrop.swap(make(name)).sites
    names = ("prob", "attn_weights", "attention_interface(")
    found = [site for site in sites if any(name in site.code for name in names)]
    assert found
    # From 5.24 on GPT-J looks its function up, as most families do.
    looks_up = name == "GPT-J" and RELEASE >= NEWEST
    assert {" + ".join(site.parts) for site in found} == {ATTENDS if looks_up else BYPASSING[name]}


def choose(model, name):
    """As set_attn_implementation does, where it would ask for a package and a GPU."""
    for module in (model, *model.modules()):
        if hasattr(module, "config"):
            module.config._attn_implementation = name


def no_rate(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out = (query @ key.transpose(-2, -1) * scaling).softmax(-1) @ value
    return out.transpose(1, 2).contiguous(), None


def handed_on(module, query, key, value, attention_mask, **kwargs):
    given = transformers.AttentionInterface()["sdpa"]
    return given(module, query, key, value, attention_mask, **kwargs)


RAISES = ", which raises in training where its rate is not 0"
NOT_HANDED_ON = ", which drops nothing: transformers leaves the rate out where a kernel takes none"
# Of what is chosen: what it does with a rate.
CHOSEN = {
    "flex_attention": RAISES,
    "flash_attention_2": "",
    "flash_attention_3": NOT_HANDED_ON,
    "flash_attention_4": NOT_HANDED_ON,
    "one_without": ", which drops nothing: it reads no rate",
    "one_that_hands_on": "",
}


@pytest.fixture
def registered():
    """Two attention functions of a user's."""
    table = transformers.AttentionInterface._global_mapping
    before = dict(table)
    transformers.AttentionInterface.register("one_without", no_rate)
    transformers.AttentionInterface.register("one_that_hands_on", handed_on)
    yield
    table.clear()
    table.update(before)


@pytest.mark.parametrize("name", CHOSEN)
def test_attention_that_was_chosen_otherwise_is_left(name, registered):
    model = make("BERT")
    choose(model, name)
    report = tridrop.swap(model)
    left = [site for site in report.sites if site.status == "left"]
    assert len(left) == 2
    assert {site.reason for site in left} == {f"{name} was chosen for it{CHOSEN[name]}"}
    assert model.config._attn_implementation == name


def test_flex_attention_raises_where_it_would_drop():
    """What the report says of it is what transformers does."""
    model = make("BERT")
    choose(model, "flex_attention")
    with pytest.raises(ValueError, match="does not support `dropout`"):
        model(**batch("BERT"))


@pytest.mark.parametrize("name", ["one_without", "one_that_hands_on"])
def test_what_drops_nothing_is_seen_to_draw_nothing(name, registered):
    model = make("BERT")
    choose(model, name)
    report = tridrop.swap(model)
    found = [c for c in report.verify(**batch("BERT")).sites if c.site.status == "left"]
    draws = name == "one_that_hands_on"
    assert {c.verdict for c in found} == {"drops as reported" if draws else "draws nothing"}
    assert draws or {c.detail for c in found} == {"it was called, and dropped nothing"}


@pytest.mark.parametrize("rate", [True, False])
def test_transformers_hands_a_rate_on_to_flash_kernels_that_take_one(rate):
    """Those of FlashAttention-2 do; of 3 and 4 (4.0.0b36) none does, and nothing is said."""
    from transformers import modeling_flash_attention_utils as flash

    def with_rate(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False): ...
    def without(q, k, v, softmax_scale=None, causal=False): ...

    made = flash._lazy_define_process_function(with_rate if rate else without)
    given = made(4, 4, True, dropout=0.1)
    given = given[0] if isinstance(given, tuple) else given
    assert given.get("dropout_p") == (0.1 if rate else None)


# ------------------------------------------------------------------------- forwards that differ


def _norm_before_dropout(self, hidden_states, input_tensor):
    hidden_states = self.dense(hidden_states)
    hidden_states = self.LayerNorm(hidden_states)
    return self.dropout(hidden_states) + input_tensor


def _op_behind_dropout(self, hidden_states, input_tensor):
    hidden_states = self.dropout(self.dense(hidden_states))
    hidden_states = torch.tanh(hidden_states)
    return self.LayerNorm(hidden_states + input_tensor)


def _dropped_twice_used(self, hidden_states, input_tensor):
    dropped = self.dropout(self.dense(hidden_states))
    return self.LayerNorm(dropped + input_tensor) + dropped


def _in_place(self, hidden_states, input_tensor):
    hidden_states = self.dropout(self.dense(hidden_states))
    hidden_states += input_tensor
    return self.LayerNorm(hidden_states)


def _halved(self, hidden_states, input_tensor):
    hidden_states = self.dropout(self.dense(hidden_states))
    return self.LayerNorm(0.5 * hidden_states + input_tensor)


def _without_bias_kept(self, hidden_states, input_tensor):
    dense = self.dense(hidden_states)
    hidden_states = self.dropout(dense)
    return self.LayerNorm(hidden_states + input_tensor) + dense.mean()


def _sometimes(self, hidden_states, input_tensor):
    hidden_states = self.dense(hidden_states)
    if hidden_states.shape[0] > 1:
        hidden_states = self.dropout(hidden_states)
    return self.LayerNorm(hidden_states + input_tensor)


def _in_a_loop(self, hidden_states, input_tensor):
    hidden_states = self.dense(hidden_states)
    for _ in range(2):
        hidden_states = self.LayerNorm(self.dropout(hidden_states) + input_tensor)
    return hidden_states


CHANGED = {
    # forward -> what its dropout may be one op with
    _norm_before_dropout: {"norm", "dropout", "add"},
    _op_behind_dropout: {"linear", "dropout"},
    _dropped_twice_used: {"linear", "dropout"},
    _in_place: {"linear", "dropout"},
    _halved: {"linear", "dropout"},
    _without_bias_kept: {"dropout", "add", "norm"},
    _sometimes: {"linear", "dropout", "add", "norm"},
}


@pytest.mark.parametrize("forward", CHANGED, ids=lambda forward: forward.__name__.strip("_"))
def test_changed_forward_is_exact_and_not_fused_where_that_would_differ(forward):
    """A class named BertOutput is not taken for the library's."""
    model, inputs = make("BERT"), batch("BERT")
    base = type(model.bert.encoder.layer[0].output)
    changed = type("BertOutput", (base,), {"forward": forward})
    for layer in model.bert.encoder.layer:
        layer.output.__class__ = changed
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    sites = [site for site in report.sites if site.kind == "BertOutput"]
    assert len(sites) == 2
    assert all(set(site.parts) <= CHANGED[forward] for site in sites), sites
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))
    for m in (model, twin):
        m.eval()
    torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)


def test_dropout_in_a_loop_draws_anew_each_time_and_warns_under_rng():
    model, inputs = make("BERT"), batch("BERT")
    base = type(model.bert.encoder.layer[0].output)
    model.bert.encoder.layer[0].output.__class__ = type(
        base.__name__, (base,), {"forward": _in_a_loop}
    )
    tridrop.swap(model)
    with pytest.warns(UserWarning, match="was called twice"):
        swapped_outcome(model, inputs)


# ------------------------------------------------------------------------------------- branches


def test_attention_in_a_branch_is_said_to_be_in_one():
    """Falcon's dropout of attention is in the branch for alibi alone, which is off by default."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    words = torch.randint(0, 50, (2, 7))
    verdicts = {}
    for alibi in (False, True):
        config = transformers.FalconConfig(attention_dropout=0.5, alibi=alibi, **sizes)
        model = transformers.FalconModel(config).train()
        report = tridrop.swap(model)
        sites = [site for site in report.sites if site.kind == "FalconAttention"]
        assert [site.condition.partition(" and ")[0] for site in sites] == 2 * ["alibi is not None"]
        assert "Only in a branch: FalconAttention if alibi is not None" in str(report)
        assert report.to_dict()["sites"][-1].keys() >= {"condition"}
        seen = report.verify(words)
        verdicts[alibi] = [c.verdict for c in seen.sites if c.site.kind == "FalconAttention"]
        assert "Only in a branch" not in str(report)  # what was seen is said instead
    assert verdicts[False] == ["never called", "never called"]
    assert sorted(verdicts[True]) == ["drops as reported", "never called"]


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.own = True
        self.a, self.b, self.c, self.d = (torch.nn.Dropout(0.1) for _ in range(4))

    def forward(self, x, y=None, mode="sum"):
        if y is None:
            return self.a(x)
        if self.own and self.training:  # which the module itself decides
            x = self.b(x)
        if mode == "sum" or mode == "mean":
            x = x + y
            return self.c(x) if not x.requires_grad else x
        elif not mode:
            x = self.d(x)
        return x


def test_conditions_are_those_on_what_a_forward_is_given_or_computes():
    report = tridrop.swap(Branches())
    assert [site.condition for site in report.sites] == [
        "y is None",
        "",
        "(mode == 'sum' or mode == 'mean') and not x.requires_grad",
        "not (mode == 'sum' or mode == 'mean') and not mode",
    ]
