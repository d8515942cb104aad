"""A transformer block made of the fused ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import ACTIVATIONS
from .modules import ActivationDropout, DropoutAdd


class TransformerBlock(nn.Module):
    """A pre-norm transformer block, causal by default, as in GPT-2.

        x = x + drop_path(dropout(attention(norm1(x))))
        x = x + drop_path(dropout(fc2(dropout(activation(fc1(norm2(x)))))))

    The biases of ``proj``, ``fc1`` and ``fc2`` are added by the fused ops, not by the products. The
    attention is torch's scaled_dot_product_attention, with torch's own dropout of the scores: that
    mask comes from torch's generator and is not covered by :func:`tridrop.rng`.

    Args:
        dim: the width of the residual stream.
        num_heads: attention heads; divides dim.
        mlp_dim: the width of the feed-forward part, by default ``4 * dim``.
        p: drops elements of both branches' outputs.
        attention_p: drops attention probabilities. ``activation_p``: drops hidden units of the
            feed-forward part, after the activation.
        drop_path: drops whole branches of a sample.
        activation: as in :func:`tridrop.activation_dropout`, gated ones too.
        is_causal: whether a token sees only those before it.

    >>> import torch
    >>> block = TransformerBlock(16, 2, p=0.1)
    >>> block(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_dim: int | None = None,
        p: float = 0.1,
        attention_p: float = 0.0,
        activation_p: float = 0.0,
        drop_path: float = 0.0,
        activation: str = "gelu",
        is_causal: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide dim = {dim}")
        hidden = 4 * dim if mlp_dim is None else mlp_dim
        self.num_heads = num_heads
        self.attention_p = attention_p
        self.is_causal = is_causal
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop1 = DropoutAdd(p, drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_hidden = ActivationDropout(activation, activation_p)
        width = 2 * hidden if ACTIVATIONS[activation][1] else hidden  # a gated one halves it
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = DropoutAdd(p, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]"""
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.attention_p if self.training else 0.0,
            is_causal=self.is_causal,
        )
        attended = attended.transpose(1, 2).reshape(batch, tokens, dim)
        x = self.drop1(F.linear(attended, self.proj.weight), x, bias=self.proj.bias)
        hidden = F.linear(self.norm2(x), self.fc1.weight)
        hidden = self.drop_hidden(hidden, bias=self.fc1.bias)
        return self.drop2(F.linear(hidden, self.fc2.weight), x, bias=self.fc2.bias)
