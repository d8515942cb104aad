"""Keras' attention, whose dropout is tridrop's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from torch import Tensor

from .. import functional as F
from ..base.modules import heard
from .layers import Dropout
from .seeds import Configured, check_seed

_WIDEST = 256  # of a head that attention's kernels take


class Attends(Configured):
    """``_compute_attention``, which Keras has its users override for another computation."""

    _dropout: float
    _dropout_layer: Any
    _softmax: Any
    _attention_axes: Sequence[int]
    _inverse_sqrt_key_dim: float
    _adopted: type = Dropout  # what its dropout layer becomes, which holds the seeds

    def _build_attention(self, rank: int) -> None:
        super()._build_attention(rank)  # type: ignore[misc]
        self._dropout_layer.__class__ = self._adopted  # it has nothing that is not in Keras' own

    def _compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        **causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # Whoever hears of calls of its softmax or dropout layer hears of them still.
        parts = (self._dropout_layer, self._softmax)
        drops = training and self._dropout > 0 and query.device.type != "meta"
        if not drops or any(map(heard, parts)):
            found: tuple[Tensor, Tensor | None] = super()._compute_attention(  # type: ignore[misc]
                query, key, value, attention_mask, training, return_attention_scores, **causal
            )
            return found
        order = _Order(query.dim(), self._attention_axes)
        q, k, v = map(order.heads_first, (query, key, value))
        mask = None
        if attention_mask is not None:
            mask = order.mask(keras.ops.cast(attention_mask, "bool"), query, key)
        is_causal = causal.get("use_causal_mask", False)
        seed = self._dropout_layer.next_seed(query)
        p, scale = float(self._dropout), self._inverse_sqrt_key_dim
        if return_attention_scores or max(q.shape[-1], v.shape[-1]) > _WIDEST:
            dropped, softmax = F.softmax_dropout(
                q @ k.transpose(-1, -2), p, mask=mask, is_causal=is_causal, scale=scale,
                return_softmax=True, seed=seed,
            )  # fmt: skip
            return order.back(dropped @ v, query), order.scores(softmax, query, key)
        out = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale, seed=seed)
        assert isinstance(out, Tensor)
        return order.back(out, query), None


class _Order:
    """The dimensions of Keras' tensors, ``[batch, ..., heads, size]``, in the order of attention's.

    Those that are attended over become one, and so do the batch and what is left beside it.
    """

    def __init__(self, rank: int, axes: Sequence[int]) -> None:
        self.axes = tuple(axes)
        self.beside = tuple(dim for dim in range(rank - 2) if dim not in self.axes)
        self.order = (*self.beside, rank - 2, *self.axes, rank - 1)

    def heads_first(self, x: Tensor) -> Tensor:
        """[batch, heads, attended over, size]; a view where one axis is attended over."""
        x = x.permute(self.order)
        lengths = len(self.beside), len(self.axes)
        if lengths != (1, 1):
            sizes = _sizes(x.shape[: lengths[0]]), _sizes(x.shape[-1 - lengths[1] : -1])
            x = x.reshape(sizes[0], x.shape[lengths[0]], sizes[1], x.shape[-1])
        return x

    def back(self, x: Tensor, query: Tensor) -> Tensor:
        """What is of ``heads_first``'s shape in the order of ``query``."""
        sizes = [query.shape[dim] for dim in self.order[:-1]]
        x = x.reshape(*sizes, x.shape[-1])
        return x.permute([self.order.index(dim) for dim in range(len(self.order))])

    def scores(self, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Probabilities as Keras returns them: [batch, ..., heads, queries, keys]."""
        return x.reshape(self._scores(query, key))

    def _scores(self, query: Tensor, key: Tensor) -> list[int]:
        queries = [query.shape[dim] for dim in self.order[:-1]]
        return [*queries, *(key.shape[dim] for dim in self.axes)]

    def mask(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A mask of Keras' as one that broadcasts to [batch, heads, queries, keys].

        Keras adds what a mask lacks of the scores' dimensions before those of the heads' queries.
        """
        shape, n = self._scores(query, key), len(self.axes)
        while mask.dim() < len(shape):
            mask = mask.unsqueeze(-2 * n - 1)
        first = len(self.beside)
        groups = (slice(0, first), slice(first, first + 1), slice(first + 1, -n), slice(-n, None))
        wanted, merged = list(mask.shape), []
        for group in groups:
            if any(size != 1 for size in wanted[group]):
                wanted[group] = shape[group]  # shared along some of its dimensions, perhaps
            merged.append(_sizes(wanted[group]))
        return mask.expand(wanted).reshape(merged)


def _sizes(shape: Sequence[int]) -> int:
    return math.prod(shape)


@keras.saving.register_keras_serializable(package="tridrop")
class MultiHeadAttention(Attends, keras.layers.MultiHeadAttention):  # type: ignore[misc]
    """``keras.layers.MultiHeadAttention`` by :func:`tridrop.scaled_dot_product_attention`.

        P = softmax(query key^T / sqrt(key_dim));   out = where(keep, P / (1 - dropout), 0) value

    in training, where dropout > 0, in memory linear in the lengths; in all other cases what Keras
    computes. Arguments, weights, masks and results are those of Keras' layer. Scores are returned
    as there, before dropout, and the mask is the same whether they are or not: that of
    ``tridrop.attention_keep_mask(seed, [batch, heads, queries, keys], dropout)``, with the seeds of
    :class:`tridrop.keras.Dropout`. (Of several attention axes queries and keys are all their
    positions, and the batch all other dimensions.)

    Args:
        num_heads, key_dim, value_dim, dropout, ...: as in ``keras.layers.MultiHeadAttention``.
        seed: as in :class:`tridrop.keras.Dropout`.

    >>> import torch, tridrop.keras
    >>> layer = tridrop.keras.MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.5, seed=7)
    >>> layer(torch.ones(1, 3, 8), torch.ones(1, 3, 8), training=True).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, num_heads: int, key_dim: int, *args: Any, **kwargs: Any) -> None:
        check_seed(kwargs.get("seed"))
        super().__init__(num_heads, key_dim, *args, **kwargs)
