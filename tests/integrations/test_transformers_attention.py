"""attn_implementation="tridrop" in whole models of transformers, beside their own eager attention.

Tiny models with random weights; nothing is downloaded.
"""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

import tridrop
from tridrop.integrations import transformers as plug
from tridrop.integrations import transformers_masks as masks

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
# Between these two T5 came to the attention interface; ModernBERT's own table of functions fell.
OLDEST, NEWEST = (5, 0), (5, 24)
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLM = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60,
    "max_position_embeddings": 64, "forced_eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "vocab_size": 60,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "mask_time_prob": 0.0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
GEMMA = {"sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
MOE = {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
CHUNKS = {"attention_chunk_size": 5, "num_local_experts": 2, "intermediate_size_mlp": 48}
# With what comes of it: which kinds of masks, biases and heads meet.
FAMILIES = {
    "Bert": TEXT,
    "GPT2": GPT2,
    "T5": T5,  # position bias, cross attention
    "Bart": BART,  # cross attention
    "Llama": LLM,
    "Qwen2": LLM,
    "Mistral": LLM | {"sliding_window": 5},
    "Gemma2": LLM | GEMMA,  # softcap, every other layer with a window
    "GptOss": LLM | MOE,  # sinks
    "Llama4Text": LLM | CHUNKS,
    "GPTNeoX": TEXT,
    "ViT": IMAGE,
    "Dinov2": IMAGE | {"mlp_ratio": 2},
    "Wav2Vec2": SPEECH,
    # Modules without is_causal or with a wrong one, a mask that the model computes with, and one
    # that only eager knows.
    "Splinter": TEXT,
    "PegasusX": BART,
    "Doge": LLM,
    "BigBirdPegasus": BART | {"attention_type": "original_full"},
}
IN_WORDS = [name for name in FAMILIES if name not in ("ViT", "Dinov2", "Wav2Vec2")]
LENGTH = 12


def make(family: str, **more):
    return getattr(transformers, f"{family}Config")(**FAMILIES[family], **more)


def twins(config, auto=AutoModel):
    """One model with eager attention and with tridrop's, of equal weights, in evaluation."""
    torch.manual_seed(0)
    eager = auto.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for parameter in eager.parameters():  # sinks and biases are zeros or garbage at first
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    fused = auto.from_config(copy.deepcopy(config), attn_implementation="tridrop").eval()
    fused.load_state_dict(eager.state_dict())
    assert fused.config._attn_implementation == "tridrop"
    return eager, fused


def batch(config, padding: str | None = None) -> tuple[dict, Tensor]:
    """Inputs, and which rows of the first output are valid."""
    g = torch.Generator().manual_seed(1)
    if hasattr(config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}, torch.tensor(True)
    if hasattr(config, "conv_dim"):
        given = {"input_values": torch.randn(3, 400, generator=g)}
        if padding is None:
            return given, torch.tensor(True)
        valid = torch.ones(3, 400, dtype=torch.long)
        valid[1, 200:] = 0
        frames = torch.ones(3, 19, dtype=torch.bool)
        frames[1, 8:] = False
        return given | {"attention_mask": valid}, frames
    given = {"input_ids": torch.randint(3, 60, (3, LENGTH), generator=g)}
    valid = torch.ones(3, LENGTH, dtype=torch.long)
    if padding == "right":
        valid[1, -4:] = 0
    elif padding == "left":
        valid[1, :4] = 0
        valid[2, :7] = 0
    if padding is not None:
        given["attention_mask"] = valid
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 60, (3, 7), generator=g)
        valid = torch.ones(3, 7)
    return given, valid.bool()


def compare(a: Tensor, b: Tensor, valid: Tensor, tolerance: float = 1e-5) -> None:
    assert b.isfinite().all()
    rows = valid.expand(a.shape[:2])
    torch.testing.assert_close(b[rows], a[rows], rtol=tolerance, atol=tolerance)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments, and the shapes, of every call of the fused function."""
    seen = []
    real = plug.scaled_dot_product_attention

    def record(query, key, value, mask, p, causal, scale, **keywords):
        seen.append({"mask": mask, "causal": causal, **keywords})
        return real(query, key, value, mask, p, causal, scale, **keywords)

    monkeypatch.setattr(plug, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:T5PreTrainedModel")
def test_models_equal_eager(family, calls):
    config = make(family)
    eager, fused = twins(config)
    for padding in (None, "right", "left"):
        given, valid = batch(config, padding)
        with torch.no_grad():
            compare(eager(**given)[0], fused(**given)[0], valid)
    if family != "T5" or RELEASE >= NEWEST:
        assert calls
    elif RELEASE == OLDEST:  # it stays eager there, and warns: the test below
        assert not calls


@pytest.mark.parametrize("family", ["Bert", "Llama", "Gemma2", "GptOss", "T5", "Wav2Vec2"])
@pytest.mark.filterwarnings("ignore:T5PreTrainedModel")
def test_gradients_equal_eager_where_nothing_drops(family):
    config = make(family)
    given, valid = batch(config, "right" if family == "Wav2Vec2" else "left")
    results = []
    for model in twins(config):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        model.config.layerdrop = 0.0
        out = model(**given)[0]
        (out * valid[..., None] * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max() + 1e-2))


def numbered(model) -> list[nn.Module]:
    """The attention modules of Bert and Llama, with their sites."""
    found = [
        m for m in model.modules() if type(m).__name__ in ("BertSelfAttention", "LlamaAttention")
    ]
    for site, module in enumerate(found):
        module._tridrop_attention_site = site
    return found


RATES = {
    "Bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0},
    "Llama": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("want_weights", [False, True])
@pytest.mark.parametrize("family", RATES)
def test_dropout_is_eagers_with_the_exported_mask(family, want_weights, monkeypatch):
    config = make(family, **RATES[family])
    eager, fused = (model.train() for model in twins(config))
    numbered(fused)
    given, valid = batch(config, "right")
    given["output_attentions"] = want_weights
    with tridrop.rng(7):
        out = fused(**given)
    real, sites = F.dropout, iter(range(9))

    def exported(x, p=0.5, training=True, inplace=False):
        if x.dim() != 4 or not training or p == 0:
            return real(x, p, training, inplace)
        keep = tridrop.attention_keep_mask(tridrop.fold_in(7, next(sites)), x.shape, p)
        return torch.where(keep, x / (1 - p), 0.0)

    monkeypatch.setattr(F, "dropout", exported)
    expected = eager(**given)
    assert next(sites) == config.num_hidden_layers
    compare(expected[0], out[0], valid)
    if want_weights:
        for a, b in zip(expected.attentions, out.attentions, strict=True):
            rows = valid[:, None, :].expand(a.shape[:3])
            torch.testing.assert_close(b[rows], a[rows])


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Bart", "Gemma2", "GptOss", "GPTNeoX"])
def test_weights_are_returned_where_they_are_asked_for(family):
    config = make(family)
    eager, fused = twins(config)
    given, valid = batch(config, "right")
    with torch.no_grad():
        a, b = (model(**given, output_attentions=True) for model in (eager, fused))
        assert (fused(**given).get("attentions") or ()) == ()
    compare(a[0], b[0], valid)
    names = [name for name in a if "attentions" in name]
    assert names
    for name in names:
        assert len(a[name]) == len(b[name])
        for x, y in zip(a[name], b[name], strict=True):
            rows = torch.ones(3, 7) if name != "encoder_attentions" else given["attention_mask"]
            rows = (valid if "encoder_attentions" not in a else rows).bool()
            rows = rows[:, None].expand(x.shape[:3])
            torch.testing.assert_close(y[rows], x[rows], rtol=1e-5, atol=1e-5)


def test_the_configuration_may_ask_for_weights():
    config = make("Llama")
    _, fused = twins(config)
    fused.config.output_attentions = True  # transformers allows it with "eager" alone
    assert len(fused(**batch(config)[0]).attentions) == 2


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_packed_sequences(family, calls):
    config = make(family)
    eager, fused = twins(config)
    ids = torch.randint(3, 60, (1, 14))
    positions = torch.tensor([[*range(5), *range(9)]])
    offsets = torch.tensor([0, 5, 14], dtype=torch.int32)
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    lengths |= {"max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        expected = eager(**given)[0]
        compare(expected, fused(**given)[0], torch.tensor(True))
        assert calls[-1]["mask"].shape == (1, 1, 14, 14)
        compare(expected, fused(**given, **lengths)[0], torch.tensor(True))
    # A window is in the mask alone, so there the mask is read.
    assert ("cu_seqlens_q" in calls[-1]) == (family == "Llama")
    assert (calls[-1]["mask"] is None) == (family == "Llama")


CAUSAL = ["Llama", "Mistral", "GPT2", "Gemma2", "GptOss"]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_eager(family, cache):
    config = make(family)
    eager, fused = twins(config, AutoModelForCausalLM)
    given, _ = batch(config, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    a, b = (m.generate(**given, **options, pad_token_id=0) for m in (eager, fused))
    assert torch.equal(a, b)
    a, b = (m.generate(given["input_ids"], **options, pad_token_id=0) for m in (eager, fused))
    assert torch.equal(a, b)


def test_generation_in_pieces():
    """Several queries behind a cache: causality then is in the mask."""
    config = make("Llama")
    eager, fused = twins(config)
    ids = batch(config)[0]["input_ids"]
    outs = []
    for model in (eager, fused):
        with torch.no_grad():
            cache = model(ids[:, :5], use_cache=True).past_key_values
            outs.append(model(ids[:, 5:], past_key_values=cache)[0])
    compare(*outs, torch.tensor(True))


@pytest.mark.parametrize("family", ["Bert", "Llama"])
@pytest.mark.filterwarnings("ignore")
def test_compilation_in_one_graph(family):
    config = make(family, **RATES[family])
    eager, fused = twins(config)
    numbered(fused)
    for padding in (None, "right"):
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        given, valid = batch(config, padding)
        given["use_cache"] = False
        compare(eager(**given)[0], compiled(**given)[0], valid)
        fused.train()
        seed = tridrop.new_seed()
        results = []
        for model in (fused, compiled):
            fused.zero_grad()
            with tridrop.rng(seed):
                out = model(**given)[0]
            out[valid].square().sum().backward()
            results.append([out.detach(), *(p.grad for p in fused.parameters())])
        compare(results[0][0], results[1][0], valid)
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        fused.eval()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_gradient_checkpointing_draws_the_same_masks(family, reentrant):
    config = make(family, **RATES[family])
    _, fused = twins(config)
    fused.train()
    given, valid = batch(config, "right")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fused.zero_grad()
        torch.manual_seed(3)
        out = fused(**given)[0]
        out[valid].square().sum().backward()
        results.append([p.grad.clone() for p in fused.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("family", ["Bert", "Llama", "Bart"])
def test_autocast(family):
    config = make(family)
    eager, fused = twins(config)
    given, valid = batch(config, "right")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = eager(**given)[0], fused(**given)[0]
    assert a.dtype == b.dtype
    compare(a.float(), b.float(), valid, tolerance=0.05)


def test_a_model_without_the_interface_stays_eager(monkeypatch):
    """What transformers says itself, and what it does not say."""
    said = []
    logger = transformers.modeling_utils.logger
    monkeypatch.setattr(logger, "warning", lambda text, *_, **__: said.append(text))
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=60)
    model = AutoModel.from_config(config).eval()
    model.set_attn_implementation("tridrop")
    assert any("does not support setting its attention implementation" in text for text in said)
    assert model.config._attn_implementation == "eager"
    # Made with the name, nothing is said, and masks are asked for by that name. Bloom makes its own
    # in the oldest release.
    masks._look_for_float_masks.cache_clear()
    config = make("T5") if RELEASE == OLDEST else config
    eager, fused = twins(config)
    given, valid = batch(config, "left")
    with torch.no_grad(), pytest.warns(UserWarning, match="PreTrainedModel.* stays eager"):
        out = fused(**given)[0]
    compare(eager(**given)[0], out, valid)


def test_models_with_a_table_of_their_own_refuse_the_name():
    config = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]], vocab_size=60
    )
    with pytest.raises(KeyError, match="tridrop"):
        AutoModel.from_config(config, attn_implementation="tridrop")
