"""tridrop.swap(model, memory=True): what a layer keeps for backward, and all that stays."""

import contextlib
import copy

import pytest
import torch
import transformers
from hosts import DEVICE
from swap_families import FAMILIES, batch, make
from swap_helpers import assert_same, outcome, set_rates, swapped_outcome, twin_outcome
from torch import Tensor, nn
from torch.nn import functional as F

import tridrop

WIDTH, TOKENS, HEADS, P = 256, 512, 4, 0.1


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def bert(layers):
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, vocab_size=100, hidden_dropout_prob=P,
        attention_probs_dropout_prob=P,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False), words()


def vit(layers):
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, hidden_dropout_prob=P, attention_probs_dropout_prob=P,
        image_size=(256, 512), patch_size=16, num_channels=1,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False), torch.randn(1, 1, 256, 512)


def gpt2(layers):
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=layers, n_head=HEADS, vocab_size=100, n_positions=TOKENS,
        resid_pdrop=P, embd_pdrop=P, attn_pdrop=P, use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2Model(config), words()


def llama(layers):
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=WIDTH * 11 // 4, vocab_size=100, attention_dropout=P, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config), words()


def torchs(norm_first, activation):
    def make(layers):
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, P, activation, batch_first=True, norm_first=norm_first
        )
        stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return stack, torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    return make


def own(norm_first):
    def make(layers):
        blocks = [
            tridrop.nn.TransformerBlock(
                WIDTH, HEADS, p=P, attention_p=P, activation_p=P, norm_first=norm_first,
                remake=True,
            )
            for _ in range(layers)
        ]  # fmt: skip
        return nn.Sequential(*blocks), torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    return make


def own_layer(norm_first):
    def make(layers):
        made = [
            tridrop.nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, P, "gelu", batch_first=True, norm_first=norm_first,
                remake=True,
            )
            for _ in range(layers)
        ]  # fmt: skip
        return nn.Sequential(*made), torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    return make


def words():
    return torch.randint(0, 100, (1, TOKENS))


# What a layer keeps, in units of [tokens, width]: with and without the switch, at most.
KEEPS = {
    "BERT": (bert, 10.1, 16.1),
    "ViT": (vit, 10.1, 16.1),
    "GPT-2": (gpt2, 10.1, 16.1),
    "Llama": (llama, 12.1, 21.1),
    "torch, post-norm, gelu": (torchs(False, "gelu"), 10.1, 16.1),
    "torch, pre-norm, relu": (torchs(True, "relu"), 10.1, 16.1),
    "TransformerBlock, pre-norm": (own(True), 10.1, None),
    "TransformerBlock, post-norm": (own(False), 10.1, None),
    "TransformerEncoderLayer, pre-norm": (own_layer(True), 10.1, None),
    "TransformerEncoderLayer, post-norm": (own_layer(False), 10.1, None),
}


