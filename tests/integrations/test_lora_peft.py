"""LoRA layers of PEFT after tridrop.swap: PEFT's own forward, fed with the exported masks."""

import contextlib
import copy
import importlib.util
import pickle
import sys
import types
import weakref
from unittest import mock

import pytest
import torch
from hosts import DEVICE, PLAIN
from swap_helpers import classes_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tridrop

peft = pytest.importorskip("peft")
from peft.tuners.lora import layer as peft_layer  # noqa: E402

SEED = 7
WIDTH, TOKENS = 24, (3, 5)
RATES = [0.0, 0.05, 0.5, 0.9]


class Attention(nn.Module):
    """Three projections of one x."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (16, 8, 8))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head(torch.cat((torch.tanh(q[..., :8] * k) * v, q[..., 8:]), -1))


def trained(model: nn.Module) -> nn.Module:
    """With adapters whose B, biases and magnitudes are those of no fresh model."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            with torch.no_grad():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def config(p: float = 0.1, **options) -> "peft.LoraConfig":
    given = {"r": 4, "lora_alpha": 10, "lora_dropout": p, "target_modules": ["q", "k", "v"]}
    return peft.LoraConfig(**(given | options))


def adapted(p: float = 0.1, **options) -> nn.Module:
    torch.manual_seed(0)
    return trained(peft.get_peft_model(Attention(), config(p, **options)))


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


class Exported(nn.Module):
    """In the place of an adapter's dropout: the mask that tridrop exports for it."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        cut = round(self.p * 2**32)
        gain = 2**32 / (2**32 - cut) if cut < 2**32 else 0.0
        return torch.where(tridrop.keep_mask(self.seed, x.shape, self.p), x * gain, 0.0)


def twin_of(model: nn.Module, report, seed: int = SEED) -> nn.Module:
    """A copy that PEFT computes, whose dropouts have the masks of the swapped model."""
    twin = copy.deepcopy(model)
    tridrop.unswap(twin)
    assert not any("tridrop" in kind.__module__ for kind in classes_of(twin))
    streams = {s.module: s.stream for s in report.sites}
    for layer_name, layer in twin.named_modules():
        for name, drop in getattr(layer, "lora_dropout", {}).items():
            if isinstance(drop, nn.Dropout):
                stream = streams[f"{layer_name}.lora_dropout.{name}"]
                layer.lora_dropout[name] = Exported(drop.p, tridrop.fold_in(seed, stream))
    return twin


def step(model: nn.Module, x: Tensor, **arguments) -> dict[str, Tensor]:
    """The result of a step, and the gradients of x and of all that is trained."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
    (out.float() * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_equal_steps(found, expected, tolerance=2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def assert_as_peft(model: nn.Module, x: Tensor, tolerance=2e-5, **arguments) -> None:
    """A swapped model does what PEFT does with its masks."""
    report = tridrop.swap(model)
    with tridrop.rng(SEED):
        found = step(model, x, **arguments)
    assert_equal_steps(found, step(twin_of(model, report), x, **arguments), tolerance)


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


# ----------------------------------------------------------------------- states of adapters


def two(p=(0.2, 0.2), ranks=(4, 2)) -> nn.Module:
    model = adapted(p[0], r=ranks[0])
    model.add_adapter("other", config(p[1], r=ranks[1], lora_alpha=3))
    model.base_model.set_adapter(["default", "other"])
    return trained(model)


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


# -------------------------------------------------------------------- memory, and running it


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
    assert {site.reason for site in off.sites} == {"its level is off"}
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
    assert (site.parts, site.reason) == (("dropout",), "the forward of Changed is not known")


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
