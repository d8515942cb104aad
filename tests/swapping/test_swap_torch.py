"""tridrop.swap of torch's own transformer layers."""

import copy
import itertools
import re

import pytest
import swap_twin
import torch
from swap_twin import draw, equal, fill, hold
from torch import nn
from torch.nn import functional as F

import tridrop

N, T, S, E, H, W = 3, 4, 5, 8, 2, 12
BOTH = [True, False]
KINDS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}


def label(value: object) -> str:
    """The name of a test: no addresses, which differ between processes."""
    return re.sub(r" (of type object )?at 0x\w+", "", str(value))


kinds = pytest.mark.parametrize("kind", KINDS)
orders = pytest.mark.parametrize("norm_first", BOTH, ids=["pre", "post"])
warned = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors",
    "ignore:key_padding_mask and", "ignore:Support for mismatched",
)  # fmt: skip


def layer(kind: str, dropout: float = 0.3, cls: type | None = None, **given) -> nn.Module:
    made = (cls or KINDS[kind])(E, H, W, dropout, **{"batch_first": True, **given})
    fill(made)
    for i, drop in enumerate(m for m in made.modules() if isinstance(m, nn.Dropout)):
        drop.p = 0.125 + 0.125 * i if dropout else 0.0
    return made


def inputs(kind: str, batch_first: bool = True) -> list[torch.Tensor]:
    tensors = [draw(N, T, E, seed=1), draw(N, S, E, seed=2)][: 1 + (kind == "decoder")]
    return [t if batch_first else t.transpose(0, 1) for t in tensors]


CAUSAL = torch.ones(T, T).triu(1).bool()
PADDING = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
MASKS = {
    "encoder": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "decoder": {"tgt_mask": draw(T, T), "memory_key_padding_mask": draw(N, S)},
}
ONE = swap_twin.SWITCHES[:1]


@kinds
@orders
def test_layers_equal_eager_with_every_switch(kind, norm_first):
    report = hold(layer(kind, norm_first=norm_first), *inputs(kind), heads=H, **MASKS[kind])
    assert report.counts()["left"] == 0
    assert len(report.sites) == (4 if kind == "encoder" else 6)


@kinds
@orders
@pytest.mark.parametrize(
    "activation", ["gelu", torch.relu, nn.GELU("tanh"), nn.PReLU(), F.silu], ids=label
)
def test_layers_with_every_activation(kind, norm_first, activation):
    for bias, batch_first in itertools.product(BOTH, BOTH):
        given = {"bias": bias, "batch_first": batch_first, "norm_first": norm_first}
        model = layer(kind, activation=copy.deepcopy(activation), **given)
        hold(model, *inputs(kind, batch_first), heads=H, switches=ONE)


@orders
def test_what_a_layer_becomes(norm_first):
    """Activations and dropouts are one op each with what stands around them."""
    report = tridrop.swap(layer("encoder", norm_first=norm_first))
    parts = {site.code.partition("(")[0]: site.parts for site in report.sites}
    assert set(parts["self.dropout"]) >= {"linear", "activation", "dropout"}
    assert set(parts["self.dropout2"]) >= {"linear", "dropout"}
    assert parts["MultiheadAttention"] == ("softmax", "dropout", "matmul")


@kinds
@orders
@warned
@pytest.mark.parametrize("padded", BOTH)
def test_evaluation_takes_the_same_way(kind, norm_first, padded):
    """Without gradients in evaluation torch's encoder takes its inference path."""
    model = layer(kind, norm_first=norm_first)
    swapped = copy.deepcopy(model)
    tridrop.swap(swapped)
    given = {"encoder": "src_key_padding_mask", "decoder": "tgt_key_padding_mask"}
    masks = {given[kind]: PADDING} if padded else {}
    with torch.no_grad():
        expected = model.eval()(*inputs(kind), **masks)
        equal(swapped.eval()(*inputs(kind), **masks), expected)


@orders
@warned
def test_whole_encoder(norm_first):
    model = nn.TransformerEncoder(layer("encoder", norm_first=norm_first), 2, nn.LayerNorm(E))
    model = fill(model)
    padding = {"src_key_padding_mask": PADDING}
    causal = {"mask": CAUSAL, "is_causal": True}
    for given in ({}, causal):
        hold(model, *inputs("encoder"), heads=H, switches=ONE, **given)
    swapped = copy.deepcopy(model)
    report = tridrop.swap(swapped)
    assert len(report.sites) == 8
    for no_grad in BOTH:
        with torch.set_grad_enabled(not no_grad):
            found, expected = (m.eval()(*inputs("encoder"), **padding) for m in (swapped, model))
        equal(found, expected)


@warned
@pytest.mark.parametrize("batch_first", BOTH)
def test_whole_transformer(batch_first):
    given = {"batch_first": batch_first, "norm_first": batch_first, "activation": "gelu"}
    model = fill(nn.Transformer(E, H, 2, 2, W, 0.3, **given))
    tgt, src = inputs("decoder", batch_first)
    causal = torch.zeros(T, T).double().masked_fill(CAUSAL, float("-inf"))
    for masks in ({}, {"tgt_mask": causal, "tgt_is_causal": True}):
        report = hold(model, src, tgt, heads=H, switches=ONE, **masks)
    assert report.counts()["left"] == 0
    assert len(report.sites) == 2 * 4 + 2 * 6


