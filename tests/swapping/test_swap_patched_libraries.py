"""The same for classes of libraries: timm's drop path, PEFT's layers, transformers' norms."""

import copy

import peft
import pytest
import timm
import torch
import transformers
from swap_families import batch, make
from swap_helpers import assert_same, outcome, set_rates, swapped_outcome, twin_outcome
from timm.layers import drop as timm_drop
from torch import nn

import tridrop

X = torch.linspace(-2, 2, 4 * 3 * 8).view(4, 3, 8).sin()


def vit() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, num_heads=2, depth=2,
            num_classes=3, drop_path_rate=0.4, proj_drop_rate=0.0,
        ).train()  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["method", "function"])
def test_timms_drop_path(when, what, monkeypatch):
    """Its class's forward, and the function of its file that this calls."""
    tridrop.swap(vit())  # another model, earlier
    model, images = vit(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in model.blocks:
            block.ls1 = block.ls2 = nn.Identity()
    ours = copy.deepcopy(model)

    def patch():
        if what == "method":
            monkeypatch.setattr(timm_drop.DropPath, "forward", lambda self, x: x * 0.25)
        else:
            monkeypatch.setattr(timm_drop, "drop_path", lambda x, *args: x * 0.25)

    if when == "before":
        patch()
    report = tridrop.swap(ours)
    if when == "after":
        assert {s.status for s in report.sites if s.p} <= {"fused", "swapped"}
        patch()
        assert "DropPath" in report.changed()
    torch.testing.assert_close(ours(images), model(images))
    monkeypatch.undo()
    if when == "after":
        assert not report.changed()
        assert len({tuple(ours(images).flatten().tolist()) for _ in range(12)}) > 1, (
            "it drops again"
        )


def adapted(**kwargs) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        config = peft.LoraConfig(
            target_modules=["0", "1"], r=2, lora_alpha=4, init_lora_weights=False, **kwargs
        )
        return peft.get_peft_model(base, config).train()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["lora.Linear", "torch's Linear", "variant", "cast"])
def test_pefts_layers(when, what, monkeypatch):
    dora = what == "variant"
    options = {"use_dora": dora, "lora_dropout": 0.3 if dora else 0.0}
    earlier = adapted(use_dora=dora, lora_dropout=0.3)
    tridrop.swap(earlier)
    earlier(X)
    model = adapted(**options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = X
    if what == "cast":  # x is cast to the adapter's dtype, and the op would do that
        for name, p in model.named_parameters():
            p.data = p.data if "lora" in name else p.data.bfloat16()
        x = X.bfloat16()
    ours = copy.deepcopy(model)

    def patch():
        if what == "lora.Linear":
            forward = peft.tuners.lora.Linear.forward
            patched = lambda self, x, *args, **kwargs: forward(self, x, *args, **kwargs) + 2.1  # noqa: E731
            monkeypatch.setattr(peft.tuners.lora.Linear, "forward", patched)
        elif what == "torch's Linear":
            linear = nn.Linear.forward
            monkeypatch.setattr(nn.Linear, "forward", lambda self, x: linear(self, x) * 2)
        elif what == "variant":
            kind = peft.tuners.lora.variants.DoraLinearVariant
            patched = lambda module, active_adapter, x, result, **kwargs: result + 1  # noqa: E731
            monkeypatch.setattr(kind, "forward", staticmethod(patched))
        else:
            kind = peft.tuners.tuners_utils.BaseTunerLayer
            patched = lambda self, x, dtype: x.to(dtype) * 3  # noqa: E731
            monkeypatch.setattr(kind, "_cast_input_dtype", patched)

    if when == "before":
        patch()
    report = tridrop.swap(ours)
    unpatched = ours(x)
    if when == "after":
        torch.testing.assert_close(unpatched, model(x), rtol=1e-2, atol=1e-2)
        patch()
        assert report.changed()
        assert not torch.allclose(ours(x), unpatched, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours(x), model(x))
    if what == "variant":  # also while something drops, which is what is exchanged of DoRA
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_a_block_of_transformers(name, when, monkeypatch):
    kind = {
        "GPT-2": transformers.models.gpt2.modeling_gpt2.GPT2MLP,
        "BERT": transformers.models.bert.modeling_bert.BertSelfOutput,
    }[name]
    tridrop.swap(make(name))
    model = make(name)
    set_rates(model, 0.0)
    ours = copy.deepcopy(model)
    forward = kind.forward

    def patch():
        monkeypatch.setattr(kind, "forward", lambda self, *args: forward(self, *args) * 2)

    if when == "before":
        patch()
    report = tridrop.swap(ours)
    if when == "after":
        patch()
        assert report.changed() == [kind.__name__]
    assert_same(outcome(ours, batch(name)), outcome(model, batch(name)))
    monkeypatch.undo()
    if when == "after":
        assert_same(outcome(ours, batch(name)), outcome(model, batch(name)))


def test_a_norm_of_transformers(monkeypatch):
    """Which is known by its form, also where the block of it is one op with a dropout."""
    kind = transformers.models.t5.modeling_t5.T5LayerNorm
    forward = kind.forward
    model = make("T5")
    report = tridrop.swap(model)
    original = copy.deepcopy(model)
    tridrop.unswap(original)
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 1.5)
    found, draws = swapped_outcome(model, batch("T5"))
    assert_same(found, twin_outcome(original, batch("T5"), report, draws))
    assert report.changed() == [kind.__name__]


