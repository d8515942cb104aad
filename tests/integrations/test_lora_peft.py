"""LoRA layers of PEFT after tridrop.swap: PEFT's own forward, fed with the exported masks."""

import contextlib
import copy
import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch
from hosts import DEVICE, PLAIN
from lora_adapters import (
    RATES,
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
)
from torch import nn

import tridrop

# ------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_bias": True}, {"use_rslora": True, "r": 3}, {"use_dora": True}],
    ids=["plain", "bias", "rslora", "dora"],
)
def test_values_and_gradients_are_pefts_with_the_exported_masks(p, options):
    model = adapted(p, **options)
    before = step(copy.deepcopy(model).eval(), data())
    assert_as_peft(model, data())
    assert {"base_model.model.q.lora_A.default.weight", "x"} <= step(model, data()).keys()
    after = step(model.eval(), data())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_expected_value_is_that_of_pefts_eager():
    """The mean of a layer over 400 masks, ours and torch's, which are linear in the mask."""
    model, p, count = adapted(0.5, use_rslora=True), 0.5, 400
    ours, theirs = model.base_model.model.q, copy.deepcopy(model.base_model.model.q)
    tridrop.swap(model)
    x = data().double().flatten(0, 1)
    ours, theirs = ours.double(), theirs.double()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = theirs.eval()(x)
        means = []
        for layer in (ours, theirs.train()):
            draws = torch.stack([layer(x) for _ in range(count)])
            means.append(draws.mean(0))
            deviation = (means[-1] - expected) / (draws.std(0) / count**0.5)
            assert deviation.abs().max() < 6
            assert 0.5 < deviation.std() < 2
    # The spread itself: p / (1 - p) of each squared term of the sum.
    matrix = theirs.get_delta_weight("default").detach()
    variance = p / (1 - p) * (x.square() @ matrix.square().T)
    draws = torch.stack([ours(x) for _ in range(count)]).detach()
    assert 0.9 < float((draws.var(0) / variance).mean()) < 1.1


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_the_kernels_do_the_same(dora):
    model = adapted(0.3, use_dora=dora).to(DEVICE)
    tridrop.swap(model)
    found = []
    for backend in (PLAIN, "triton"):
        with tridrop.rng(SEED), tridrop.backend(backend):
            found.append(step(model, data().to(DEVICE)))
    assert_equal_steps(found[1], found[0])


def test_a_schedule_of_the_rate_takes_the_adapters():
    from tridrop.schedules import Linear

    model = adapted(0.4)
    report = tridrop.swap(model)
    schedule = tridrop.DropoutSchedule(model, Linear(0.4, 0.1, steps=3))
    for _ in range(3):
        schedule.step()
    twin = adapted(0.1)
    with tridrop.rng(SEED):
        found = step(model, data())
    tridrop.swap(twin)
    with tridrop.rng(SEED):
        assert_equal_steps(found, step(twin, data()))
    assert report.counts()["fused"] == 3


def test_without_dropout_the_bits_are_pefts():
    model = adapted(0.0)
    expected = step(model, data())
    report = tridrop.swap(model)
    assert report.counts()["fused"] == 0  # nothing drops
    found = step(model, data())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_variants_with_the_lines_of_plain_lora_are_fused():
    """aLoRA adapts the last tokens of each sequence, MiCA starts from another A and B."""
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(Attention(), config(0.3, init_lora_weights="mica")))
    assert {type(v).__name__ for v in model.base_model.model.q.lora_variant.values()} == {
        "MiCALinearVariant"
    }
    assert tridrop.swap(model).counts()["fused"] == 3
    assert_as_peft(model, data())
    torch.manual_seed(0)
    layer = peft.get_peft_model(Attention(), config(0.3, alora_invocation_tokens=[1]))
    layer = trained(layer).base_model.model.q
    model = nn.Sequential(layer)
    report = tridrop.swap(model)
    assert report.counts() == {"fused": 1, "swapped": 0, "left": 0}
    with tridrop.rng(SEED):
        found = layer(data(), alora_offsets=[2, None, 4])
    expected = twin_of(model, report)[0](data(), alora_offsets=[2, None, 4])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_adapters_in_another_dtype_than_x(p, dtype, dora):
    """PEFT keeps adapters of half-precision models in fp32, and casts x to it."""
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(Attention().to(dtype), config(p, use_dora=dora)))
    assert model.base_model.model.q.lora_A["default"].weight.dtype == torch.float32
    assert_as_peft(model, data(dtype), tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(base):
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(Attention().to(base), config(0.25)))
    report = tridrop.swap(model)
    twin = twin_of(model, report)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with tridrop.rng(SEED):
            found = step(model, data(base))
        expected = step(twin, data(base))
    assert_equal_steps(found, expected, 4e-2)


