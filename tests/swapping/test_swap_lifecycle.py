"""What a swapped model goes through: hooks, copies, saving, checkpointing, compile, autocast."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

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

MODELS = ["BERT", "GPT-2", "DINOv2"]
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    torch._dynamo.reset()


def swapped(name: str) -> nn.Module:
    model = make(name)
    tridrop.swap(model)
    return model


def under_seed(model: nn.Module, inputs: dict, seed: int = 7):
    return swapped_outcome(model, inputs, seed)[0]


# ---------------------------------------------------------------------------------------- hooks


def hooked(model: nn.Module) -> dict[str, list]:
    """What hooks of every kind, on every module, see in the steps that follow."""
    seen: dict[str, list] = {"forward": [], "pre": [], "backward": [], "backward pre": []}

    def tensors(values):
        if isinstance(values, torch.Tensor):
            return [values.detach().clone()]
        if isinstance(values, (tuple, list)):
            return [t for value in values for t in tensors(value)]
        return []

    for name, module in model.named_modules():
        # Autograd's own hooks forbid outputs that are changed in place or are no tensors.
        if not any(module.children()) or type(module).__name__.endswith(("Layer", "Block", "MLP")):
            module.register_full_backward_hook(
                lambda _, given, got, name=name: seen["backward"].append((name, tensors(got)))
            )
            module.register_full_backward_pre_hook(
                lambda _, got, name=name: seen["backward pre"].append((name, tensors(got)))
            )
        module.register_forward_hook(
            lambda _, given, out, name=name: seen["forward"].append((name, tensors(out)))
        )
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen["pre"].append((name, tensors(given)))
        )
    return seen


@models
@pytest.mark.parametrize("before", [True, False], ids=["before the swap", "after the swap"])
def test_hooks_on_every_module_see_what_they_saw(name, before):
    """At p = 0, where the values are those of the original."""
    twin, inputs = make(name), batch(name)
    model = copy.deepcopy(twin)
    expected = hooked(twin)
    if before:
        found = hooked(model)
    tridrop.swap(model)
    if not before:
        found = hooked(model)
    for m in (model, twin):
        set_rates(m, 0.0)
    assert_same(outcome(model, inputs), outcome(twin, inputs))
    for kind, calls in expected.items():
        assert [name for name, _ in found[kind]] == [name for name, _ in calls], kind
        for (module, a), (_, b) in zip(found[kind], calls, strict=True):
            for x, y in zip(a[:1], b[:1], strict=True):  # eager attention returns its weights too
                torch.testing.assert_close(
                    x, y, rtol=1e-4, atol=1e-5, msg=lambda m, at=(kind, module): f"{at}: {m}"
                )


@models
def test_hooks_see_what_was_dropped(name):
    """Under a seed they hear the same dropped values as they would from eager modules."""
    model, inputs = make(name), batch(name)
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    seen, expected = hooked(model), hooked(twin)
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))
    for (module, a), (other, b) in zip(seen["forward"], expected["forward"], strict=True):
        assert module == other
        for x, y in zip(a[:1], b[:1], strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-4, atol=1e-5, msg=lambda m, at=module: f"{at}: {m}"
            )


def test_hook_on_a_block_hears_its_dropped_output():
    """And the same mask is drawn with and without a listener."""
    model, inputs = swapped("GPT-2"), batch("GPT-2")
    set_rates(model, 0.5)
    plain = under_seed(model, inputs)
    mlp = model.transformer.h[0].mlp
    heard = []
    handles = [
        m.register_forward_hook(lambda _, given, out: heard.append(out.detach()))
        for m in (mlp.dropout, mlp)
    ]
    assert_same(under_seed(model, inputs), plain)
    assert len(heard) == 2
    torch.testing.assert_close(*heard)
    assert 0.4 < float((heard[0] == 0).float().mean()) < 0.6
    for handle in handles:
        handle.remove()
    assert_same(under_seed(model, inputs), plain)
    assert len(heard) == 2


def test_hook_may_replace_an_output_and_a_global_hook_hears_every_module():
    model, inputs = swapped("BERT"), batch("BERT")
    before = under_seed(model, inputs)
    output = model.bert.encoder.layer[0].output
    handle = output.dropout.register_forward_hook(lambda _, given, out: 0 * out)
    assert float((under_seed(model, inputs).loss - before.loss).abs()) > 1e-6
    handle.remove()
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, given, out: heard.append(m))
    try:
        assert_same(under_seed(model, inputs), before)
    finally:
        handle.remove()
    assert {output.dense, output.dropout, output.LayerNorm, output} <= set(heard)


# --------------------------------------------------------------------------- copies and saving


@models
def test_modules_stay_what_they_are(name):
    model = make(name)
    kinds, state = classes_of(model), copy.deepcopy(model.state_dict())
    tridrop.swap(model)
    assert all(map(isinstance, model.modules(), kinds))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model.load_state_dict(state).missing_keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert repr(model) == repr(make(name))
    assert next(model.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    inputs = batch(name)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert model(**inputs).logits.dtype == torch.bfloat16


@models
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped_and_drop_the_same(name, how):
    model, inputs = swapped(name), batch(name)
    expected = under_seed(model, inputs)
    model.zero_grad()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert classes_of(other) == classes_of(model)
    assert_same(under_seed(other, inputs), expected)
    tridrop.unswap(other)
    assert classes_of(other) == classes_of(make(name))
    assert_same(under_seed(model, inputs), expected)


FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import torchvision_ops
import torch
torch.set_num_threads(1)
model, inputs, seed, loss = torch.load(sys.argv[2], weights_only=False)
import tridrop
with tridrop.rng(seed):
    found = model(**inputs).loss
torch.testing.assert_close(found, loss)
tridrop.unswap(model)
assert not any("_tridrop" in key for m in model.modules() for key in vars(m))
"""


