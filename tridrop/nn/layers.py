"""torch's transformer layers, with each dropout fused with the ops next to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from ..base.arguments import check_flag, check_tensor
from .attention import MultiheadAttention
from .branches import add, add_and_norm, add_norm, attend, feed_forward, has_hooks, normalised
from .modules import Dropout
from .nested import Nested

_Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with fused dropout that stores no mask; a drop-in for it.

        x = norm1(x + dropout1(self_attn(x)))
        x = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

    or, with ``norm_first=True``:

        x = x + dropout1(self_attn(norm1(x)))
        x = x + dropout2(linear2(dropout(activation(linear1(norm2(x))))))

    Vaswani et al., "Attention is all you need", 2017. The constructor's arguments, the names and
    the initial values of the parameters are torch's: a state_dict can be loaded either way. The
    attention is :class:`tridrop.nn.MultiheadAttention`. dropout1 and dropout2 are each one op with
    the residual and with the norm that follows within the layer, dropout2 also with the bias of
    linear2. The bias of linear1, the activation and ``dropout`` are one op for relu and gelu. Each
    dropout keeps its own ``p`` and ``training``, and is a separate site.

    Where a subclass overrides ``_sa_block`` or ``_ff_block``, or a linear, norm or dropout was
    replaced or has hooks, the layer calls its blocks and modules one by one, as torch's does.

    What differs from torch:

    - Evaluation never takes torch's inference path. A nested tensor is padded within the layer.
    - Masks and hints differ as :class:`tridrop.nn.MultiheadAttention` says.

    Args:
        d_model, nhead: the width E and the number of heads, which divides it.
        dim_feedforward: the width between linear1 and linear2.
        dropout: the probability of dropping in all parts; change that of a part by its ``p``.
        activation: "relu", "gelu" or any callable. relu and gelu are fused, whether given as a
            string, a function or a module.
        layer_norm_eps: added to the variance in the norms.
        batch_first: tensors are [N, S, E] instead of [S, N, E].
        norm_first: whether the norms go before the branches or after the additions.
        bias: whether linears and norms have biases.
        device, dtype: of the parameters.
        remake: keep no input of a linear layer that backward can make again, as in
            :class:`TransformerBlock`.

    Raises:
        ValueError: dropout outside [0, 1]; d_model or nhead not positive.
        RuntimeError, TypeError: an activation of another name; one that is not callable.
        AssertionError: nhead does not divide d_model.

    >>> layer = TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layer, 2)
    >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    >>> encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding).shape
    torch.Size([2, 5, 16])
    """

    remake = False  # for layers that an older version pickled

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        remake: bool = False,
    ) -> None:
        # torch's constructor is not called, since it would draw initial values a second time. The
        # dropouts are made in the order in which forward uses them, which number_sites follows.
        super(nn.TransformerEncoderLayer, self).__init__()
        function = _activation_function(activation)
        check_flag(remake, "remake")
        self.remake = remake
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=batch_first, **made
        )
        self.dropout1 = Dropout(dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.dropout2 = Dropout(dropout)
        # torch's encoder reads this to see whether a layer takes nested tensors; this one does.
        self.activation_relu_or_gelu = (
            1
            if function is relu or isinstance(function, nn.ReLU)
            else 2 * (function is gelu or isinstance(function, nn.GELU))
        )
        self.activation = function

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[S, N, E] -> [S, N, E]; [N, S, E] with ``batch_first``; [S, E] without a batch.

        Args:
            src: of the parameters' dtype, or of any dtype under autocast. It may be a nested tensor
                if there are no masks and ``batch_first`` is set; then the result is nested too.
            src_mask: [S, S] or [N * H, S, S], bool (True: excluded) or float (added).
            src_key_padding_mask: [N, S], or [S] without a batch, likewise.
            is_causal: says that src_mask, which must be given, is the causal mask.

        Raises:
            ValueError: a nested tensor with masks or without ``batch_first``.
            AssertionError, RuntimeError: shapes or dtypes that do not fit, and ``is_causal``
                without src_mask, as torch raises.
        """
        if not isinstance(src, Tensor):
            check_tensor(src, "src")
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if not _fusable(self, nn.TransformerEncoderLayer, ("_sa_block", "_ff_block"), 2):
            # torch passes float masks to its blocks, and an override may rely on that.
            mask, padding = _added(src_mask, src.dtype), _added(src_key_padding_mask, src.dtype)
            if self.norm_first:
                x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
                return x + self._ff_block(self.norm2(x))
            x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
            return self.norm2(x + self._ff_block(x))

        normed = x
        if self.norm_first:
            normed = normalised(self.norm1, x) if self.remake else self.norm1(x)
        attended = attend(self.self_attn, normed, normed, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            normed, x = add_and_norm(attended, x, self.dropout1, self.norm2, remake=self.remake)
            return add(feed_forward(self, normed), x, self.linear2, self.dropout2)
        x = add_norm(attended, x, self.dropout1, self.norm1, remake=self.remake)
        return add_norm(
            feed_forward(self, x), x, self.dropout2, self.norm2, self.linear2, remake=self.remake
        )

    def _forward_nested(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The forward of a nested tensor, such as torch's encoder makes of a padded one in eval."""
        if mask is not None or padding is not None:
            raise ValueError("a nested src takes no src_mask and no src_key_padding_mask")
        if not self.self_attn.batch_first:
            raise ValueError("a nested src has its batch first: make the layer with batch_first")
        nested = Nested.of(src, "src")
        if not nested.longest:
            return src
        # self.forward may be an override, which has already run.
        out = TransformerEncoderLayer.forward(
            self, nested.padded, None, nested.padding(), is_causal
        )
        return nested.cut(out)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with fused dropout that stores no mask; a drop-in for it.

        x = norm1(x + dropout1(self_attn(x)))
        x = norm2(x + dropout2(multihead_attn(x, memory)))
        x = norm3(x + dropout3(linear2(dropout(activation(linear1(x))))))

    or, with ``norm_first=True``:

        x = x + dropout1(self_attn(norm1(x)))
        x = x + dropout2(multihead_attn(norm2(x), memory))
        x = x + dropout3(linear2(dropout(activation(linear1(norm3(x))))))

    :class:`TransformerEncoderLayer` describes what is fused, what differs from torch, the arguments
    and the errors; ``_mha_block`` can be overridden as well. Nested tensors are not accepted.

    >>> layer = TransformerDecoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    >>> causal = nn.Transformer.generate_square_subsequent_mask(5)
    >>> x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    >>> layer(x, memory, tgt_mask=causal, tgt_is_causal=True).shape
    torch.Size([2, 5, 16])
    """

    remake = False  # for layers that an older version pickled

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        remake: bool = False,
    ) -> None:
        super(nn.TransformerDecoderLayer, self).__init__()  # as in the encoder's layer
        function = _activation_function(activation)
        check_flag(remake, "remake")
        self.remake = remake
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        attention: dict[str, Any] = {"dropout": dropout, "batch_first": batch_first, **made}
        self.self_attn = MultiheadAttention(d_model, nhead, **attention)
        self.dropout1 = Dropout(dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, **attention)
        self.dropout2 = Dropout(dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm3 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.dropout3 = Dropout(dropout)
        self.activation = function

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt [T, N, E] and memory [S, N, E] -> [T, N, E]; N first or left out, as in the encoder.

        Args:
            tgt, memory: of the parameters' dtype, or any under autocast.
            tgt_mask, memory_mask: [T, T] and [T, S], or [N * H, T, T] and [N * H, T, S], bool
                (True: excluded) or float (added).
            tgt_key_padding_mask, memory_key_padding_mask: [N, T] and [N, S], likewise.
            tgt_is_causal, memory_is_causal: say that the mask, which must be given, is causal.

        Raises:
            TypeError: nested tensors.
            AssertionError, RuntimeError: shapes or dtypes that do not fit, and a hint without its
                mask, as torch raises.
        """
        for name, t in (("tgt", tgt), ("memory", memory)):
            if not isinstance(t, Tensor):
                check_tensor(t, name)
        if tgt.is_nested or memory.is_nested:
            raise TypeError(
                "tgt or memory is a nested tensor, which this layer does not take: pad both, and "
                "give key padding masks"
            )
        x = tgt
        itself = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        across = (memory_mask, memory_key_padding_mask, memory_is_causal)
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        if not _fusable(self, nn.TransformerDecoderLayer, blocks, 3):
            if self.norm_first:
                x = x + self._sa_block(self.norm1(x), *itself)
                x = x + self._mha_block(self.norm2(x), memory, *across)
                return x + self._ff_block(self.norm3(x))
            x = self.norm1(x + self._sa_block(x, *itself))
            x = self.norm2(x + self._mha_block(x, memory, *across))
            return self.norm3(x + self._ff_block(x))

        if self.norm_first:
            normed = normalised(self.norm1, x) if self.remake else self.norm1(x)
            attended = attend(self.self_attn, normed, normed, *itself)
            normed, x = add_and_norm(attended, x, self.dropout1, self.norm2, remake=self.remake)
            attended = attend(self.multihead_attn, normed, memory, *across)
            normed, x = add_and_norm(attended, x, self.dropout2, self.norm3, remake=self.remake)
            return add(feed_forward(self, normed), x, self.linear2, self.dropout3)
        x = add_norm(
            attend(self.self_attn, x, x, *itself), x, self.dropout1, self.norm1, remake=self.remake
        )
        attended = attend(self.multihead_attn, x, memory, *across)
        x = add_norm(attended, x, self.dropout2, self.norm2, remake=self.remake)
        return add_norm(
            feed_forward(self, x), x, self.dropout3, self.norm3, self.linear2, remake=self.remake
        )


def _activation_function(activation: _Activation) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str):
        if activation not in ("relu", "gelu"):
            raise RuntimeError(f"activation = {activation!r}; give 'relu', 'gelu' or a callable")
        return relu if activation == "relu" else gelu
    if not callable(activation):
        raise TypeError(f"activation = {activation!r}; give 'relu', 'gelu' or a callable")
    return activation


def _fusable(layer: nn.Module, base: type, blocks: Sequence[str], branches: int) -> bool:
    """Whether the layer's blocks and modules are still those of torch's class, without hooks."""
    cls = type(layer)
    if any(getattr(cls, b) is not getattr(base, b) or b in layer.__dict__ for b in blocks):
        return False
    parts: list[Any] = [layer.linear1, layer.linear2]
    if any(type(part) is not nn.Linear for part in parts):
        return False
    numbers = range(1, branches + 1)
    norms: list[Any] = [getattr(layer, f"norm{i}") for i in numbers]
    if any(type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1 for norm in norms):
        return False
    drops: list[Any] = [layer.dropout, *(getattr(layer, f"dropout{i}") for i in numbers)]
    if any(type(drop) is not Dropout or drop.noise_shape is not None for drop in drops):
        return False
    parts += norms + drops
    if isinstance(layer.activation, nn.Module):
        parts.append(layer.activation)
    return not any(map(has_hooks, parts))


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as a float mask, which is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
