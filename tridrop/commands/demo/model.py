"""A small GPT over bytes, with eager dropout or tridrop: same state_dict keys, same function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tridrop

from .options import Options

VOCABULARY = 256


class EagerBlock(nn.Module):
    """tridrop.nn.TransformerBlock, written in plain PyTorch."""

    def __init__(self, dim: int, heads: int, p: float, attention_p: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_p = attention_p
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]"""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.attention_p if self.training else 0.0,
            is_causal=True,
        )
        x = x + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """A pre-norm GPT with learnt positions, and a head tied to the token embedding.

    Args:
        options: the sizes and the drop rates.
        fused: whether dropout is tridrop.nn's; else torch.nn's. The state_dict keys are the same.
        drops: False sets every drop rate to 0.
    """

    def __init__(self, options: Options, *, fused: bool, drops: bool = True) -> None:
        super().__init__()
        p, attention_p = (options.p, options.attention_p) if drops else (0.0, 0.0)
        dim, heads = options.dim, options.heads
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(options.context, dim)
        self.dropout = tridrop.nn.Dropout(p) if fused else nn.Dropout(p)
        self.blocks = nn.ModuleList(
            tridrop.nn.TransformerBlock(
                dim, heads, p=p, attention_p=attention_p, remake=options.memory
            )
            if fused
            else EagerBlock(dim, heads, p, attention_p)
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes [batch, tokens] -> logits of the byte after each, [batch, tokens, 256]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def loss_of(model: nn.Module, examples: Tensor) -> Tensor:
    """The mean cross-entropy, in nats per byte, of inputs and targets [batch, 2, context]."""
    logits = model(examples[:, 0])
    return F.cross_entropy(logits.flatten(0, 1), examples[:, 1].flatten())


def _initialise(module: nn.Module) -> None:
    """Weights of variance 1 / inputs, from which a small model learns fastest; small embeddings.

    The head shares the embeddings: small ones make the first predictions nearly uniform.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