class Weights(nn.Module):
    """Attention whose weights are wanted, or not."""

    def __init__(self, need_weights: bool, average: bool = True, **given) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, 0.3, batch_first=True, **given)
        self.given = {"need_weights": need_weights, "average_attn_weights": average}

    def forward(self, x, memory, **masks):
        out, weights = self.attention(x, memory, memory, **self.given, **masks)
        return out if weights is None else (out, weights)


@pytest.mark.parametrize("need_weights", BOTH)
@pytest.mark.parametrize("average", BOTH)
@pytest.mark.parametrize("given", [{}, {"bias": False}], ids=label)
def test_attention_alone(need_weights, average, given):
    model = fill(Weights(need_weights, average, **given))
    for masks in ({}, {"attn_mask": draw(T, S)}, {"key_padding_mask": draw(N, S)}):
        report = hold(model, *inputs("decoder"), heads=H, switches=ONE, **masks)
    (site,) = report.sites
    assert site.parts == ("softmax", "dropout", "matmul")
    report = hold(model, *inputs("decoder"), heads=H)


BLOCKS = [(kind, f"_{b}_block") for kind in KINDS for b in ("sa", "mha", "ff")]
BLOCKS.remove(("encoder", "_mha_block"))
OWN = {
    ("encoder", "_sa_block"): ["dropout1"], ("encoder", "_ff_block"): ["dropout", "dropout2"],
    ("decoder", "_sa_block"): ["dropout1"], ("decoder", "_mha_block"): ["dropout2"],
    ("decoder", "_ff_block"): ["dropout", "dropout3"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
@orders
def test_overridden_blocks_are_used(kind, block, norm_first):
    """A block of a subclass, which calls torch's: both are used, and reported."""
    base = KINDS[kind]

    class Doubled(base):
        pass

    def run(self, *args, **kwargs):
        return 2 * getattr(base, block)(self, *args, **kwargs)

    setattr(Doubled, block, run)
    model = layer(kind, cls=Doubled, norm_first=norm_first)
    report = hold(model, *inputs(kind), heads=H, switches=ONE, **MASKS[kind])
    assert report.counts()["left"] == 0
    # What torch's own block drops is tridrop's, one by one; the others' stays fused.
    alone = {site.module for site in report.sites if site.parts == ("dropout",)}
    assert alone == set(OWN[kind, block])
    assert all(site.stream is not None for site in report.sites)


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
@orders
def test_blocks_replaced_on_the_instance_are_used(kind, block, norm_first):
    """Before the swap, and after it."""
    for before in BOTH:
        model = layer(kind, norm_first=norm_first).train()
        swapped = copy.deepcopy(model)
        if not before:
            report = tridrop.swap(swapped)
        for m in (swapped, model):
            setattr(m, block, lambda x, *args, **kwargs: 3 * x)
        if before:
            report = tridrop.swap(swapped)
        with swap_twin.logged() as log:
            found = swap_twin.outcome(swapped, inputs(kind), **MASKS[kind])
        with swap_twin.replayed(log, report, model, H):
            equal(found, swap_twin.outcome(model, inputs(kind), **MASKS[kind]))


def test_an_overridden_forward_is_used():
    class Own(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask))
            return x - self._ff_block(self.norm2(x))

    report = hold(layer("encoder", cls=Own), *inputs("encoder"), heads=H)
    assert report.counts()["left"] == 0

    class Twice(nn.TransformerEncoderLayer):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    report = hold(layer("encoder", cls=Twice), *inputs("encoder"), heads=H, switches=ONE)
    assert report.counts()["left"] == 0
    assert {s.parts for s in report.sites if s.kind == "Dropout"} == {("dropout",)}


@kinds
@orders
def test_replaced_modules_and_hooks_are_used(kind, norm_first):
    """A part that was exchanged or is listened to, before the swap or after it."""
    changes = [
        lambda m: setattr(m, "norm2", nn.RMSNorm(E, dtype=torch.float64)),
        lambda m: setattr(m, "linear1", nn.Sequential(m.linear1, nn.Tanh())),
        lambda m: setattr(m, "dropout2", nn.Hardtanh()),
        lambda m: setattr(m, "activation", nn.Softplus()),
        lambda m: m.linear2.register_forward_hook(lambda _, __, out: 2 * out),
        lambda m: m.dropout1.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
        lambda m: m.norm1.register_forward_hook(lambda _, __, out: out + 1),
    ]
    for change, before in itertools.product(changes, BOTH):
        model = swap_twin.quiet(layer(kind, norm_first=norm_first))
        plain = swap_twin.outcome(model, inputs(kind))
        swapped = copy.deepcopy(model)
        if not before:
            tridrop.swap(swapped)
        for m in (swapped, model):
            change(m)
        if before:
            tridrop.swap(swapped)
        found, expected = (swap_twin.outcome(m, inputs(kind)) for m in (swapped, model))
        equal(found, expected)
        assert not torch.allclose(plain["out"][0], expected["out"][0])
