"""The attention of tridrop.nn.TransformerBlock: its site, its mask, its recomputation."""

import math

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tridrop

N, L, E, H = 3, 5, 12, 2


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, L, E, generator=generator, dtype=torch.float64)


def numbered_block(**rates: float) -> tridrop.nn.TransformerBlock:
    torch.manual_seed(0)
    block = tridrop.nn.TransformerBlock(E, H, p=0.0, **rates).double()
    tridrop.nn.number_sites(block, first=10)
    return block


def test_block_attention_is_a_site_behind_the_others():
    block = numbered_block()
    sites = [block.norm2.site, block.drop_hidden.site, block.drop2.site, block.attention.site]
    assert sites == [10, 11, 12, 13]
    assert not [name for name in block.state_dict() if "attention" in name]


@pytest.mark.parametrize("is_causal", [True, False])
def test_block_drops_attention_by_the_exported_mask(is_causal):
    """The block is norm, attention and a feed-forward part; the last is the same in both."""
    block = numbered_block(attention_p=0.4, is_causal=is_causal)
    x = draw().requires_grad_()
    keep = tridrop.attention_keep_mask(tridrop.fold_in(5, 13), (N, H, L, L), 0.4)

    def twin(x):
        qkv = block.qkv(block.norm1(x)).unflatten(-1, (3, H, E // H))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        scores = q @ k.transpose(-1, -2) / math.sqrt(E // H)
        if is_causal:
            scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf)
        weights = torch.where(keep, scores.softmax(-1) / 0.6, 0)
        x = x + block.proj((weights @ v).transpose(1, 2).flatten(2))
        normed = nn.functional.layer_norm(x, (E,), block.norm2.weight, block.norm2.bias)
        return x + block.fc2(nn.functional.gelu(block.fc1(normed)))

    def run(function):
        with tridrop.rng(5):
            out = function(x)
        return out, torch.autograd.grad(out.square().sum(), (x, *block.parameters()))

    state = torch.get_rng_state()
    torch.testing.assert_close(run(block), run(twin))
    assert torch.equal(torch.get_rng_state(), state), "rng covers every draw"
    torch.testing.assert_close(block.eval()(x), block(x), rtol=0, atol=0)


def test_block_recomputes_its_attention():
    block = numbered_block(attention_p=0.4)
    x = draw().requires_grad_()

    def gradient(recomputed):
        with tridrop.rng(5):
            given = {"use_reentrant": False, "preserve_rng_state": False}
            out = checkpoint(block, x, **given) if recomputed else block(x)
            return torch.autograd.grad(out.square().sum(), x)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_block_is_the_same_on_both_backends():
    pytest.importorskip("triton")
    block = numbered_block(attention_p=0.4).float().to(DEVICE)
    found = []
    for backend in (PLAIN, "triton"):
        x = draw().float().to(DEVICE).requires_grad_()
        with tridrop.backend(backend), tridrop.rng(5):
            out = block(x)
            found.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_runs_on_both_backends(need_weights):
    """With padding, a causal mask and dropout: the same result, weights and gradients."""
    torch.manual_seed(0)
    layer = tridrop.nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True).to(DEVICE)
    x = torch.randn(2, 9, 16).to(DEVICE)
    padding = (torch.arange(9)[None] >= torch.tensor([[9], [6]])).to(DEVICE)
    causal = nn.Transformer.generate_square_subsequent_mask(9).isinf().to(DEVICE)
    found = []
    for backend in (PLAIN, "triton"):
        layer.zero_grad()
        with tridrop.backend(backend), tridrop.rng(5):
            out, weights = layer(
                x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights
            )
        out.square().sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        found.append([out.detach(), *gradients, *([weights] if need_weights else [])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
