"""Adapters of PEFT that come, go, merge and are left alone, in a swapped model."""

import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch
from lora_adapters import (
    SEED,
    WIDTH,
    Attention,
    adapted,
    assert_as_peft,
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
from swap_helpers import classes_of
from torch import nn
from torch.nn import functional as F

import tridrop

# ----------------------------------------------------------------------- states of adapters


@pytest.mark.parametrize("p", [(0.2, 0.2), (0.1, 0.5), (0.3, 0.0)], ids=str)
def test_several_active_adapters(p):
    model = two(p)
    report = tridrop.swap(model)
    streams = [s.stream for s in report.sites if s.stream is not None]
    assert len(streams) == len(set(streams)) == 3 * sum(rate > 0 for rate in p)
    assert_as_peft(model, data())


def test_adapters_of_one_rate_read_x_once():
    model = two()
    tridrop.swap(model)
    with mock.patch.object(
        tridrop.swapping.branches.F, "lora_deltas", wraps=tridrop.lora_deltas
    ) as together:
        step(model, data())
    assert together.call_count == 3


def test_a_mask_does_not_depend_on_the_other_active_adapters():
    model = two()
    tridrop.swap(model)
    report = tridrop.swap(model)
    model.base_model.set_adapter("other")
    twin = twin_of(model, report)
    with tridrop.rng(SEED):
        assert_equal_steps(step(model, data()), step(twin, data()))


@pytest.mark.parametrize(
    "state", ["disabled", "merged", "unmerged", "unloaded", "deleted", "scaled"]
)
def test_states_are_those_of_peft(state):
    """Changed after the swap."""
    model = two()
    report = tridrop.swap(model)
    twin = twin_of(model, report)
    results = []
    for m in (model, twin):
        with contextlib.ExitStack() as stack:
            if state == "disabled":
                stack.enter_context(m.disable_adapter())
            elif state in ("merged", "unmerged"):
                m.merge_adapter()
                if state == "unmerged":
                    m.unmerge_adapter()
            elif state == "unloaded":
                m = m.merge_and_unload()
            elif state == "deleted":
                m.delete_adapter("other")
            elif state == "scaled":
                for layer in m.modules():
                    if isinstance(layer, peft_layer.LoraLayer):
                        layer.set_scale("default", 0.5)
            stack.enter_context(tridrop.rng(SEED))
            results.append(step(m.train(), data()))
    assert_equal_steps(*results)


def test_an_adapter_added_after_the_swap_drops_and_is_numbered_by_the_next():
    model = adapted(0.2)
    tridrop.swap(model)
    model.add_adapter("late", config(0.5))
    model.set_adapter("late")
    trained(model)
    outs = [model(data()) for _ in range(2)]
    assert not torch.equal(*outs)
    assert_as_peft(model, data())


def test_mixed_batches_are_pefts():
    model = two()
    names = ["default", "__base__", "other"]
    expected = step(copy.deepcopy(model).eval(), data(), adapter_names=names)
    tridrop.swap(model)
    found = step(model.eval(), data(), adapter_names=names)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_other_modules_that_are_saved_are_trained_as_before():
    model = adapted(0.2, modules_to_save=["head"])
    assert_as_peft(model, data())
    assert any("modules_to_save" in name for name in step(model, data()))


def test_save_and_load(tmp_path):
    model = two()
    keys = list(model.state_dict())
    before = classes_of(model)
    tridrop.swap(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = peft.PeftModel.from_pretrained(Attention(), tmp_path, is_trainable=True)
    other.load_adapter(str(tmp_path / "other"), "other", is_trainable=True)
    other.base_model.set_adapter(["default", "other"])
    tridrop.swap(other.train())
    copied = pickle.loads(pickle.dumps(model))
    with tridrop.rng(SEED):
        expected = step(model, data())
    for m in (other, copied, copy.deepcopy(model)):
        with tridrop.rng(SEED):
            assert_equal_steps(step(m, data()), expected, 0)
    tridrop.unswap(model)
    assert classes_of(model) == before


# ------------------------------------------------------------------------- what is left alone


def test_hooks_on_an_adapters_parts_are_called():
    model = adapted(0.3)
    report = tridrop.swap(model)
    calls = []
    for part in ("lora_A", "lora_B", "lora_dropout"):
        module = getattr(model.base_model.model.q, part)["default"]
        module.register_forward_hook(lambda *_, part=part: calls.append(part))
    twin = twin_of(model, report)
    with tridrop.rng(SEED):
        found = step(model, data())
    assert calls == ["lora_dropout", "lora_A", "lora_B"]
    assert_equal_steps(found, step(twin, data()))


def test_a_forward_set_on_an_adapters_part_is_called():
    """As accelerate does where it moves weights between devices."""
    model = adapted(0.3)
    report = tridrop.swap(model)
    twin = twin_of(model, report)
    calls = []
    for m in (model, twin):
        part = m.base_model.model.q.lora_A["default"]
        part.forward = lambda x, part=part: calls.append(part) or F.linear(x, part.weight)
    with tridrop.rng(SEED):
        assert_equal_steps(step(model, data()), step(twin, data()))
    assert len(calls) == 2


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 0, WIDTH), (1, 2, 3, WIDTH)], ids=str)
def test_any_leading_shape(shape):
    assert_as_peft(adapted(0.3), torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_strides_of_x_and_of_the_gradient():
    model = adapted(0.3)
    report = tridrop.swap(model)
    twin = twin_of(model, report)
    x = torch.randn(WIDTH, 5, 3, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    for stride_0 in (x, x[:1].expand(4, -1, -1)):
        with tridrop.rng(SEED):
            found = model(stride_0).sum()
        torch.testing.assert_close(found, twin(stride_0).sum())
        found.backward()


def test_variants_are_reported():
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(Attention(), config(0.3, kasa_config=peft.KasaConfig())))
    report = tridrop.swap(model)
    assert {site.parts for site in report.sites} == {("dropout",)}
    assert {site.reason for site in report.sites} == {"its adapter is a KasaLinearVariant"}
    assert "KasaLinearVariant" in str(report)
    assert report.counts() == {"fused": 0, "swapped": 3, "left": 0}
    with tridrop.rng(SEED):
        assert_equal_steps(step(model, data()), step(twin_of(model, report), data()))


def test_convolutions_and_embeddings_keep_their_branches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 4, 3)

        def forward(self, x):
            return self.conv(self.embed(x).transpose(1, 2))

    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config(0.3, target_modules=["embed", "conv"]))
    report = tridrop.swap(trained(model))
    reasons = {s.module.split(".")[2]: s.reason for s in report.sites}
    assert reasons.keys() == {"conv", "embed"}
    assert all(reasons.values())
    x = torch.randint(9, (2, 7))
    torch.testing.assert_close(model.eval()(x), twin_of(model, report).eval()(x))
    model.train()(x).sum().backward()