def test_input_casting_can_be_disabled():
    """Then PEFT's layers see x as it is, and raise where they cannot take it."""
    model = adapted().to(torch.float32)
    tridrop.swap(model)
    with peft.helpers.disable_input_dtype_casting(model):
        model(data())
        for name in "qkv":
            getattr(model.base_model.model, name).base_layer.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            model(data(torch.bfloat16))


# --------------------------------------------------------------------- quantised base layers

STUBS = {
    "bnb": ("bitsandbytes", ["Linear8bitLt", "Linear4bit"]),
    "hqq": ("hqq", ["HqqLoraLinear"]),
    "eetq": ("eetq", ["EetqLoraLinear"]),
    "gptq": (None, ["GPTQLoraLinear"]),
    "awq": (None, ["AwqLoraLinear"]),
    "aqlm": (None, ["AqlmLoraLinear"]),
    "te": (None, ["TeLinear"]),
}


def quantised(file: str, name: str) -> type:
    """PEFT's class for base layers of a package that need not be there: its text is what counts."""
    package = STUBS[file][0]
    where = importlib.util.find_spec(f"peft.tuners.lora.{file}")
    spec = importlib.util.spec_from_file_location(f"peft.tuners.lora.{file}", where.origin)
    module = importlib.util.module_from_spec(spec)
    stubs = {}
    if package is not None:
        for path in (package, f"{package}.core", f"{package}.core.quantize"):
            stubs[path] = types.ModuleType(path)
            stubs[path].EetqLinear = stubs[path].HQQLinear = nn.Linear
    names = [n for n in vars(peft.import_utils) if n.startswith(f"is_{file}")]
    with mock.patch.dict(sys.modules, stubs), contextlib.ExitStack() as stack:
        for n in names:
            found = mock.patch.object(peft.import_utils, n, return_value=package is not None)
            stack.enter_context(found)
        spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize(
    ("file", "name"), [(f, n) for f, (_, names) in STUBS.items() for n in names]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantised_variants_keep_their_own_forward_and_fuse_the_branch(file, name, dtype):
    torch.manual_seed(0)
    kind = quantised(file, name)
    if name == "TeLinear":
        layer = kind(nn.Linear(WIDTH, 8, dtype=dtype), "default", config(0.3), r=4, lora_alpha=10)
    else:
        base = nn.Linear(WIDTH, 8, dtype=dtype)
        layer = kind(base, "default", config=config(0.3), r=4, lora_alpha=10)
    layer.base_layer.requires_grad_(False)
    layer = trained(layer.float() if dtype == torch.float32 else layer)
    layer.base_layer.to(dtype)
    model = nn.Sequential(layer)
    report = tridrop.swap(model)
    (site,) = report.sites
    assert site.parts[:3] == ("dropout", "lora_A", "lora_B"), site
    assert site.module == "0.lora_dropout.default"
    assert type(layer).__name__ == name
    with tridrop.rng(SEED):
        found = step(model, data(dtype))
    expected = step(twin_of(model, report), data(dtype))
    assert_equal_steps(found, expected, 2e-5 if dtype == torch.float32 else 2e-2)


def test_subclasses_share_the_forward_of_their_class():
    class Mine(peft_layer.Linear):
        pass

    layer = trained(Mine(nn.Linear(WIDTH, 8), "default", config(0.3), r=4, lora_alpha=10))
    model = nn.Sequential(layer)
    assert tridrop.swap(model).counts() == {"fused": 1, "swapped": 0, "left": 0}
    assert isinstance(layer, Mine)
