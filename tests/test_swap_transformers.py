"""tridrop.swap on models of transformers, beside their own eager forwards fed the same masks.

Tiny models with random weights; nothing is downloaded.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from swap_helpers import (
    assert_same,
    classes_of,
    outcome,
    set_rates,
    swapped_outcome,
    twin_outcome,
)
from torch import Tensor, nn

import tridrop

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
OLDEST, NEWEST = (5, 0), (5, 23)
# Three different rates, so that one that is mistaken for another shows.
HIDDEN, ATTENTION, ACTIVATION = 0.1, 0.2, 0.3


@dataclass
class Family:
    """How to make a tiny model, and what the report is to say of it."""

    config: str
    model: str
    sizes: dict
    rates: dict
    kind: str = "text"  # of its inputs
    more: dict = field(default_factory=dict)


TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 50,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0, "vocab_size": 20,
}  # fmt: skip
LLM = TEXT | {"num_key_value_heads": 1}
BERT_RATES = {"hidden_dropout_prob": HIDDEN, "attention_probs_dropout_prob": ATTENTION}
GPT_RATES = {"resid_pdrop": HIDDEN, "embd_pdrop": ACTIVATION, "attn_pdrop": ATTENTION}
BART_RATES = {"dropout": HIDDEN, "attention_dropout": ATTENTION, "activation_dropout": ACTIVATION}
SPEECH_RATES = {
    "hidden_dropout": HIDDEN, "attention_dropout": ATTENTION, "activation_dropout": ACTIVATION,
    "feat_proj_dropout": 0.15, "final_dropout": 0.25,
}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}

MAIN = {
    "BERT": Family("Bert", "BertForMaskedLM", TEXT, BERT_RATES),
    "GPT-2": Family("GPT2", "GPT2LMHeadModel", GPT, GPT_RATES),
    "T5": Family("T5", "T5ForConditionalGeneration", T5, {"dropout_rate": HIDDEN}),
    "T5 gated": Family(
        "T5", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"},
        {"dropout_rate": HIDDEN},
    ),
    "BART": Family("Bart", "BartForConditionalGeneration", BART, BART_RATES),
    "ViT": Family("ViT", "ViTForImageClassification", IMAGE, BERT_RATES, "image"),
    "wav2vec2": Family("Wav2Vec2", "Wav2Vec2ForCTC", SPEECH, SPEECH_RATES, "speech"),
    "wav2vec2 stable": Family(
        "Wav2Vec2", "Wav2Vec2ForCTC", SPEECH | STABLE, SPEECH_RATES, "speech"
    ),
    "Llama": Family("Llama", "LlamaForCausalLM", LLM, {"attention_dropout": ATTENTION}),
    "DINOv2": Family(
        "Dinov2", "Dinov2ForImageClassification",
        IMAGE | {"layerscale_value": 0.7, "mlp_ratio": 2},
        BERT_RATES | {"drop_path_rate": 0.4}, "image",
    ),
}  # fmt: skip

OTHERS = {
    "RoBERTa": Family("Roberta", "RobertaModel", TEXT, BERT_RATES),
    "XLM-RoBERTa": Family("XLMRoberta", "XLMRobertaForCausalLM", TEXT, BERT_RATES),
    "ELECTRA": Family("Electra", "ElectraForMaskedLM", TEXT | {"embedding_size": 16}, BERT_RATES),
    "DistilBERT": Family(
        "DistilBert", "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 50},
        {"dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "ALBERT": Family(
        "Albert", "AlbertForMaskedLM", TEXT | {"embedding_size": 16, "num_hidden_groups": 2},
        BERT_RATES | {"classifier_dropout_prob": HIDDEN},
    ),
    "DeBERTa": Family("Deberta", "DebertaForMaskedLM", TEXT, BERT_RATES),
    "DeBERTa-v2": Family("DebertaV2", "DebertaV2ForMaskedLM", TEXT, BERT_RATES),
    "Bloom": Family(
        "Bloom", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2,
        "vocab_size": 50}, {"hidden_dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "GPT-J": Family("GPTJ", "GPTJForCausalLM", GPT | {"rotary_dim": 8}, GPT_RATES),
    "GPT-NeoX": Family(
        "GPTNeoX", "GPTNeoXForCausalLM", TEXT,
        {"hidden_dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "Falcon": Family(
        "Falcon", "FalconForCausalLM", TEXT | {"ffn_hidden_size": 48},
        {"hidden_dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "OPT": Family(
        "OPT", "OPTForCausalLM", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {"dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "Whisper": Family(
        "Whisper", "WhisperForConditionalGeneration",
        BART | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        BART_RATES, "mel",
    ),
    "mBART": Family("MBart", "MBartForConditionalGeneration", BART, BART_RATES),
    "Pegasus": Family("Pegasus", "PegasusForConditionalGeneration", BART, BART_RATES),
    "BEiT": Family("Beit", "BeitForImageClassification", IMAGE,
                   BERT_RATES | {"drop_path_rate": 0.4}, "image"),
    "Swin": Family(
        "Swin", "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 2, "num_labels": 3}, BERT_RATES | {"drop_path_rate": 0.4}, "image",
    ),
    "HuBERT": Family("Hubert", "HubertForCTC", SPEECH, SPEECH_RATES, "speech"),
    "CLIP": Family("CLIPText", "CLIPTextModel", TEXT, {"attention_dropout": ATTENTION}),
    "Longformer": Family(
        "Longformer", "LongformerForMaskedLM", TEXT | {"attention_window": 4}, BERT_RATES
    ),
    "BigBird": Family(
        "BigBird", "BigBirdForMaskedLM", TEXT | {"attention_type": "original_full"}, BERT_RATES
    ),
    "ModernBERT": Family(
        "ModernBert", "ModernBertForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2},
        {"embedding_dropout": 0.15, "mlp_dropout": HIDDEN, "attention_dropout": ATTENTION},
    ),
    "Mistral": Family("Mistral", "MistralForCausalLM", LLM, {"attention_dropout": ATTENTION}),
    "Phi": Family(
        "Phi", "PhiForCausalLM", LLM,
        {"resid_pdrop": HIDDEN, "embd_pdrop": ACTIVATION, "attention_dropout": ATTENTION},
    ),
}  # fmt: skip
FAMILIES = MAIN | OTHERS

families = pytest.mark.parametrize("name", FAMILIES)


def make(name: str) -> nn.Module:
    """A model of a family, in training, with its own eager attention."""
    family = FAMILIES[name]
    given = {**family.sizes, **family.rates, **family.more}
    config = getattr(transformers, f"{family.config}Config")(**given)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros, which would hide them
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch(name: str) -> dict[str, Tensor]:
    """What a model takes: text with padding on the right, where the family has it."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(2)

    def words(length: int) -> Tensor:
        return torch.randint(3, 20, (3, length), generator=generator)

    if family.kind == "image":
        images = torch.randn(3, 3, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 2, 1])}
    if family.kind == "speech":
        return {"input_values": torch.randn(3, 64, generator=generator), "labels": words(4)}
    if family.kind == "mel":
        return {"input_features": torch.randn(3, 8, 16, generator=generator), "labels": words(6)}
    ids = words(8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if family.model.endswith(("Model",)):
        return given
    labels = words(6) if "ConditionalGeneration" in family.model else ids.clone()
    labels[0, -2:] = -100
    return given | {"labels": labels}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@families
def test_eval_is_that_of_the_original(name):
    model = make(name)
    twin, inputs = copy.deepcopy(model).eval(), batch(name)
    tridrop.swap(model)
    with torch.no_grad():
        found, expected = (m(**inputs).to_tuple() for m in (model.eval(), twin))
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@families
def test_training_without_dropping_is_that_of_the_original(name):
    model = make(name)
    twin, inputs = copy.deepcopy(model), batch(name)
    tridrop.swap(model)
    for m in (model, twin):
        set_rates(m, 0.0)
    assert_same(outcome(model, inputs), outcome(twin, inputs))


@families
def test_masks_are_those_of_the_reported_places(name):
    """Loss and gradients are those of eager dropouts with the exported masks."""
    model = make(name)
    twin, inputs = copy.deepcopy(model), batch(name)
    report = tridrop.swap(model)
    found, draws = swapped_outcome(model, inputs)
    assert draws
    assert_same(found, twin_outcome(twin, inputs, report, draws))
    taken = [
        tuple(draw.seed.tolist()) for draw in draws if draw.kind != "path" and draw.seed is not None
    ]
    assert len(set(taken)) == len(taken), "two places have one mask"


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "DINOv2"])
def test_triton_kernels_drop_the_same(name):
    model, inputs = make(name), batch(name)
    tridrop.swap(model)
    expected, _ = swapped_outcome(model, inputs)
    with tridrop.backend("triton"):
        found, draws = swapped_outcome(model, inputs)
    assert draws
    assert_same(found, expected)


