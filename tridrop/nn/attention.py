"""Attention as modules."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_flag, check_tensor
from ..functional.linear import linear
from ..spec.elementwise import check_probability
from .modules import _Site
from .nested import attend


class ScaledDotProductAttention(_Site):
    """:func:`tridrop.scaled_dot_product_attention` as a module without weights.

    >>> attention = ScaledDotProductAttention(p=0.1, is_causal=True).eval()
    >>> q = k = v = torch.eye(4)[None, None]
    >>> attention(q, k, v)[0, 0, 0]
    tensor([1., 0., 0., 0.])
    """

    def __init__(self, p: float = 0.0, is_causal: bool = False) -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        self.is_causal = is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, queries, E], [batch, heads, keys, E or Ev] -> [.., queries, Ev]"""
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.p if self.training else 0.0,
            is_causal=self.is_causal,
            seed=self._seed(query),
        )
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out

    def extra_repr(self) -> str:
        return f"p={self.p}, is_causal={self.is_causal}"


class MultiheadAttention(nn.MultiheadAttention, _Site):
    """torch.nn.MultiheadAttention with dropout that stores no mask; a drop-in for it.

        head_i = softmax(q_i k_i^T / sqrt(D) + mask) v_i,    dropout of the softmax's result
        out = concat(head_1, ..., head_H) out_proj^T + bias

    for q = query Wq^T + bq and so on, cut into H heads of D = E / H. Vaswani et al., "Attention is
    all you need", 2017. The constructor's arguments, the names and the initial values of the
    parameters are torch's: a state_dict can be loaded either way. With ``need_weights=False`` the
    layer uses :func:`tridrop.scaled_dot_product_attention` and holds no tensor of the size of the
    scores; with ``need_weights=True`` it uses :func:`tridrop.softmax_dropout`, which draws the same
    mask for the same seed. One forward takes one seed; :func:`tridrop.attention_keep_mask` exports
    its mask.

    What differs from torch:

    - A query whose keys are all masked out attends to nothing: its weights and its heads are
      zeros, and its output is out_proj's bias. torch gives NaN in some cases.
    - With ``need_weights=False`` the hint ``is_causal`` is used beside a key_padding_mask as well,
      and attn_mask is not read then. With add_bias_kv or add_zero_attn the hint is never used.
    - Float masks may have any dtype.
    - Nested tensors, with ``batch_first``, are accepted in training and for cross-attention, too.
      They are padded within the layer.

    Args:
        embed_dim, num_heads: E, the width of queries and results, and H, which divides it.
        dropout: the probability of dropping a weight, in training.
        bias: whether the projections have biases.
        add_bias_kv: append a learnt key and value to those of every sample.
        add_zero_attn: append a key and value of zeros.
        kdim, vdim: the widths of keys and values, by default embed_dim.
        batch_first: tensors are [N, L, E] instead of [L, N, E].
        device, dtype: of the parameters.

    Raises:
        ValueError: dropout outside [0, 1]; embed_dim or num_heads not positive.
        AssertionError: num_heads does not divide embed_dim.

    >>> layer = MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    >>> out, weights = layer(x, x, x, key_padding_mask=padding)
    >>> out.shape, weights.shape, weights[1, :, 3:].count_nonzero()
    (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), tensor(0))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_probability(dropout, "dropout")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query [L, N, E] to key [S, N, kdim] and value [S, N, vdim].

        Without a batch these are [L, E], [S, kdim] and [S, vdim]; with ``batch_first`` N is the
        first dimension. All have the parameters' dtype, or run under autocast. All three may be
        nested tensors: then out is nested too, and the weights are those of the padded samples,
        with zeros for padding.

        Args:
            key_padding_mask: [N, S], or [S] without a batch: bool, True where a key is excluded,
                or float, added to the scores of every query.
            need_weights: whether to return the weights, which takes memory of their size.
            attn_mask: [L, S] or [N * H, L, S], bool (True: excluded) or float, differentiable.
                With a float key_padding_mask the two are added, to [N, 1 or H, L, S].
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: says that attn_mask, which must be given, is the causal mask.

        Returns:
            (out, weights). out has query's shape. weights, after dropout, are [N, L, S], or [N, H,
            L, S] if not averaged, with one more column per appended key; or None.

        Raises:
            TypeError, ValueError: nested tensors together with other tensors, with masks, or
                without ``batch_first``.
            AssertionError, RuntimeError: shapes or dtypes that do not fit, and ``is_causal``
                without attn_mask, as torch raises.
        """
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor):
                check_tensor(t, name)
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None or is_causal
            if masked or not self.batch_first:
                raise ValueError(
                    "nested tensors take neither attn_mask, key_padding_mask nor is_causal, and "
                    "have their batch first: pad them, or make the layer with batch_first=True"
                )
            forward = partial(
                MultiheadAttention.forward, self, average_attn_weights=average_attn_weights
            )
            return attend(forward, query, key, value, need_weights)
        batched = query.dim() == 3
        _check_dimensions(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            check_flag(is_causal, "is_causal")
            raise RuntimeError(
                "is_causal=True says that attn_mask is the causal mask: give it as well, for "
                "instance torch.nn.Transformer.generate_square_subsequent_mask(L)"
            )
        _check_dtypes(key_padding_mask, attn_mask)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        q, k, v = self._project(query, key, value, 1 if not batched or self.batch_first else 0)
        batch, _, queries, _ = q.shape
        _check_shapes(key_padding_mask, attn_mask, (batch, self.num_heads, queries, k.shape[2]))
        k, v, appended = self._append(k, v)
        # With the hint, the mask need not be read. Appended keys come after all others, where
        # causal order would hide them, so the hint cannot be used with them. If weights are
        # returned, they have the mask's size anyway, and the mask is read.
        hint = is_causal and not need_weights and not appended
        if key_padding_mask is not None:
            key_padding_mask = _convert(key_padding_mask, appended)
        mask = None if attn_mask is None or hint else _convert(attn_mask, appended)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (batch, self.num_heads))
        weights, attended = self._attend(q, k, v, key_padding_mask, mask, need_weights, hint)
        if self.batch_first or not batched:
            attended = attended.transpose(1, 2)  # [N, L, H, D]
        else:
            attended = attended.permute(2, 0, 1, 3)
        out = nn.functional.linear(attended.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [N, H, length, D]; the index of the length is ``length``."""
        self._check_inputs(query, key, value)
        dim = self.embed_dim

        def heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
            x = x if x.dim() == 3 else x[None]
            x = x.unflatten(-1, (parts, self.num_heads, self.head_dim))
            return x.permute(2, 1 - length, 3, length, 4).unbind(0)

        weight, bias = self.in_proj_weight, self.in_proj_bias
        if bias is not None:
            self._check_bias("in_proj_bias", bias, query)
            self._check_bias("out_proj.bias", self.out_proj.bias, query)
        if weight is not None and query is key and key is value:
            q, k, v = heads(linear(query, weight, bias), 3)
        elif weight is not None and key is value:
            first, second = (None, None) if bias is None else (bias[:dim], bias[dim:])
            (q,) = heads(linear(query, weight[:dim], first), 1)
            k, v = heads(linear(key, weight[dim:], second), 2)
        else:
            weights = (
                (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
                if weight is None
                else weight.chunk(3)
            )
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                heads(linear(x, w, b), 1)[0]
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        if k.shape[0] != q.shape[0]:
            raise RuntimeError(f"query has a batch of {q.shape[0]} and key one of {k.shape[0]}")
        return q, k, v

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"query has shape {tuple(query.shape)}: its last dimension must be embed_dim = "
                f"{self.embed_dim}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length or batch"
            )
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != size:
                raise AssertionError(
                    f"{name} has shape {tuple(x.shape)}: its last dimension must be {size}"
                )

    def _check_bias(self, name: str, bias: Tensor, query: Tensor) -> None:
        """Raise for a bias of another dtype, which torch accepts on some paths only."""
        wanted = self.out_proj.weight.dtype
        if bias.dtype != wanted and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(
                f"{name} has dtype {bias.dtype} and the weights {wanted}: give all parameters one, "
                f"with layer.to({wanted}), or run under torch.autocast"
            )

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """(keys, values, number of pairs appended): a learnt pair and a pair of zeros are."""
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, added in ((keys, self.bias_k), (values, self.bias_v)):
                added = added.to(k.dtype)  # under autocast the projections are narrower
                parts.append(added.view(1, self.num_heads, 1, self.head_dim).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        if len(keys) == 1:
            return k, v, 0
        return torch.cat(keys, dim=2), torch.cat(values, dim=2), len(keys) - 1

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
        hint: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """(weights or None, heads), the heads [N, H, L, D].

        ``padding`` [N, S] and ``mask`` have tridrop's convention: True takes part.
        """
        seed = self._seed(q)
        if need_weights:
            if padding is not None:
                mask = merge_masks(padding[:, None, None, :], mask)
            # The query is scaled before the product, so that scores stay within float16's range.
            scores = q * math.sqrt(1 / self.head_dim) @ k.transpose(-2, -1)
            weights = F.softmax_dropout(scores, self.dropout, self.training, mask=mask, seed=seed)
            return weights, weights @ v
        if padding is not None and padding.dtype != torch.bool:
            mask, padding = merge_masks(padding[:, None, None, :], mask), None
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, mask, p, hint, key_mask=padding, seed=seed
        )  # fmt: skip
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return None, out


def _check_dimensions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    given = query.dim()
    for name, x, wanted in (
        ("query", query, (2, 3)),
        ("key", key, (given,)),
        ("value", value, (given,)),
        ("key_padding_mask", key_padding_mask, (given - 1,)),
        ("attn_mask", attn_mask, (2, 3)),
    ):
        if x is None:
            continue
        check_tensor(x, name)
        if x.dim() not in wanted:
            beside = " (2 is without a batch)" if x is query else f" beside a query of {given}"
            raise AssertionError(
                f"{name} has {x.dim()} dimensions; give {' or '.join(map(str, wanted))}{beside}"
            )


def _check_dtypes(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"{name} has dtype {mask.dtype}; give bool (True: excluded) or floating-point "
                f"(added to the scores): use {name}.bool()"
            )
    if (
        key_padding_mask is not None
        and attn_mask is not None
        and key_padding_mask.dtype != attn_mask.dtype
        and not torch.compiler.is_compiling()
    ):
        warnings.warn(
            "key_padding_mask and attn_mask of different dtypes are deprecated in torch: give both "
            "the same dtype",
            stacklevel=3,
        )


def _check_shapes(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, shape: tuple[int, int, int, int]
) -> None:
    batch, heads, queries, keys = shape
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, keys):
        raise AssertionError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (N, S) = "
            f"{(batch, keys)}"
        )
    if attn_mask is not None:
        wanted = ((queries, keys), (batch * heads, queries, keys))[attn_mask.dim() - 2]
        if tuple(attn_mask.shape) != wanted:
            raise RuntimeError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; with {attn_mask.dim()} dimensions "
                f"it must be {wanted}"
            )


def _convert(mask: Tensor, appended: int) -> Tensor:
    """A mask of torch.nn in tridrop's convention, with columns that never exclude appended keys."""
    if appended:
        mask = nn.functional.pad(mask, (0, appended))
    return ~mask if mask.dtype == torch.bool else mask


def merge_masks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One mask from two, in tridrop's convention; it is bool only if both are."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    if second.dtype == torch.bool:
        return torch.where(second, first, -math.inf)
    return first + second