def test_saved_models_drop_the_same_in_a_fresh_interpreter(tmp_path):
    """One process for all: starting it is what takes the time."""
    names, paths = ["BERT", "GPT-2"], []
    for name in names:
        model, inputs = swapped(name), batch(name)
        seed = tridrop.fold_in(3, 0)
        with tridrop.rng(seed):
            loss = model(**inputs).loss.detach()
        paths.append(str(tmp_path / name))
        torch.save((model, inputs, seed, loss), paths[-1])
    here = str(Path(__file__).parents[1])
    runs = [subprocess.Popen([sys.executable, "-c", FRESH, here, p], stderr=-1) for p in paths]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors.decode()[-2000:]


@models
def test_pretrained_weights_load_into_a_plain_model(name, tmp_path):
    model, inputs = swapped(name), batch(name)
    model.save_pretrained(tmp_path)
    plain = type(make(name)).from_pretrained(tmp_path, attn_implementation="eager")
    assert classes_of(plain) == classes_of(make(name))
    for (key, a), (_, b) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key
    torch.testing.assert_close(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    again = type(plain).from_pretrained(tmp_path)  # without a choice of its attention
    assert again.config._attn_implementation in ("sdpa", "eager")


@models
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_are_those_of_eager(name, training):
    """In training at p = 0."""
    twin, inputs = make(name).train(training), batch(name)
    model = copy.deepcopy(twin)
    tridrop.swap(model)
    for m in (model, twin):
        set_rates(m, 0.0)
    asked = {"output_hidden_states": True, "output_attentions": True}
    found, expected = (m(**inputs, **asked) for m in (model, twin))
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert len(found.attentions) == len(expected.attentions) == 2
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.attentions, expected.attentions, rtol=1e-5, atol=1e-5)


def test_asking_for_hidden_states_changes_no_mask():
    model, inputs = swapped("GPT-2"), batch("GPT-2")
    expected = under_seed(model, inputs)
    assert_same(under_seed(model, inputs | {"output_hidden_states": True}), expected)
    assert_same(under_seed(model, inputs | {"output_attentions": True}), expected)


