"""tridrop.nn.TransformerEncoderLayer and TransformerDecoderLayer against torch's."""

import copy
import itertools
import math
import pickle
import re
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tridrop

N, T, S, E, H, W = 3, 4, 5, 8, 2, 12
DOUBLE = torch.float64
BOTH = [True, False]
KINDS = {
    "encoder": (nn.TransformerEncoderLayer, tridrop.nn.TransformerEncoderLayer),
    "decoder": (nn.TransformerDecoderLayer, tridrop.nn.TransformerDecoderLayer),
}


def label(value: object) -> str:
    """The name of a test: no addresses, which differ between processes."""
    return re.sub(r" (of type object )?at 0x\w+", "", str(value))


kinds = pytest.mark.parametrize("kind", KINDS)
orders = pytest.mark.parametrize("norm_first", BOTH, ids=["pre", "post"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 100 * seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def fill(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():  # biases begin as zeros, which would hide them
            parameter.copy_(0.4 * draw(*parameter.shape, seed=parameter.dim()))
    return layer


def pair(kind: str, dropout: float = 0.0, **arguments):
    """(torch's layer, tridrop's), with the same parameters."""
    arguments = {"batch_first": True, "dtype": DOUBLE, **arguments}
    theirs, ours = (c(E, H, W, dropout, **copy.deepcopy(arguments)) for c in KINDS[kind])
    ours.load_state_dict(fill(theirs).state_dict())
    return theirs, ours


def inputs(kind: str, batch_first: bool = True) -> list[Tensor]:
    tensors = [draw(N, T, E, seed=1), draw(N, S, E, seed=2)][: 1 + (kind == "decoder")]
    return [t if batch_first else t.transpose(0, 1) for t in tensors]


def outcome(layer: nn.Module, tensors: list[Tensor], **arguments) -> dict[str, Tensor]:
    """The result, and gradients of the inputs and the parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = layer(*leaves, **arguments)
    targets = {f"input {i}": t for i, t in enumerate(leaves)} | dict(layer.named_parameters())
    loss = (out * draw(*out.shape, seed=7).to(out.device)).sum()
    gradients = torch.autograd.grad(loss, [*targets.values()])
    return {"out": out, **dict(zip(targets, gradients, strict=True))}


CAUSAL = torch.ones(T, T).triu(1).bool()
PADDING = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
ACROSS = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]).bool()
MASKS = {
    "encoder": [
        {},
        {"src_key_padding_mask": PADDING},
        {"src_mask": CAUSAL, "is_causal": True},
        {"src_mask": draw(N * H, T, T, seed=3), "src_key_padding_mask": draw(N, T)},
    ],
    "decoder": [
        {},
        {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": ACROSS},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_mask": draw(T, S)},
        {"memory_mask": torch.ones(T, S).triu(1).bool(), "memory_is_causal": True},
    ],
}


GIVEN = [{}, {"bias": False}, {"activation": "gelu"}, {"activation": nn.PReLU()}, {"dtype": DOUBLE}]


@kinds
@pytest.mark.parametrize("arguments", GIVEN, ids=label)
def test_parameters_and_state_dict_are_those_of_torch(kind, arguments):
    given = {"layer_norm_eps": 1e-3, "device": "cpu", "norm_first": True, **arguments}
    made = []
    for cls in KINDS[kind]:
        torch.manual_seed(5)
        made += [cls(E, H, W, 0.2, **copy.deepcopy(given)), torch.get_rng_state()]
    theirs, expected, ours, state = made
    assert torch.equal(state, expected)
    assert isinstance(ours, type(theirs))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    theirs.load_state_dict(fill(ours).state_dict())
    assert {n for n, _ in theirs.named_modules()} == {n for n, _ in ours.named_modules()}
    for name in ("norm_first", "activation_relu_or_gelu", "training"):
        assert getattr(theirs, name, None) == getattr(ours, name, None)


@kinds
@orders
@pytest.mark.parametrize("activation", ["relu", nn.GELU("tanh"), F.silu], ids=label)
@pytest.mark.parametrize("batch_first", BOTH)
@pytest.mark.filterwarnings("ignore:key_padding_mask and", "ignore:Support for mismatched")
def test_equals_torch_with_every_mask(kind, norm_first, activation, batch_first):
    """In training at p = 0, and in eval; values and gradients."""
    given = {"norm_first": norm_first, "batch_first": batch_first, "activation": activation}
    given["layer_norm_eps"] = 0.1
    for bias, dropout in itertools.product(BOTH, (0.0, 0.5)):
        theirs, ours = (m.train(not dropout) for m in pair(kind, dropout, bias=bias, **given))
        tensors = inputs(kind, batch_first)
        for masks in MASKS[kind] if bias else MASKS[kind][:1]:
            found, expected = (outcome(m, tensors, **masks) for m in (ours, theirs))
            torch.testing.assert_close(found, expected)
    single = [t[0] if batch_first else t[:, 0] for t in tensors]
    torch.testing.assert_close(outcome(ours, single), outcome(theirs, single))


@kinds
@orders
@pytest.mark.parametrize("training", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torch(kind, norm_first, training, dtype):
    """Eval without gradients is torch's inference path, for the encoder."""
    given = {"norm_first": norm_first, "activation": "gelu"}
    exact, ours = (m.train(training) for m in pair(kind, 0.5 * (not training), **given))
    exact.load_state_dict(ours.to(dtype).state_dict())
    theirs = copy.deepcopy(exact).to(dtype)
    tensors = [t.to(dtype) for t in inputs(kind)]
    run = outcome if training else torch.no_grad()(lambda m, given: {"out": m(*given)})
    results = [run(m, tensors) for m in (ours, theirs)]
    expected = run(exact, [t.double() for t in tensors])
    for name, value in expected.items():
        own, other = (float((r[name] - value).detach().norm()) for r in results)
        assert results[0][name].dtype == dtype
        assert own <= 2 * other + torch.finfo(dtype).eps * float(value.detach().norm()), name


@orders
@pytest.mark.parametrize("no_grad", BOTH)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inside_torch_encoder(norm_first, no_grad):
    """Without gradients in eval, torch's encoder makes a nested tensor of a padded one."""
    layers = pair("encoder", 0.3, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if norm_first else "error")
        theirs, ours = (nn.TransformerEncoder(m, 2, nn.LayerNorm(E, dtype=DOUBLE)) for m in layers)
    assert ours.use_nested_tensor == theirs.use_nested_tensor == (not norm_first)
    (x,) = inputs("encoder")
    padded = [{"src_key_padding_mask": mask} for mask in (PADDING, PADDING.flip(1))]
    for given in ({}, {"mask": CAUSAL}, *padded, {"mask": CAUSAL, **padded[0]}):
        with torch.set_grad_enabled(not no_grad):
            torch.testing.assert_close(*(m.eval()(x, **given) for m in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    _, ours = pair("encoder")
    samples = [draw(n, E) for n in (3, 1, 4)]
    nested = torch.nested.nested_tensor(samples, layout=layout)
    out = ours(nested)
    assert out.layout == layout
    torch.testing.assert_close(list(out.unbind()), [ours(sample) for sample in samples])
    with pytest.raises(ValueError, match="takes no src_mask"):
        ours(nested, src_key_padding_mask=PADDING)
    with pytest.raises(ValueError, match="batch_first"):
        pair("encoder", batch_first=False)[1](nested)
    with pytest.raises(TypeError, match="a nested tensor, which this layer does not take"):
        pair("decoder")[1](nested, nested)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_inside_torch_transformer():
    found = []
    for which in (0, 1):
        encoder, decoder = (pair(kind, batch_first=False)[which] for kind in KINDS)
        encoder, decoder = nn.TransformerEncoder(encoder, 2), nn.TransformerDecoder(decoder, 2)
        model = nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
        tgt, src = inputs("decoder", batch_first=False)
        given = {"src_key_padding_mask": ACROSS, "memory_key_padding_mask": ACROSS}
        found.append(outcome(fill(model), [src, tgt], tgt_mask=CAUSAL, **given))
    torch.testing.assert_close(*found)


SEED = 11


class Masked(nn.Dropout):
    """Eager dropout by the exported mask of a site."""

    def forward(self, x: Tensor) -> Tensor:
        (of,) = self.of
        p = of.p if of.training else 0.0
        keep = tridrop.keep_mask(tridrop.fold_in(SEED, of.site), x.shape, p)
        return torch.where(keep, x / (1 - p), 0)


class MaskedAttention(nn.MultiheadAttention):
    """Eager attention by the exported mask of a site; batch first."""

    def forward(self, q, k, v, key_padding_mask=None, attn_mask=None, **_):
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))  # noqa: B905
        q, k, v = ((x @ w.T + b).unflatten(-1, (H, -1)).transpose(1, 2) for x, w, b in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(E // H)
        scores = scores + (0 if key_padding_mask is None else key_padding_mask[:, None, None, :])
        scores = scores + (0 if attn_mask is None else attn_mask)
        (of,) = self.of
        p = of.dropout if of.training else 0.0
        keep = tridrop.attention_keep_mask(tridrop.fold_in(SEED, of.site), scores.shape, p)
        weights = torch.where(keep, scores.softmax(-1) / (1 - p), 0)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def numbered(kind: str, **arguments):
    """(torch's layer with the masks of ours, ours), each dropout with a rate of its own."""
    theirs, ours = pair(kind, 0.25, **arguments)
    tridrop.nn.number_sites(ours, first=3)
    for name, child in list(theirs.named_children()):
        own = getattr(ours, name)
        if hasattr(own, "site"):
            child.__class__ = Masked if isinstance(child, nn.Dropout) else MaskedAttention
            child.of = [own]  # not a child
    for rate, drop in enumerate(m for m in ours.modules() if isinstance(m, tridrop.nn.Dropout)):
        drop.p = 0.125 + 0.125 * rate
    return theirs, ours


FLOAT_MASKS = {
    "encoder": {"src_key_padding_mask": draw(N, T), "src_mask": draw(T, T)},
    "decoder": {"tgt_mask": draw(T, T), "memory_key_padding_mask": draw(N, S)},
}


@kinds
@orders
@pytest.mark.parametrize("activation", ["relu", torch.relu, nn.GELU(), F.silu], ids=label)
def test_dropout_equals_eager_with_the_exported_masks(kind, norm_first, activation, monkeypatch):
    twin, ours = numbered(kind, norm_first=norm_first, activation=activation)
    if activation is not F.silu:  # everything is fused
        monkeypatch.setattr(tridrop.nn.Dropout, "forward", None)
    state = torch.get_rng_state()
    for module in (nn.Identity(), *ours.children()):
        module.eval()  # one part after the other
        with tridrop.rng(SEED):
            found = outcome(ours, inputs(kind), **FLOAT_MASKS[kind])
        torch.testing.assert_close(found, outcome(twin, inputs(kind), **FLOAT_MASKS[kind]))
    assert torch.equal(torch.get_rng_state(), state), "rng covers every draw"


@kinds
@orders
def test_sites_are_in_the_order_of_use(kind, norm_first, monkeypatch):
    _, ours = numbered(kind, norm_first=norm_first)
    called = []

    def seed(self, x):
        called.append(self.site)
        return tridrop.fold_in(SEED, self.site)

    monkeypatch.setattr(tridrop.nn.modules._Site, "_seed", seed)
    ours(*inputs(kind))
    assert called == list(range(3, 7 if kind == "encoder" else 9))


BLOCKS = [(kind, f"_{b}_block") for kind in KINDS for b in ("sa", "mha", "ff")]
BLOCKS.remove(("encoder", "_mha_block"))


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
@orders
def test_overridden_blocks_are_used(kind, block, norm_first):
    """In training with every dropout, and in evaluation without gradients."""

    def scaled(self, *args, **kwargs):
        assert kind == "decoder" or all(mask is None or mask.is_floating_point() for mask in args)
        return 2 * getattr(super(type(self), self), block)(*args, **kwargs)

    (_, plain), (theirs, ours) = (numbered(kind, norm_first=norm_first) for _ in BOTH)
    for layer in (theirs, ours):
        layer.__class__ = type("Scaled", (type(layer),), {block: scaled})
    with tridrop.rng(SEED):
        found = outcome(ours, inputs(kind), **FLOAT_MASKS[kind])
    torch.testing.assert_close(found, outcome(theirs, inputs(kind), **FLOAT_MASKS[kind]))
    tensors, masks = inputs(kind), MASKS[kind][1]
    with torch.no_grad():
        expected = ours.eval()(*tensors, **masks)
        assert not torch.allclose(plain.eval()(*tensors, **masks), expected)
        setattr(plain, block, getattr(ours, block))  # of one object
        torch.testing.assert_close(plain(*tensors, **masks), expected)


@kinds
@orders
def test_replaced_modules_and_hooks_are_used(kind, norm_first):
    changes = [
        lambda m: setattr(m, "norm2", nn.RMSNorm(E, dtype=DOUBLE)),
        lambda m: setattr(m, "linear1", nn.Sequential(m.linear1, nn.Tanh())),
        lambda m: setattr(m, "dropout2", nn.Hardtanh()),
        lambda m: setattr(m, "activation", nn.Softplus()),
        lambda m: m.linear2.register_forward_hook(lambda _, __, out: 2 * out),
        lambda m: m.dropout1.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
    ]
    for change in changes:
        layers = pair(kind, norm_first=norm_first)
        plain = outcome(layers[0], inputs(kind))["out"]
        for layer in layers:
            change(layer)
        expected, found = (outcome(m, inputs(kind)) for m in layers)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(plain, expected["out"])


@kinds
def test_copies_and_pickles(kind):
    _, ours = numbered(kind, activation="gelu")
    with tridrop.rng(SEED):
        expected = ours(*inputs(kind))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with tridrop.rng(SEED):
            assert torch.equal(twin(*inputs(kind)), expected)


@kinds
@orders
def test_compiled_equals_eager(kind, norm_first):
    torch._dynamo.reset()
    _, ours = numbered(kind, norm_first=norm_first)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    found = []
    for layer in (compiled, ours):
        torch.manual_seed(4)
        found.append(list(outcome(layer, inputs(kind), **MASKS[kind][2]).values()))
    torch.testing.assert_close(*found)


@kinds
@orders
def test_autocast(kind, norm_first):
    theirs, ours = (m.float() for m in pair(kind, norm_first=norm_first))
    tensors = [t.float() for t in inputs(kind)]
    exact = theirs(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(*tensors) for m in (ours, theirs))
    assert found.dtype == expected.dtype == torch.float32
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


@kinds
@pytest.mark.parametrize("use_reentrant", BOTH)
@pytest.mark.parametrize("seed", [None, SEED])
def test_checkpointed_gradients_are_the_same(kind, use_reentrant, seed):
    _, ours = numbered(kind, norm_first=use_reentrant)
    found = []
    for recomputed in BOTH:
        torch.manual_seed(6)
        ours.zero_grad()
        leaves = [t.clone().requires_grad_() for t in inputs(kind)]
        layer = partial(checkpoint, ours, use_reentrant=use_reentrant) if recomputed else ours
        with nullcontext() if seed is None else tridrop.rng(seed):
            layer(*leaves).square().sum().backward()
        found.append([t.grad.clone() for t in (*leaves, *ours.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@kinds
def test_the_same_on_both_backends(kind):
    pytest.importorskip("triton")
    ours = numbered(kind, norm_first=kind == "decoder", activation="gelu")[1].float().to(DEVICE)
    tensors, found = [t.float().to(DEVICE) for t in inputs(kind)], []
    for backend in (PLAIN, "triton"):
        with tridrop.backend(backend), tridrop.rng(SEED):
            found.append(outcome(ours, tensors))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@kinds
def test_bad_input_raises(kind):
    theirs, ours = KINDS[kind]
    for made in (theirs, ours):
        with pytest.raises(RuntimeError, match="activation"):
            made(E, H, activation="tanh")
        with pytest.raises(AssertionError):
            made(E, 3)
    with pytest.raises(ValueError, match=r"dropout = 1\.5"):
        ours(E, H, dropout=1.5)
    with pytest.raises(TypeError, match="activation = 3"):
        ours(E, H, activation=3)
    hint = {"is_causal": True} if kind == "encoder" else {"tgt_is_causal": True}
    for given in (hint, {next(iter(FLOAT_MASKS[kind])): torch.ones(N, T).long()}):
        for layer in pair(kind):
            with pytest.raises((RuntimeError, AssertionError)):
                layer(*inputs(kind), **given)
