"""Tiny models of transformers' families for the tests of tridrop.swap, and what they take.

Random weights; nothing is downloaded.
"""

from dataclasses import dataclass

import torch
import torchvision_ops  # noqa: F401  # also where processes are started that know no conftest
import transformers
from torch import Tensor, nn

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
OLDEST, NEWEST = (5, 0), (5, 24)
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


def make(name: str) -> nn.Module:
    """A model of a family, in training, with its own eager attention."""
    family = FAMILIES[name]
    given = {**family.sizes, **family.rates}
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
    if family.model.endswith("Model") and not family.model.endswith("LMHeadModel"):
        return given
    labels = words(6) if "ConditionalGeneration" in family.model else ids.clone()
    labels[0, -2:] = -100
    return given | {"labels": labels}