LEVELS = [
    {"dropout": False}, {"attention": False}, {"inside": False}, {"across": False},
    {"inside": False, "across": False}, {"dropout": False, "across": False},
]  # fmt: skip


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: "no " + " and ".join(levels))
@families
def test_every_level_drops_in_the_same_places(name, levels):
    """What a level leaves to torch drops there; the rest keeps its masks."""
    model, inputs = make(name), batch(name)
    whole, some = copy.deepcopy(model), copy.deepcopy(model)
    full, report = tridrop.swap(whole), tridrop.swap(some, **levels)
    found, draws = swapped_outcome(some, inputs)
    assert_same(found, twin_outcome(model, inputs, report, draws))
    streams = {(s.module, s.code, s.line): s.stream for s in full.sites}
    for site in report.sites:
        assert site.stream in (None, streams[site.module, site.code, site.line])
    if {"dropout", "attention"} & levels.keys():
        return
    expected, draws = swapped_outcome(whole, inputs)
    if len({tuple(draw.seed.tolist()) for draw in draws}) == len(draws):
        assert_same(found, expected)  # no drop path has its number of the dropout it is fused with


@families
def test_only_classes_change_and_unswap_restores_them(name):
    model = make(name)
    before, attention = classes_of(model), model.config._attn_implementation
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    tridrop.swap(model)
    assert list(model.state_dict()) == keys
    for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True):
        assert a == b
        assert p is q
    assert all(map(issubclass, classes_of(model), before))
    assert [c.__name__ for c in classes_of(model)] == [c.__name__ for c in before]
    tridrop.unswap(model)
    assert classes_of(model) == before
    assert model.config._attn_implementation == attention
    assert [set(vars(module)) for module in model.modules()] == attributes