def test_generate_is_that_of_the_original():
    model = make("GPT-2").eval()
    ids = batch("GPT-2")["input_ids"][:, :4]
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **given)
    tridrop.swap(model)
    assert torch.equal(model.generate(ids, **given), expected)


# -------------------------------------------------------------------------------- checkpointing


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, transformers.GradientCheckpointingLayer)]


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_recomputes_each_layer_with_its_masks(name, use_reentrant):
    model, inputs = swapped(name), batch(name)
    seed = tridrop.fold_in(7, 0)

    def step(explicit: bool):
        if not explicit:
            torch.manual_seed(5)
            return outcome(model, inputs)
        with tridrop.rng(seed):
            return outcome(model, inputs)

    expected = [step(True), step(False)]
    calls = []
    layers = layers_of(model)
    assert len(layers) == 2
    for i, layer in enumerate(layers):
        inner = layer.attention.self if name == "BERT" else layer.attn
        inner.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for explicit, wanted in zip((True, False), expected, strict=True):
        calls.clear()
        assert_same(step(explicit), wanted)
        assert calls == [0, 1, 1, 0]
    model.gradient_checkpointing_disable()
    assert_same(step(True), expected[0])


def test_checkpointed_before_the_swap_stays_so():
    model, inputs = make("BERT"), batch("BERT")
    model.gradient_checkpointing_enable()
    plain = make("BERT")
    for m in (model, plain):
        tridrop.swap(m)
    calls = []
    for layer in layers_of(model):
        layer.output.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(under_seed(model, inputs), under_seed(plain, inputs))
    assert len(calls) == 4


# -------------------------------------------------------------------------- compile and autocast


@models
def test_compiled_step_is_that_of_eager(name):
    model, inputs = swapped(name), batch(name)
    inputs.pop("labels")  # a warning in GPT-2's loss breaks its graph
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number in (7, 8):
        seed = tridrop.fold_in(number, 0)
        with tridrop.rng(seed):
            expected = outcome(model, inputs)
        with tridrop.rng(seed):
            found = outcome(compiled, inputs)
        found.gradients = {n.removeprefix("_orig_mod."): g for n, g in found.gradients.items()}
        assert_same(found, expected)


def test_compiled_before_the_swap_is_swapped():
    model, inputs = make("BERT"), batch("BERT")
    compiled = torch.compile(model, backend="aot_eager")
    report = tridrop.swap(compiled)
    assert report.counts()["fused"] == tridrop.swap(make("BERT")).counts()["fused"]
    with tridrop.rng(tridrop.fold_in(7, 0)):
        found = compiled(**inputs).loss
    torch.testing.assert_close(found, under_seed(model, inputs).loss)
    tridrop.unswap(compiled)
    assert classes_of(model) == classes_of(make("BERT"))


@models
def test_autocast_gives_the_dtypes_of_the_original(name):
    twin, inputs = make(name), batch(name)
    model = copy.deepcopy(twin)
    tridrop.swap(model)
    kinds = []
    for m in (model, twin):
        seen = []
        for module in m.modules():
            module.register_forward_hook(
                lambda mod, _, out, seen=seen: seen.append(
                    (type(mod).__name__, out.dtype if isinstance(out, torch.Tensor) else None)
                )
            )
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            out = m(**inputs)
        out.loss.backward()
        seen.append(("logits", out.logits.dtype))
        kinds.append(seen)
    assert kinds[0] == kinds[1]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@models
def test_autocast_with_masks_is_near_the_original(name):
    model, inputs = make(name), batch(name)
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, draws = swapped_outcome(model, inputs)
        expected = twin_outcome(twin, inputs, report, draws)
    assert_same(found, expected, tolerance=0.05)


# ------------------------------------------------------------------- models that change after it


@pytest.mark.parametrize("new", ["linear", "identity", "no bias", "sequence"])
def test_replaced_modules_are_called(new):
    model, inputs = make("BERT"), batch("BERT")
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    torch.manual_seed(9)
    for m in (model, twin):
        torch.manual_seed(9)
        m.bert.encoder.layer[0].attention.output.dense = {
            "linear": lambda: nn.Linear(32, 32),
            "identity": nn.Identity,
            "no bias": lambda: nn.Linear(32, 32, bias=False),
            "sequence": lambda: nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)),
        }[new]()
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))


