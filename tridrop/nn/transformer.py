"""A transformer block made of the fused ops."""

from __future__ import annotations

from torch import Tensor, nn

from ..base.arguments import check_flags, check_tensor, check_whole
from ..functional.linear import linear, of_remade
from ..spec.elementwise import ACTIVATIONS, check_activation
from .attention import ScaledDotProductAttention
from .branches import normalised
from .modules import ActivationDropout, DropoutAdd
from .norm import DropoutAddLayerNorm


class TransformerBlock(nn.Module):
    """A transformer block, causal and pre-norm by default, as in GPT-2.

        x = x + drop_path(dropout(attention(norm1(x))))
        x = x + drop_path(dropout(fc2(dropout(activation(fc1(norm2(x)))))))

    or, with ``norm_first=False``, post-norm as in BERT:

        x = norm1(x + drop_path(dropout(attention(x))))
        x = norm2(x + drop_path(dropout(fc2(dropout(activation(fc1(x)))))))

    Dropout, residual and the norm that follows are one op, which also adds the bias of ``proj`` or
    ``fc2``; the bias of ``fc1`` is added in the op of the activation. The attention is
    :func:`tridrop.scaled_dot_product_attention`: it holds neither scores nor a mask, and
    :func:`tridrop.rng` and :func:`number_sites` cover its dropout like the others.

    Args:
        dim: the width of the residual stream.
        num_heads: the number of attention heads, which divides dim.
        mlp_dim: the width of the feed-forward part, by default ``4 * dim``.
        p: the rate for elements of both branches' outputs.
        attention_p: the rate for attention probabilities.
        activation_p: the rate for hidden units of the feed-forward part, after the activation.
        drop_path: the rate for whole branches of a sample.
        activation: as in :func:`tridrop.activation_dropout`, including gated ones.
        norm_first: whether the norms go before the branches or after the additions.
        is_causal: whether a token sees only itself and those before it.
        remake: keep no input of a linear layer that is a norm's result or a dropped activation;
            backward makes it again, see :func:`tridrop.norm_linear` and
            :func:`tridrop.activation_dropout_linear`. Values and gradients stay the same. (With
            ``norm_first`` this includes the norm at the beginning of the block. In a post-norm
            block the input comes from the block before, and is made again if that block has
            ``remake`` too.)

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
        norm_first: bool = True,
        is_causal: bool = True,
        remake: bool = False,
    ) -> None:
        super().__init__()
        dim, num_heads = check_whole(dim, "dim", 1), check_whole(num_heads, "num_heads", 1)
        if dim % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide dim = {dim}")
        hidden = 4 * dim if mlp_dim is None else check_whole(mlp_dim, "mlp_dim", 1)
        check_flags(norm_first=norm_first, is_causal=is_causal, remake=remake)
        self.num_heads = num_heads
        self.norm_first = norm_first
        self.remake = remake
        self.norm1: nn.LayerNorm | DropoutAddLayerNorm
        if norm_first:
            self.norm1 = nn.LayerNorm(dim)
        else:
            self.norm1 = DropoutAddLayerNorm(dim, p, drop_path=drop_path, remake=remake)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # pre-norm: the end of the first branch and the norm before the second
        self.norm2 = DropoutAddLayerNorm(
            dim, p, drop_path=drop_path, prenorm=norm_first, remake=remake
        )
        self.drop_hidden = ActivationDropout(activation, activation_p, remake=remake)
        width = (
            2 * hidden if ACTIVATIONS[check_activation(activation)][1] else hidden
        )  # a gated activation halves the width
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = DropoutAdd(p, drop_path) if norm_first else None
        # It is the last child, so that the other sites keep their numbers.
        self.attention = ScaledDotProductAttention(attention_p, is_causal)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]"""
        check_tensor(x, "x")
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; give [batch, tokens, dim]")
        normed = x
        if self.norm_first:
            normed = normalised(self.norm1, x) if self.remake else self.norm1(x)
        attended = self._attend(normed)
        attended = linear(attended, self.proj.weight)
        if self.drop2 is None:
            x = self.norm1(attended, x, self.proj.bias)
            return self.norm2(self._feed_forward(x), x, self.fc2.bias)
        normed, x = self.norm2(attended, x, self.proj.bias)
        return self.drop2(self._feed_forward(normed), x, self.fc2.bias)

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = of_remade(self.qkv, x, casts=type(self.qkv) is nn.Linear).view(
            batch, tokens, 3, self.num_heads, dim // self.num_heads
        )
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended: Tensor = self.attention(query, key, value)
        return attended.transpose(1, 2).reshape(batch, tokens, dim)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """fc2 without its bias."""
        hidden = self.drop_hidden(linear(x, self.fc1.weight), bias=self.fc1.bias)
        return linear(hidden, self.fc2.weight)