def test_an_activation_of_transformers(monkeypatch):
    kind = type(make("GPT-2").transformer.h[0].mlp.act)
    forward = kind.forward
    model = make("GPT-2")
    report = tridrop.swap(model)
    original = copy.deepcopy(model)
    tridrop.unswap(original)
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 1.5)
    found, draws = swapped_outcome(model, batch("GPT-2"))
    assert_same(found, twin_outcome(original, batch("GPT-2"), report, draws))


def test_attention_of_a_model_that_calls_a_replaced_function_is_left(monkeypatch):
    model = make("BERT")
    model.set_attn_implementation("sdpa")

    def averaged(query, key, value, *args, **kwargs):
        return value.mean(-2, keepdim=True).expand_as(query)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", averaged)
    set_rates(model, 0.1)
    report = tridrop.swap(model)
    assert model.config._attn_implementation == "sdpa"
    assert "torch's scaled_dot_product_attention was replaced" in {s.reason for s in report.sites}


def _wrapped(function, calls):
    def attention_forward(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return attention_forward


def _replace(what, calls, monkeypatch):
    """Put another function in the place of the one that BERT's attention looks up."""
    file = transformers.models.bert.modeling_bert
    table = file.ALL_ATTENTION_FUNCTIONS
    if what == "eager":
        other = _wrapped(file.eager_attention_forward, calls)
        monkeypatch.setattr(file, "eager_attention_forward", other)
    elif what == "the library's":
        monkeypatch.setitem(type(table)._global_mapping, "sdpa", _wrapped(table["sdpa"], calls))
    elif what == "the file's":
        monkeypatch.setitem(table._local_mapping, "sdpa", _wrapped(table["sdpa"], calls))
    else:
        functional = torch.nn.functional
        other = _wrapped(functional.scaled_dot_product_attention, calls)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", other)


REPLACED = ["eager", "the library's", "the file's", "torch's"]


@pytest.mark.parametrize("what", REPLACED)
def test_an_attention_function_that_was_replaced_is_what_runs(what, monkeypatch):
    calls = []
    model = make("BERT").train()
    chosen = "eager" if what == "eager" else "sdpa"
    model.set_attn_implementation(chosen)
    _replace(what, calls, monkeypatch)
    report = tridrop.swap(model)
    assert model.config._attn_implementation == chosen
    assert len([s for s in report.sites if s.status == "left" and "replaced" in s.reason]) == 2
    model(**batch("BERT"))
    assert len(calls) == 2
    monkeypatch.undo()
    tridrop.swap(model)
    assert model.config._attn_implementation == "tridrop"


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("what", REPLACED)
def test_the_report_says_that_an_attention_function_was_replaced(what, dry_run, monkeypatch):
    model = make("BERT").train()
    model.set_attn_implementation("eager" if what == "eager" else "sdpa")
    report = tridrop.swap(model, dry_run=dry_run)
    assert report.changed() == []
    _replace(what, [], monkeypatch)
    assert report.changed() == ["BertSelfAttention"]
    assert "Changed since the swap: BertSelfAttention" in str(report)
    monkeypatch.undo()
    assert report.changed() == []


@pytest.mark.parametrize("name", ["BERT", "BART", "ViT", "Llama", "T5", "GPT-2"])
def test_functions_of_the_libraries_own_are_none_that_were_replaced(name):
    for chosen in ("eager", "sdpa"):
        model = make(name)
        model.set_attn_implementation(chosen)
        report = tridrop.swap(model)
        assert not [s for s in report.sites if s.status == "left" and "replaced" in s.reason]
        assert report.changed() == []


def test_another_attention_that_is_set_after_the_swap_stays(monkeypatch):
    model = make("BERT").train()
    model.set_attn_implementation("sdpa")
    report = tridrop.swap(model)
    model.set_attn_implementation("eager")
    assert report.changed() == ["BertSelfAttention"]
    tridrop.unswap(model)
    assert model.config._attn_implementation == "eager"  # and not what it was before the swap
    assert report.changed() == []
    tridrop.swap(model)
    tridrop.unswap(model)
    assert model.config._attn_implementation == "eager"
