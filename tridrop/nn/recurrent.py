"""Variational dropout of recurrent layers: one mask for all time steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F
from ..base.torch_private import recurrent
from ..functional.recurrent import Sequences
from ..spec.elementwise import check_probability
from .cells import (
    Drops,
    State,
    Weights,
    as_given,
    as_tuple,
    check_place,
    given_state,
    project,
    scan,
    step,
)
from .modules import _Site

_FUSED: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": recurrent.lstm,
    "GRU": recurrent.gru,
    "RNN_TANH": recurrent.rnn_tanh,
    "RNN_RELU": recurrent.rnn_relu,
}


class LockedDropout(_Site):
    """:func:`tridrop.locked_dropout` as a module: one mask for all time steps of a sequence.

    Args:
        p: the probability of dropping a feature of a sample.
        batch_first: tensors are ``[B, T, C]`` instead of ``[T, B, C]``.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.LockedDropout(0.5, batch_first=True)
    >>> out = layer(torch.ones(2, 3, 8))
    >>> bool((out == out[:, :1]).all())
    True
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        self.batch_first = batch_first

    def forward(self, input: Sequences) -> Sequences:
        x = input.data if isinstance(input, PackedSequence) else input
        return F.locked_dropout(
            input, self.p, self.training, batch_first=self.batch_first, seed=self._seed(x)
        )

    @property
    def active(self) -> bool:
        """Whether the module drops now: it is in training and its rate is not 0."""
        return self.training and (isinstance(self.p, Tensor) or self.p > 0)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", batch_first=True" if self.batch_first else "")