@pytest.mark.parametrize("what", ["dropout", "LayerNorm"])
@pytest.mark.parametrize("new", [nn.Identity(), nn.Tanh()], ids=["identity", "tanh"])
def test_replaced_dropouts_and_norms_are_called(what, new):
    model, inputs = make("BERT"), batch("BERT")
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    for m in (model, twin):
        setattr(m.bert.encoder.layer[1].output, what, new)
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))


def test_forward_replaced_on_an_instance_is_called():
    model, inputs = make("GPT-2"), batch("GPT-2")
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    for m in (model, twin):
        block = m.transformer.h[0]
        block.mlp.forward = lambda x: x * 0.5
        block.ln_2.forward = torch.tanh
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))


@models
def test_a_new_p_is_honoured(name):
    model, inputs = make(name), batch(name)
    twin = copy.deepcopy(model)
    tridrop.swap(model)
    for m in (model, twin):
        set_rates(m, 0.6)
    report = tridrop.swap(copy.deepcopy(model), dry_run=True)
    found, draws = swapped_outcome(model, inputs)
    streams = tridrop.swap(copy.deepcopy(twin))
    assert [s.p for s in report.sites] == [s.p for s in streams.sites]
    assert_same(found, twin_outcome(twin, inputs, streams, draws))


@models
def test_swapping_twice_is_swapping_once(name):
    model, inputs = make(name), batch(name)
    first = tridrop.swap(model)
    kinds, expected = classes_of(model), under_seed(model, inputs)
    second = tridrop.swap(model)
    assert second.sites == first.sites
    assert classes_of(model) == kinds
    assert_same(under_seed(model, inputs), expected)
    tridrop.swap(model, across=False)  # another choice takes the place of the first
    assert_same(under_seed(model, inputs), expected)
    tridrop.unswap(model)
    tridrop.unswap(model)
    assert classes_of(model) == classes_of(make(name))


def test_a_part_of_a_model_can_be_swapped():
    model, inputs = make("BERT"), batch("BERT")
    twin = copy.deepcopy(model)
    layer = model.bert.encoder.layer[1]
    report = tridrop.swap(layer)
    assert report.counts()["fused"] >= 2
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))
    tridrop.unswap(layer)
    assert classes_of(model) == classes_of(twin)


def _layer_class():
    return type(make("BERT").bert.encoder.layer[0])


class Doubled(_layer_class()):
    """A user's layer that calls the library's forward."""

    def forward(self, hidden_states, *args, **kwargs):
        out = super().forward(hidden_states, *args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


class OwnChunk(_layer_class()):
    """A user's layer that overrides a method which the library's forward calls."""

    def feed_forward_chunk(self, attention_output):
        hidden = self.intermediate(attention_output)
        return torch.tanh(self.output(hidden, attention_output))


class Plain(_layer_class()):
    """A user's layer that adds nothing but a name."""


@pytest.mark.parametrize("kind", [Doubled, OwnChunk, Plain])
def test_subclasses_of_a_user_keep_their_forward(kind):
    model, inputs = make("BERT"), batch("BERT")
    for layer in model.bert.encoder.layer:
        layer.__class__ = kind
    twin = copy.deepcopy(model)
    report = tridrop.swap(model)
    assert all(isinstance(layer, kind) for layer in model.bert.encoder.layer)
    found, draws = swapped_outcome(model, inputs)
    assert_same(found, twin_outcome(twin, inputs, report, draws))
    other = pickle.loads(pickle.dumps(model))
    assert_same(under_seed(other, inputs), found)
    tridrop.unswap(model)
    assert type(model.bert.encoder.layer[0]) is kind


def test_swapped_models_are_freed():
    model = swapped("BERT")
    outcome(model, batch("BERT"))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