def kept(model, x):
    """The bytes of all storages that a training forward keeps, parameters and buffers left out."""
    held: list[Tensor] = []

    def pack(t):
        held.append(t.detach())
        return held[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.train()(x)
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    for t in (*model.parameters(), *model.buffers()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    return sum(sizes.values()), out.numel() * 4


def a_layer(name, memory):
    found = []
    for layers in (2, 6):
        torch.manual_seed(0)
        model, x = KEEPS[name][0](layers)
        model.to(DEVICE)
        if KEEPS[name][2] is not None:
            tridrop.swap(model, memory=memory)
        size, unit = kept(model, x.to(DEVICE))
        found.append(size)
    return (found[1] - found[0]) / 4 / unit


@pytest.mark.parametrize("name", KEEPS)
def test_what_a_layer_keeps(name):
    with_switch, without = KEEPS[name][1:]
    assert a_layer(name, True) <= with_switch
    if without is not None:
        assert with_switch < a_layer(name, False) <= without


# ---------------------------------------------------------------------- losses and gradients

families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_training_without_dropping_is_that_of_the_original(name):
    model = make(name)
    twin, inputs = copy.deepcopy(model), batch(name)
    tridrop.swap(model, memory=True)
    for m in (model, twin):
        set_rates(m, 0.0)
    assert_same(outcome(model, inputs), outcome(twin, inputs))


@families
def test_masks_are_those_of_the_reported_places(name):
    """Loss and gradients are those of eager dropouts with the exported masks."""
    model = make(name)
    twin, inputs = copy.deepcopy(model), batch(name)
    report = tridrop.swap(model, memory=True)
    found, draws = swapped_outcome(model, inputs)
    assert draws
    assert_same(found, twin_outcome(twin, inputs, report, draws))


@families
def test_eval_is_that_of_the_original(name):
    model = make(name)
    twin, inputs = copy.deepcopy(model).eval(), batch(name)
    tridrop.swap(model, memory=True)
    with torch.no_grad():
        found, expected = (m(**inputs).to_tuple() for m in (model.eval(), twin))
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@families
def test_results_in_bfloat16_have_the_dtypes_of_the_original(name):
    twin = make(name).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(name).items()}
    model = copy.deepcopy(twin)
    tridrop.swap(model, memory=True)
    found, expected = (m(**inputs) for m in (model, twin))
    found[0].sum().backward()
    for a, b in zip(found.to_tuple(), expected.to_tuple(), strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype


FOUR = pytest.mark.parametrize("name", ["BERT", "ViT", "GPT-2", "Llama"])


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def close(found, expected):
    """To the rounding of bfloat16, of the whole gradient of each parameter."""
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)
    assert found.gradients.keys() == expected.gradients.keys()
    whole = max(g.norm() for g in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        assert error <= 0.03 * gradient.norm() + 1e-3 * whole, name


@FOUR
@pytest.mark.parametrize("p", [0.0, None])
def test_autocast(name, p):
    """Beside the original at p = 0, and beside its twin with the exported masks."""
    model = make(name)
    if p is not None:
        set_rates(model, p)
    twin, inputs = copy.deepcopy(model), batch(name)
    report = tridrop.swap(model, memory=True)
    with autocast():
        if p == 0:
            found, expected = outcome(model, inputs), outcome(twin, inputs)
        else:
            found, draws = swapped_outcome(model, inputs)
            expected = twin_outcome(twin, inputs, report, draws)
    close(found, expected)


# Streams in float32, two of them; query, key, value, attention's result and what the activation
# takes in bfloat16; the weights' copies, which autocast makes for all who call them, left out.
NARROW = {"BERT": 6.1, "ViT": 6.1, "GPT-2": 6.1, "Llama": 6.9}


@FOUR
def test_autocast_keeps_no_copies_either(name):
    found = []
    for layers in (2, 3):
        torch.manual_seed(0)
        model, x = KEEPS[name][0](layers)
        model.to(DEVICE)
        tridrop.swap(model, memory=True)
        with autocast():
            size, _ = kept(model, x.to(DEVICE))
        casts = sum(2 * p.numel() for n, p in model.named_parameters() if is_cast(n, p))
        found.append(size - casts)
    assert found[1] - found[0] <= NARROW[name] * 4 * WIDTH * TOKENS * (513 / 512)


def is_cast(name, parameter):
    return parameter.dim() == 2 and "emb" not in name and "wte" not in name and "wpe" not in name


@pytest.mark.parametrize("reentrant", [False, True])
@FOUR
def test_checkpointing_on_top(name, reentrant):
    model, inputs = make(name), batch(name)
    tridrop.swap(model, memory=True)
    model.enable_input_require_grads()
    outcomes = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for p in model.parameters():
            p.grad = None
        with tridrop.rng(5):
            loss = model(**inputs).loss
        with tridrop.rng(6) if again else contextlib.nullcontext():
            loss.backward()
        outcomes.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*outcomes)


# -------------------------------------------------------------------------------- its company


class Block(nn.Module):
    """A gated block, with whatever linear layers."""

    def __init__(self, linear=nn.Linear, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = linear(width, 32), linear(width, 32)
        self.down, self.act, self.drop = linear(32, width), nn.SiLU(), nn.Dropout(0.2)

    def forward(self, x):
        h = self.norm(x)
        gated = self.act(self.gate(h))
        return x + self.down(self.drop(gated * self.up(h)))


class Foreign(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return F.linear(x, self.weight.sign() * self.weight.abs(), self.bias)


class Quantised(nn.Module):
    """A layer with whole numbers for weights, and no class of torch's."""

    def __init__(self, width, out):
        super().__init__()
        self.in_features, self.out_features = width, out
        self.register_buffer("numbers", torch.randint(-8, 8, (out, width), dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return F.linear(x, self.numbers.to(x.dtype) / 8, self.bias)


@pytest.mark.parametrize("linear", [nn.Linear, Foreign, Quantised])
def test_layers_of_any_kind(linear):
    torch.manual_seed(0)
    model = Block(linear)
    plain = copy.deepcopy(model)
    tridrop.swap(plain)
    tridrop.swap(model, memory=True)
    x = torch.randn(2, 24, 16, requires_grad=True)
    outcomes = []
    for m in (model, plain):
        with tridrop.rng(2):
            out = m(x)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), (x, *m.parameters()))])
    torch.testing.assert_close(*outcomes)
    sizes = [kept(m, x)[0] for m in (model, plain)]
    if linear is Quantised:  # it keeps no input, nor does a frozen layer
        assert sizes[0] < sizes[1]
    else:
        assert sizes[0] < 0.75 * sizes[1]


def test_adapters():
    peft = pytest.importorskip("peft")
    model = make("Llama")
    config = peft.LoraConfig(
        r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = peft.get_peft_model(model, config)
    plain, inputs = copy.deepcopy(model), batch("Llama")
    tridrop.swap(plain)
    tridrop.swap(model, memory=True)
    outcomes, sizes = [], []
    for m in (model, plain):
        held = {}

        def pack(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with tridrop.rng(2), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = m(**inputs).loss
        loss.backward()
        outcomes.append([loss, *(p.grad for p in m.parameters() if p.grad is not None)])
        sizes.append(sum(s.nbytes() for s in held.values()))
    torch.testing.assert_close(*outcomes)
    assert sizes[0] < sizes[1]


def test_frozen_layers_keep_no_more():
    torch.manual_seed(0)
    model = Block()
    for p in model.parameters():
        p.requires_grad_(False)
    model.down.weight.requires_grad_(True)
    plain = copy.deepcopy(model)
    tridrop.swap(plain)
    tridrop.swap(model, memory=True)
    x = torch.randn(2, 24, 16)
    assert kept(model, x)[0] <= kept(plain, x)[0]


def test_hooks_on_a_part_see_what_they_always_saw():
    model, seen = Block(), []
    tridrop.swap(model, memory=True)
    model.norm.register_forward_hook(lambda *a: seen.append("norm"))
    model.gate.register_forward_hook(lambda *a: seen.append("gate"))
    model.act.register_forward_hook(lambda *a: seen.append("act"))
    model(torch.randn(2, 3, 16)).sum().backward()
    assert seen == ["norm", "gate", "act"]


def test_compiled_it_is_what_it_is_without():
    torch.manual_seed(0)
    model = Block()
    plain = copy.deepcopy(model)
    tridrop.swap(plain)
    tridrop.swap(model, memory=True)
    x = torch.randn(2, 24, 16, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outcomes = []
    for call, m in ((compiled, model), (plain, plain)):
        with tridrop.rng(2):
            out = call(x)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), (x, *m.parameters()))])
    torch.testing.assert_close(*outcomes)


def test_it_is_off_by_default_and_undone():
    model = Block()
    assert not tridrop.swap(model).levels.memory
    report = tridrop.swap(model, memory=True)
    assert report.levels.memory
    assert report.to_dict()["levels"]["memory"] is True
    tridrop.unswap(model)
    assert type(model) is Block
    with pytest.raises(TypeError, match="memory"):
        tridrop.swap(model, memory=1)
