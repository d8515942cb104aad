"""tridrop.swap of whole models of one's own: a GPT, sequences, shared modules, odd forwards."""

import functools
import linecache
import math

import pytest
import swap_forwards_laziness  # noqa: F401
import swap_twin
import torch
import torch.nn.functional as F
from swap_forwards import FORWARDS, E, H, N, Parts, T
from swap_twin import draw, fill, hold
from torch import nn

import tridrop


class NanoLayerNorm(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.bias = nn.Parameter(torch.zeros(E)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E, bias=bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.2), nn.Dropout(0.1)
        self.n_head, self.n_embd, self.dropout, self.flash = H, E, 0.2, flash
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None,
                dropout_p=self.dropout if self.training else 0, is_causal=True,
            )  # fmt: skip
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class NanoMLP(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(E, 4 * E, bias=bias), nn.Linear(4 * E, E, bias=bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.15)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x


class NanoBlock(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.ln_1, self.attn = NanoLayerNorm(bias), CausalSelfAttention(bias, flash)
        self.ln_2, self.mlp = NanoLayerNorm(bias), NanoMLP(bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(11, E),
                "wpe": nn.Embedding(T, E),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([NanoBlock(bias, flash) for _ in range(2)]),
                "ln_f": NanoLayerNorm(bias),
            }
        )
        self.lm_head = nn.Linear(E, 11, bias=False)

    def forward(self, idx, targets=None):
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_a_gpt_of_ones_own(bias, flash):
    words = torch.arange(N * T).view(N, T) % 11
    model = fill(NanoGPT(bias, flash))
    report = hold(model, words, targets=words.flip(1))
    assert report.counts()["left"] == 0
    parts = {site.code.partition("(")[0]: set(site.parts) for site in report.sites}
    assert parts["torch.nn.functional.scaled_dot_product_attention"] >= {"dropout", "matmul"}
    assert parts["self.attn_dropout"] == {"softmax", "dropout"}
    for name in ("self.resid_dropout", "self.dropout"):
        assert parts[name] > {"linear", "dropout"} if bias else {"dropout"}


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) + x


def feed_forward() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(E), nn.Linear(E, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, E),
        nn.Dropout(0.1),
    )  # fmt: skip


def test_sequences():
    """In the way of lucidrains' libraries; nested, indexed, shared and sliced."""
    hold(fill(feed_forward()), draw(N, T, E))
    hold(fill(Residual(feed_forward())), draw(N, T, E))
    report = hold(fill(nn.Sequential(Residual(feed_forward()), nn.LayerNorm(E))), draw(N, T, E))
    assert report.counts()["left"] == 0
    assert len(report.sites) == 2

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = feed_forward()

        def forward(self, x):
            y = self.net[:4](x)
            for layer in self.net[4:]:
                y = layer(y)
            return x + y + self.net(x)

    with pytest.warns(UserWarning, match="called twice"):
        hold(fill(Sliced()), draw(N, T, E), switches=swap_twin.SWITCHES[:1])


@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_shared_modules():
    class Shared(Parts):
        def __init__(self):
            super().__init__()
            self.drop2 = self.drop
            self.again = self.linear

        def forward(self, x):
            x = self.norm(x + self.drop(self.linear(x)))
            return self.norm(x + self.drop2(self.again(x)))

    block = fill(Shared())
    hold(block, draw(N, T, E))
    hold(nn.Sequential(block, block), draw(N, T, E))


FORWARD = """
def forward(self, x):
    return self.norm(x + self.drop(self.linear(x)))
"""


def test_a_forward_without_source():
    """From exec, from a string that is gone, and with the source of another function."""
    names: dict = {}
    exec(FORWARD, names)
    lost = type("Lost", (Parts,), {"forward": names["forward"]})
    report = hold(fill(lost()), draw(N, T, E))
    assert "source" in " ".join(site.reason for site in report.sites)

    text = FORWARD.replace("return", "y =") + "    return x - y\n"
    linecache.cache["<other>"] = (len(text), None, text.splitlines(True), "<other>")
    exec(compile(FORWARD, "<other>", "exec"), names)
    other = type("Other", (Parts,), {"forward": names["forward"]})
    report = hold(fill(other()), draw(N, T, E))
    assert "source" in " ".join(site.reason for site in report.sites)


def test_a_forward_on_the_instance():
    model = fill(FORWARDS["SumUsedTwice"]())
    model.forward = functools.partial(lambda self, x: x + self.drop(self.linear(x)), model)
    tridrop.swap(model)
    with swap_twin.logged() as log:
        out = model(draw(N, T, E))
    (event,) = log
    keep = tridrop.keep_mask(event.seed(), out.shape, model.drop.p)
    branch = torch.where(keep, model.linear(draw(N, T, E)) / (1 - model.drop.p), 0)
    torch.testing.assert_close(out, draw(N, T, E) + branch)


def test_p_of_one_and_of_a_schedule():
    """The rate is read at each call."""
    model = fill(FORWARDS["SumUsedTwice"]())
    ours = swap_twin.clone(model)
    report = tridrop.swap(ours)
    for p in (1.0, 0.0, 0.7):
        model.drop.p = ours.drop.p = p
        with swap_twin.logged() as log:
            found = swap_twin.outcome(ours, (draw(N, T, E),))
        with swap_twin.replayed(log, report, model):
            swap_twin.equal(found, swap_twin.outcome(model, (draw(N, T, E),)))
