"""tridrop.swap on models of transformers, beside their own eager forwards fed the same masks."""

import copy

import pytest
import torch
import transformers
from hosts import DEVICE
from swap_families import FAMILIES, batch, make
from swap_helpers import (
    assert_same,
    classes_of,
    numbers,
    outcome,
    set_rates,
    swapped_outcome,
    twin_outcome,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tridrop

families = pytest.mark.parametrize("name", FAMILIES)


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
    taken = numbers(draws)
    assert len(set(taken)) == len(taken), "two places have one mask"
    if len(taken) < len(draws):
        assert report.counts()["left"], "torch drops where the report says nothing of it"


@families
def test_what_transformers_records_is_that_of_the_original(name):
    """Hidden states and attentions, in training at p = 0."""
    model, inputs = make(name), batch(name)
    twin = copy.deepcopy(model)
    tridrop.swap(model)
    for m in (model, twin):
        set_rates(m, 0.0)
    for asked in ("output_hidden_states", "output_attentions"):
        found, expected = (m(**inputs, **{asked: True}) for m in (model, twin))
        assert list(found) == list(expected)
        for key, values in expected.items():
            if isinstance(values, (Tensor, tuple)):  # and no cache
                torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4)


@families
def test_dtypes_in_bfloat16_are_those_of_the_original(name):
    twin = make(name).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(name).items()}
    model = copy.deepcopy(twin)
    tridrop.swap(model)
    seen = []
    for m in (model, twin):
        seen.append(heard := [])
        for at, module in m.named_modules():
            module.register_forward_hook(
                lambda _, given, out, at=at, heard=heard: heard.append(
                    (at, out.dtype if isinstance(out, Tensor) else None)
                )
            )
        m(**inputs)[0].sum().backward()
    # The eager attention of transformers 5.0's GPT-2 calls its dropout, which an op takes in.
    taken_in = {at for at, _ in seen[1]} - {at for at, _ in seen[0]}
    assert all(at.endswith("attn.attn_dropout") for at in taken_in)
    assert seen[0] == [(at, dtype) for at, dtype in seen[1] if at not in taken_in]


@families
def test_default_generator_is_what_draws_without_a_seed(name):
    model, inputs = make(name), batch(name)
    twin = copy.deepcopy(model)
    tridrop.swap(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(outcome(model, inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    states = []
    for m in (model, twin):  # wav2vec2 of transformers 5.0 draws in evaluation, too
        torch.manual_seed(3)
        m.eval()(**inputs)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "DINOv2"])
def test_triton_kernels_drop_the_same(name):
    model, inputs = make(name).to(DEVICE), {k: t.to(DEVICE) for k, t in batch(name).items()}
    tridrop.swap(model)
    with tridrop.backend("reference"):
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
        # Without attention, a module that attention may call is a site of its own.
        known = streams.get((site.module, site.code, site.line), site.stream)
        assert site.stream in (None, known)
    if not {"dropout", "attention"} & levels.keys():
        assert_same(found, swapped_outcome(whole, inputs)[0])


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


class Operators(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu"])
def test_an_activation_that_is_written_out_is_one_op_in_training(name):
    """With a dropout in the method, but not next to the activation; a hook is still called."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=20, activation_function=name,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPT2Model(config).h[0].mlp
    eager, x = copy.deepcopy(model), torch.randn(2, 7, 32, requires_grad=True)
    for m in (model, eager):
        m.dropout.p = 0.0
    tridrop.swap(model)

    def outcome(m):
        called: list[str] = []
        with Operators(called):
            out = m(x)
        return called, out, *torch.autograd.grad(out.sum(), [x, *m.parameters()])

    ours, *found = outcome(model.train())
    theirs, *expected = outcome(eager.train())
    assert not any("pow" in op or "tanh" in op or "sigmoid" in op for op in ours)
    assert any("tanh" in op or "sigmoid" in op for op in theirs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.eval()(x), eager.eval()(x))
    seen = []
    model.train().act.register_forward_hook(lambda *_: seen.append(1))
    ours, *_ = outcome(model)
    assert any("tanh" in op or "sigmoid" in op for op in ours)
    assert seen == [1]