class VariationalRNN(nn.Module):
    """A recurrent layer of torch.nn with variational dropout, also of its recurrent state.

        h[t] = f(x[t] * m_x, h[t-1] * m_h),    out[t] = h[t] * m_y

    with masks ``m`` of [batch, features] that are drawn once per sequence and scaled by 1 / (1 - p)
    (Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016). torch's own ``dropout`` draws a new mask in every time step, and drops nothing
    of the state.

    Without ``recurrent_dropout``, torch's fused layers run: one call for the whole, or one call per
    layer. ``recurrent_dropout`` needs a Python loop over the time steps, over the same parameters,
    which is slower (docs/recurrent.md has a measured ratio).

    Args:
        rnn: a torch.nn.RNN, LSTM or GRU with any arguments. It becomes the child ``rnn``.
        input_dropout, output_dropout: rates for the inputs, and for the outputs of the last layer.
        layer_dropout: rate for the outputs that a layer passes to the next one. None takes over the
            rate of ``rnn.dropout``. In both cases ``rnn.dropout`` becomes 0.
        recurrent_dropout: rate for the state, with the same mask for all gates. Each layer and
            direction has a mask of its own.
        recurrent_place: "hidden", the state where it enters the matrix product (Gal and
            Ghahramani), or "candidate", what a step would add to the state of an LSTM or GRU, so
            that the memory loses nothing (Semeniuta, Severyn and Barth, "Recurrent dropout without
            memory loss", 2016, who draw a new mask in each step).

    It is called as ``rnn`` is and returns the same: ``(output, h_n)``, or ``(output, (h_n, c_n))``.
    The states that it takes and returns are not dropped, only their uses inside are. The masks of
    inputs and outputs are those of :func:`tridrop.locked_dropout`. The state's mask is
    ``tridrop.keep_mask(seed, (batch, features), p)``; it is kept for backward, once per sequence.

    Raises:
        TypeError: ``rnn`` is none of these layers.
        ValueError: a rate outside [0, 1]; "candidate" for nn.RNN, which has none.

    >>> import torch, tridrop
    >>> lstm = torch.nn.LSTM(4, 8, num_layers=2, dropout=0.3)
    >>> layer = tridrop.nn.VariationalRNN(lstm, input_dropout=0.2, recurrent_dropout=0.2)
    >>> output, (h, c) = layer(torch.ones(5, 3, 4))
    >>> output.shape, h.shape, layer.layer_dropout[0].p
    (torch.Size([5, 3, 8]), torch.Size([2, 3, 8]), 0.3)
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        layer_dropout: float | None = None,
        recurrent_dropout: float = 0.0,
        *,
        recurrent_place: str = "hidden",
    ) -> None:
        super().__init__()
        if not isinstance(rnn, nn.RNNBase):
            raise TypeError(
                f"rnn is a {type(rnn).__name__}; give a torch.nn.RNN, LSTM or GRU (for a cell use "
                "tridrop.nn.VariationalCell)"
            )
        check_place(recurrent_place, rnn.mode)
        between = rnn.dropout if layer_dropout is None else layer_dropout
        layers, directions = rnn.num_layers, 1 + rnn.bidirectional
        rates = {
            "input_dropout": input_dropout, "output_dropout": output_dropout,
            "layer_dropout": between, "recurrent_dropout": recurrent_dropout,
        }  # fmt: skip
        for name, p in rates.items():
            check_probability(p, name)
        rnn.dropout = 0.0
        self.rnn = rnn
        self.recurrent_place = recurrent_place
        # Each is a site even if its rate is 0, so that site numbers do not depend on the rates.
        self.input_dropout = LockedDropout(input_dropout, rnn.batch_first)
        self.layer_dropout = _sites(between, layers - 1)
        self.recurrent_dropout = _sites(recurrent_dropout, layers * directions)
        self.output_dropout = LockedDropout(output_dropout, rnn.batch_first)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        x = self.input_dropout(input)
        inside = (*self.layer_dropout, *self.recurrent_dropout)
        if not any(site.active for site in inside):
            output, state = self.rnn(x, hx)
        elif isinstance(x, PackedSequence):
            output, state = self._packed(x, hx)
        else:
            output, state = self._padded(x, hx)
        return self.output_dropout(output), state

    def _packed(self, x: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        rnn = self.rnn
        given = self._state(x.data, hx, int(x.batch_sizes[0]), True)
        rnn.check_forward_args(x.data, given, x.batch_sizes)
        state = as_tuple(rnn.permute_hidden(given, x.sorted_indices))
        output, state = self._layers(x.data, state, x)
        return x._replace(data=output), rnn.permute_hidden(as_given(state), x.unsorted_indices)

    def _padded(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        rnn = self.rnn
        batched = x.dim() == 3
        batch = 0 if rnn.batch_first else 1
        if not batched:
            x = x.unsqueeze(batch)
        given = self._state(x, hx, x.shape[batch], batched)
        rnn.check_forward_args(x, given, None)
        if rnn.batch_first:
            x = x.transpose(0, 1)
        output, state = self._layers(x, as_tuple(given), None)
        if not batched:
            return output.squeeze(1), as_given(tuple(s.squeeze(1) for s in state))
        return output.transpose(0, 1) if rnn.batch_first else output, as_given(state)

    def _state(self, x: Tensor, hx: Any, batch: int, batched: bool) -> Any:
        """The first state, as torch's layers take it: [layers * directions, batch, features]."""
        rnn = self.rnn
        if hx is None:
            rows = rnn.num_layers * (1 + rnn.bidirectional)
            sizes = [rnn.proj_size or rnn.hidden_size]
            sizes += [rnn.hidden_size] if rnn.mode == "LSTM" else []
            return as_given(tuple(x.new_zeros(rows, batch, size) for size in sizes))
        for s in given_state(hx):
            if s.dim() != (3 if batched else 2):
                raise RuntimeError(
                    f"for {'batched 3-D' if batched else 'unbatched 2-D'} input the states must "
                    f"have {3 if batched else 2} dimensions; given {tuple(s.shape)}"
                )
        return hx if batched else as_given(tuple(s.unsqueeze(1) for s in as_tuple(hx)))

    def _layers(
        self, x: Tensor, state: State, packing: PackedSequence | None
    ) -> tuple[Tensor, State]:
        """Run the layers one after the other, on ``[T, B, C]`` or on the data of ``packing``.

        The samples of the states are in the order of the data.
        """
        directions = 1 + self.rnn.bidirectional
        last: list[State] = []
        for layer in range(self.rnn.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            first = tuple(s[rows] for s in state)
            drops = any(site.active for site in self.recurrent_dropout[rows])
            x, final = (self._loop if drops else self._fused)(x, first, rows, packing)
            last.append(final)
            if layer < len(self.layer_dropout):
                between = self.layer_dropout[layer]
                x = between(x) if packing is None else between(packing._replace(data=x)).data
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))

    def _fused(
        self, x: Tensor, first: State, rows: slice, packing: PackedSequence | None
    ) -> tuple[Tensor, State]:
        """One layer by torch's own kernels."""
        rnn = self.rnn
        function = _FUSED[rnn.mode]
        weights = [w for direction in rnn.all_weights[rows] for w in direction]
        options = (weights, rnn.bias, 1, 0.0, rnn.training, rnn.bidirectional)
        hx = first if len(first) == 2 else first[0]
        if packing is None:
            out, *final = function(x, hx, *options, False)
        else:
            out, *final = function(x, packing.batch_sizes, hx, *options)
        return out, tuple(final)

    def _loop(
        self, x: Tensor, first: State, rows: slice, packing: PackedSequence | None
    ) -> tuple[Tensor, State]:
        """One layer step by step."""
        rnn = self.rnn
        outputs, finals = [], []
        for i, site in enumerate(self.recurrent_dropout[rows]):
            weights = Weights.of(rnn, rnn.all_weights[rows][i])
            gates = project(rnn.mode, x, weights)
            # Under autocast all states have the gates' dtype, as in torch's layers.
            state = tuple(s[i].to(gates.dtype) for s in first)
            drops = self._drops(site, state, None if packing is None else packing.sorted_indices)
            advance = partial(step, rnn.mode, w=weights, drops=drops)
            if packing is None:
                found, final = scan(gates.unbind(), state, advance, reverse=i == 1)
                outputs.append(torch.stack(found))
            else:
                steps = gates.split(packing.batch_sizes.tolist())
                found, final = scan(steps, state, advance, reverse=i == 1)
                outputs.append(torch.cat(found))
            finals.append(final)
        return torch.cat(outputs, dim=-1), tuple(
            torch.stack(parts) for parts in zip(*finals, strict=True)
        )

    def _drops(self, site: Any, state: State, order: Tensor | None) -> Drops:
        """The functions that drop inside a step, with the same mask for all steps."""
        if not site.active:
            return Drops()
        like = state[0] if self.recurrent_place == "hidden" else state[-1]
        # At least float32: half precision would round the scale itself.
        ones = torch.ones_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        factor = F.dropout(ones, site.p, seed=site._seed(ones))
        if order is not None:
            factor = factor[order]

        def drop(t: Tensor) -> Tensor:
            return (t * factor[: len(t)]).to(t.dtype)

        return Drops(**{self.recurrent_place: drop})

    def extra_repr(self) -> str:
        return f"recurrent_place={self.recurrent_place!r}"


def _sites(p: float, count: int) -> nn.ModuleList:
    return nn.ModuleList(LockedDropout(p) for _ in range(count))