LINEAR_OUT = "linear + dropout + add + norm"
ATTENDS = "softmax + dropout + matmul"
BERT_PARTS = {"norm + dropout": 1, ATTENDS: 2, "dropout": 2, LINEAR_OUT: 4}
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


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.skipif(OLDEST < RELEASE < NEWEST, reason="models were rewritten between these")
def test_report_names_what_became_of_every_place(name):
    report = tridrop.swap(make(name))
    expected = Counter((PARTS if RELEASE >= NEWEST else OLDEST_PARTS)[name])
    assert Counter(" + ".join(site.parts) for site in report.sites) == +expected
    swapped = expected["dropout"]
    fused = sum(expected.values()) - swapped
    assert report.counts() == {"fused": fused, "swapped": swapped, "left": 0}
    assert f"{fused} fused, {swapped} swapped, 0 left" in str(report)
    streams = [site.stream for site in report.sites]
    assert len(set(streams)) == len(streams)


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
    found = [s for s in sites if "prob" in s.code or "attn_weights" in s.code]
    assert found
    assert {" + ".join(site.parts) for site in found} == {BYPASSING[name]}


def test_attention_that_was_chosen_otherwise_is_left():
    model = make("BERT")
    model.config._attn_implementation = "flex_attention"
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flex_attention"
    report = tridrop.swap(model)
    left = [site for site in report.sites if site.status == "left"]
    assert len(left) == 2
    assert {site.reason for site in left} == {"flex_attention was chosen for it"}
    assert model.config._attn_implementation == "flex_attention"


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