def test_switches_and_the_written_forward():
    model = adapted(0.2)
    off = tridrop.swap(model, inside=False)
    assert off.counts() == {"fused": 0, "swapped": 3, "left": 0}
    assert {site.reason for site in off.sites} == {"its switch is off"}
    with tridrop.rng(SEED):
        apart = step(model, data())
    report = tridrop.swap(model)
    assert report.counts() == {"fused": 3, "swapped": 0, "left": 0}
    with tridrop.rng(SEED):
        assert_equal_steps(step(model, data()), apart)
    text = report.source("base_model.model.q")
    assert "_tridrop.add(self, active_adapter, _deltas, x, result)" in text
    assert "lora_B(lora_A(" not in text
    measured = report.verify(data()).cost
    assert measured.after.saved_bytes < measured.before.saved_bytes


def test_a_changed_forward_is_not_rewritten():
    class Changed(peft_layer.Linear):
        def forward(self, x, *args, **kwargs):
            name = self.active_adapters[0]
            hidden = self.lora_A[name](self.lora_dropout[name](x))
            return self.base_layer(x) + F.gelu(self.lora_B[name](hidden))

    layer = trained(Changed(nn.Linear(WIDTH, 8), "default", config(0.3), r=4, lora_alpha=10))
    model = nn.Sequential(layer)
    (site,) = tridrop.swap(model).sites
    assert (site.parts, site.reason) == (
        ("dropout",),
        "the forward of Changed is not one that tridrop recognises",
    )


