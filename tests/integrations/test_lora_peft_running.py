"""What swapped adapters keep for backward, and how they are run: checkpoints, Trainer, compile."""

import contextlib
import weakref

import pytest
import torch
from lora_adapters import (
    SEED,
    adapted,
    assert_equal_steps,
    config,
    data,
    peft,
    peft_layer,
    step,
    trained,
    twin_of,
    two,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tridrop


def saved(model: nn.Module, x: Tensor) -> float:
    """What a forward keeps for backward, in copies of x; parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: list[weakref.ref[list[Tensor]]] = []  # of what the graph holds, and lets go

    class Box(list):
        __slots__ = ("__weakref__",)

    def pack(tensor):
        box = Box([tensor])
        held.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box[0]):
        outs = [layer(x) for layer in model.modules() if isinstance(layer, peft_layer.LoraLayer)]
    assert len(outs) == 3
    storages = [box()[0].untyped_storage() for box in held if box() is not None]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    return sum(sizes.values()) / x.untyped_storage().nbytes()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("trained_input", [True, False])
def test_saved_bytes_of_q_k_v(p, trained_input):
    """PEFT keeps, of each projection, what it dropped and what it dropped by."""
    torch.manual_seed(0)
    model = nn.Module()
    model.q, model.k, model.v = (nn.Linear(512, n) for n in (512, 128, 128))
    model = trained(peft.get_peft_model(model, config(p, r=8), adapter_name="default"))
    x = torch.randn(256, 512, requires_grad=trained_input)
    eager = saved(model, x)
    # Where x needs no gradient, what it is multiplied by is not kept.
    assert eager == pytest.approx((6.05 if trained_input else 3.05) if p else 1.05, abs=0.01)
    tridrop.swap(model)
    assert saved(model, x) < 1.1


def test_saved_bytes_of_x_in_half_precision():
    """PEFT keeps a copy of x in fp32, even without dropout; and tridrop none."""
    for p in (0.0, 0.1):
        model = nn.Module()
        model.q, model.k, model.v = (nn.Linear(512, 128, dtype=torch.bfloat16) for _ in range(3))
        model = trained(peft.get_peft_model(model, config(p, r=8)))
        x = torch.randn(256, 512, dtype=torch.bfloat16, requires_grad=True)
        assert saved(model, x) > (6 if p == 0 else 12)
        tridrop.swap(model)
        assert saved(model, x) < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_bytes_of_dora_have_no_dropped_copy(dtype):
    model = nn.Module()
    model.q, model.k, model.v = (nn.Linear(512, 64, dtype=dtype) for _ in range(3))
    model = trained(peft.get_peft_model(model, config(0.1, r=8, use_dora=True)))
    x = torch.randn(256, 512, requires_grad=True, dtype=dtype)
    before = saved(model, x)
    tridrop.swap(model)
    # x once, and of each layer in fp32 what the magnitude's gradient needs, [tokens, out] twice,
    # and the frozen weight where PEFT casts it.
    wide = 4 / dtype.itemsize
    kept = 1.15 + 3 * wide * 2 * 64 / 512 + (3 * wide * 64 / 256 if wide > 1 else 0)
    assert saved(model, x) < kept < before - 3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("trained_input", [True, False])
def test_checkpointing(reentrant, trained_input):
    model = adapted(0.3)
    report = tridrop.swap(model)
    twin = twin_of(model, report)

    def run(m, seeded):
        m.zero_grad(set_to_none=True)
        x = data().requires_grad_(trained_input or (seeded and reentrant))
        with tridrop.rng(SEED) if seeded else contextlib.nullcontext():
            out = checkpoint(m, x, use_reentrant=reentrant) if seeded else m(x)
            out.square().sum().backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    assert_equal_steps(run(model, True), run(twin, False))
    # Drawn seeds are recomputed too: torch restores its generator.
    torch.manual_seed(3)
    x = data().requires_grad_()
    model.zero_grad(set_to_none=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_of_a_transformers_model(reentrant):
    """As a Trainer turns it on: the embeddings' output is made to require a gradient."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    about = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=50,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(about)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, config(0.2, target_modules=names, task_type="CAUSAL_LM"))
    trained(model)
    report = tridrop.swap(model)
    fused = [s for s in report.sites if s.status == "fused"]
    assert len(fused) == 14
    assert all(s.parts == ("dropout", "lora_A", "lora_B", "add") for s in fused)
    words = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        with tridrop.rng(SEED):
            model(input_ids=words, labels=words).loss.backward()
        results.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 28
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_trainer_with_the_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tridrop.swapping.trainer import SwapCallback

    torch.manual_seed(0)
    about = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(about)
    model = peft.get_peft_model(
        base, config(0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_steps=2
    )
    words = torch.arange(6)
    callback = SwapCallback()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": words, "labels": words}] * 4,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.report.counts()["fused"] == 7
    found = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM(about), tmp_path / "checkpoint-2"
    )
    kept = {n: w for n, w in model.state_dict().items() if "lora_" in n}
    assert any(w.any() for n, w in kept.items() if "lora_B" in n)
    assert all(torch.equal(found.state_dict()[n], w) for n, w in kept.items())


@pytest.mark.parametrize("adapters", ["one", "two"])
def test_compile(adapters):
    model = adapted(0.2) if adapters == "one" else two()
    tridrop.swap(model)
    x, seed = data(), tridrop.fold_in(SEED, 0)
    with tridrop.rng(seed):
        expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with tridrop.rng(seed):
        found = step(compiled, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_equal_steps(found, expected)
