"""Swapped models in the hands of the libraries that train them: Trainer, PEFT, Liger."""

import copy
import pickle

import pytest
import torch
import transformers
from swap_families import batch, make
from swap_helpers import (
    assert_same,
    classes_of,
    outcome,
    set_rates,
    swapped_outcome,
    twin_outcome,
)
from torch import nn

import tridrop

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


# -------------------------------------------------------------------------------------- Trainer


def trained(model: nn.Module, folder, **arguments) -> tuple[list[float], dict]:
    """The losses and the weights after three steps of the Trainer."""
    inputs = batch("BERT")
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(3)] * 2
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_trainer(checkpointing, tmp_path):
    """Without dropping as the original; dropping, the same again and with checkpointing."""
    original, model = make("BERT"), make("BERT")
    tridrop.swap(model)
    again = copy.deepcopy(model)
    runs = [trained(m, tmp_path, gradient_checkpointing=checkpointing) for m in (model, again)]
    assert len(runs[0][0]) == 3
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1])
    still = [make("BERT"), original]
    tridrop.swap(still[0])
    for m in still:
        set_rates(m, 0.0)
    found, expected = (trained(m, tmp_path, gradient_checkpointing=checkpointing) for m in still)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[0] != pytest.approx(runs[0][0], rel=1e-4)


# ------------------------------------------------------------------------------------------ PEFT


def adapted(model: nn.Module, **arguments) -> nn.Module:
    """With LoRA whose B is not zero, as if it were trained."""
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value", "dense"], lora_dropout=0.25, **arguments
    )
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


@pytest.mark.parametrize("order", ["swap, then LoRA", "LoRA, then swap"])
def test_lora_drops_where_the_report_says(order):
    """An adapter on the linear layer in front of a dropout takes part like any other module."""
    inputs, model = batch("BERT"), make("BERT")
    twin = adapted(copy.deepcopy(model))
    if order == "swap, then LoRA":
        tridrop.swap(model)
        # The adapters' own dropouts are not of the swap; at 0 there is nothing of them to compare.
        model = adapted(model)
        report = tridrop.swap(copy.deepcopy(twin))
        for m in (model, twin):
            for name, module in m.named_modules():
                if "lora_dropout" in name and hasattr(module, "p"):
                    module.p = 0.0
    else:
        model = adapted(model)
        report = tridrop.swap(model)
        inside = [site for site in report.sites if "lora_dropout" in site.code + site.module]
        assert inside
        assert all(site.status != "left" for site in inside)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in twin.named_parameters() if p.requires_grad]
    if order == "LoRA, then swap":
        found, draws = swapped_outcome(model, inputs)
        assert_same(found, twin_outcome(twin, inputs, report, draws))
    for m in (model, twin):
        set_rates(m, 0.0)
    assert_same(outcome(model, inputs), outcome(twin, inputs))


@pytest.mark.parametrize("state", ["merged", "disabled", "unmerged again", "unloaded"])
def test_states_of_adapters_are_honoured_after_the_swap(state):
    model, inputs = adapted(make("BERT")), batch("BERT")
    twin = copy.deepcopy(model)
    tridrop.swap(model)
    results = []
    for m in (model, twin):
        set_rates(m, 0.0)
        if state == "disabled":
            m.base_model.disable_adapter_layers()
        elif state == "unloaded":
            m = m.merge_and_unload()
        else:
            m.merge_adapter()
            if state == "unmerged again":
                m.unmerge_adapter()
        results.append(m(**inputs).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_adapters_are_saved_and_unswapped(tmp_path):
    model = adapted(make("BERT"))
    before, keys = classes_of(model), list(model.state_dict())
    tridrop.swap(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(make("BERT"), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    copied = pickle.loads(pickle.dumps(model))
    inputs = batch("BERT")
    assert_same(swapped_outcome(copied, inputs)[0], swapped_outcome(model, inputs)[0])
    tridrop.unswap(model)
    assert classes_of(model) == before


# ----------------------------------------------------------------------------------------- Liger


@pytest.mark.parametrize("order", ["Liger, then swap", "swap, then Liger"])
def test_modules_that_liger_patched_stay_ligers(order):
    """Its kernels need a GPU; here it is the structure that counts."""
    liger = pytest.importorskip("liger_kernel.transformers")
    patched = ("LlamaRMSNorm", "LlamaMLP")
    model, before = make("Llama"), classes_of(make("Llama"))
    if order == "swap, then Liger":
        tridrop.swap(model)
    saved = copy.copy(vars(transformers.models.llama.modeling_llama))
    try:
        liger.apply_liger_kernel_to_llama(model=model)
        theirs = {
            name: (type(m), vars(m).get("forward"))
            for name, m in model.named_modules()
            if type(m).__name__.startswith(("Liger", *patched))
        }
        assert theirs
        if order == "Liger, then swap":
            report = tridrop.swap(model)
            sites = [site for site in report.sites if site.kind == "LlamaAttention"]
            assert [site.status for site in sites] == ["fused", "fused"]
        assert model.config._attn_implementation == "tridrop"
        for name, (kind, forward) in theirs.items():
            module = model.get_submodule(name)
            assert type(module) is kind
            assert vars(module).get("forward") == forward
        tridrop.unswap(model)
        assert model.config._attn_implementation == "eager"
    finally:
        vars(transformers.models.llama.modeling_llama).update(saved)
    assert len(classes_of(model)) == len(before)