# ------------------------------------------------------------ torch's encoder, in evaluation


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:.*nested tensor")
@pytest.mark.parametrize("first", [False, True], ids=["swap-first", "adapter-first"])
@pytest.mark.parametrize("p", [0.1, 0.0])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj", "self_attn"])
def test_encoders_in_evaluation_do_not_lose_their_adapters(target, stacked, p, first):
    """torch's inference path reads the weights of the base past them: PEFT's own result is lost."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if stacked else nn.Sequential(layer)
    if not first:
        tridrop.swap(model)
    config = peft.LoraConfig(r=4, lora_dropout=p, target_modules=[target])
    model = trained(peft.get_peft_model(model, config)).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    masks = {"src_key_padding_mask": padding} if stacked else {}
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = model(x, **masks)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    if first:
        tridrop.swap(model)
    for gradients in (True, False):  # the base is frozen: nothing asks for a gradient either way
        with torch.set_grad_enabled(gradients):
            found = model(x, **masks)
        kept = ~padding if stacked else slice(None)
        torch.testing.assert_close(found[kept], expected[kept])
    tridrop.unswap(model)
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    assert all(m.activation_relu_or_gelu == 1 for m in layers)
    assert not any("_tridrop" in name for m in model.modules() for name in m.__dict__)


class Stack(nn.TransformerEncoder):
    pass


OFF = dict.fromkeys(("dropout", "attention", "inside", "across"), False)


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("kind", [nn.TransformerEncoder, Stack])
@pytest.mark.parametrize("switches", [{}, OFF], ids=["all", "nothing"])
def test_encoders_without_adapters_keep_their_inference_path(kind, switches):
    torch.manual_seed(0)
    plain = kind(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    model = copy.deepcopy(plain)
    tridrop.swap(model, **switches)
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.use_nested_tensor
        assert made.layers[0].activation_relu_or_gelu == 1
        config = peft.LoraConfig(r=4, target_modules=["layers.1.linear2"])
        adapted = peft.get_peft_model(made, config)
        layers = made.layers
        assert [layer.activation_relu_or_gelu for layer in layers] == [1, 0]
        assert not made.use_nested_tensor
        adapted.unload()
        assert made.use_nested_tensor
        assert [layer.activation_relu_or_gelu for layer in layers] == [1, 1]
        made.use_nested_tensor = False
        layers[0].activation_relu_or_gelu = 2
        tridrop.unswap(made)
        assert type(made) is kind
        assert not made.use_nested_tensor
        assert layers[0].activation_relu_or_gelu == 2
        made.use_nested_tensor = True
        layers[0].activation_relu_or_gelu = 1
        x, padding = torch.randn(2, 5, 16), torch.arange(5) > torch.tensor([[2], [4]])
        with torch.no_grad():
            found = made(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found, plain(x, src_key_padding_mask=padding))


def test_encoders_in_evaluation_compile_and_trace_while_an_adapter_comes():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tridrop.swap(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
        config = peft.LoraConfig(r=4, target_modules=["linear1"])
        trained(peft.get_peft_model(model, config)).eval()
        adapted = model(x)
        torch.testing.assert_close(compiled(x), adapted)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), adapted)
        tridrop.unswap(model)
        assert not torch.allclose(model(x), adapted)  # torch's path loses it
