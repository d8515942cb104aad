"""Variational dropout of recurrent cells, for users who write the loop over time steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_tensor
from ..contract import recomputation, seeds
from ..contract.mask import as_seed, fold_in
from ..spec.elementwise import check_probability
from .cells import Drops, Weights, as_given, check_place, given_state, project, step
from .recurrent import LockedDropout

_Seeds = tuple[Tensor | None, Tensor | None]


class VariationalCell(nn.Module):
    """A recurrent cell of torch.nn with variational dropout: its masks last for a sequence.

    Use it in a loop over time steps. A step is that of :class:`VariationalRNN`, with masks for the
    input and for the state or the candidate.

    An explicit ``seed`` fixes the masks of a step: those of ``fold_in(seed, 0)`` for the input and
    of ``fold_in(seed, 1)`` for the state. Steps can then be recomputed in any order. Without
    ``seed``, a call without ``hx`` begins a sequence: it draws seeds, or takes them from
    :func:`tridrop.rng`, and these last until the next such call or :meth:`reset`. A mask takes 16
    bytes. torch.utils.checkpoint can recompute such a sequence as a whole, from the call without
    ``hx`` on; recomputing a later step alone raises.

    Args:
        cell: torch.nn.LSTMCell, GRUCell or RNNCell. It becomes the child ``cell``.
        input_dropout, recurrent_dropout, recurrent_place: as in :class:`VariationalRNN`.

    Raises:
        TypeError: ``cell`` is none of these cells.
        ValueError: as :class:`VariationalRNN`.

    >>> import torch, tridrop
    >>> cell = tridrop.nn.VariationalCell(torch.nn.GRUCell(4, 8), recurrent_dropout=0.3)
    >>> h = None
    >>> for x in torch.ones(5, 2, 4):
    ...     h = cell(x, h, seed=1)
    >>> h.shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        cell: nn.RNNCellBase,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        *,
        recurrent_place: str = "hidden",
    ) -> None:
        super().__init__()
        self.kind = _cell_kind(cell)
        check_place(recurrent_place, self.kind)
        check_probability(input_dropout, "input_dropout")
        check_probability(recurrent_dropout, "recurrent_dropout")
        self.cell = cell
        self.recurrent_place = recurrent_place
        self.input_dropout = LockedDropout(input_dropout)
        self.recurrent_dropout = LockedDropout(recurrent_dropout)
        self.reset()

    def reset(self) -> None:
        """Forget the masks, so that the next call draws new ones, with or without ``hx``."""
        self._kept: _Seeds | None = None
        self._recomputed: tuple[int, _Seeds] | None = None

    def forward(self, input: Tensor, hx: Any = None, *, seed: int | Tensor | None = None) -> Any:
        """The next state from ``[B, C]`` or ``[C]`` and the last state, as in torch's cells."""
        if not (self.input_dropout.active or self.recurrent_dropout.active):
            return self.cell(input, hx)
        check_tensor(input, "input")
        if input.dim() not in (1, 2):
            raise ValueError(f"input has shape {tuple(input.shape)}; a cell takes [B, C] or [C]")
        first, second = self._seeds(input, hx, seed)
        batched = input.dim() == 2
        x = input if batched else input[None]
        shape = (len(x), self.cell.hidden_size)
        if hx is None:
            state = (x.new_zeros(shape),) * (2 if self.kind == "LSTM" else 1)
        else:
            state = given_state(hx) if batched else tuple(s[None] for s in given_state(hx))
        for s in state:
            if tuple(s.shape) != shape:
                raise ValueError(
                    f"a state has shape {tuple(s.shape)}; with this input it must be {shape}"
                )
        cell = self.cell
        x = F.dropout(x, self.input_dropout.p, self.input_dropout.training, seed=first)

        def drop(t: Tensor) -> Tensor:
            site = self.recurrent_dropout
            return F.dropout(t, site.p, site.training, seed=second)

        weights = Weights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        drops = Drops(**{self.recurrent_place: drop})
        state = step(self.kind, project(self.kind, x, weights), state, weights, drops)
        return as_given(state if batched else tuple(s[0] for s in state))

    def _seeds(self, x: Tensor, hx: Any, seed: int | Tensor | None) -> _Seeds:
        """The seeds of the input's mask and of the state's mask."""
        if seed is not None:
            base = as_seed(seed, x.device)
            return fold_in(base, 0), fold_in(base, 1)
        task = recomputation.number()
        if task is None:
            if hx is None or self._kept is None:
                self._kept = self._draw(x)
            return self._kept
        # This is a recomputation in backward, when the kept seeds may belong to another sequence.
        if hx is None:
            self._recomputed = task, self._draw(x)
        if self._recomputed is None or self._recomputed[0] != task:
            raise RuntimeError(
                "a step of a VariationalCell is being recomputed in backward without the first of "
                "its sequence, which drew the masks: pass seed to every step"
            )
        return self._recomputed[1]

    def _draw(self, x: Tensor) -> _Seeds:
        first, second = (
            seeds.seed_for(x.device, None, d.site) if d.active else None
            for d in (self.input_dropout, self.recurrent_dropout)
        )
        return first, second

    def extra_repr(self) -> str:
        return f"recurrent_place={self.recurrent_place!r}"


def _cell_kind(cell: nn.RNNCellBase) -> str:
    if isinstance(cell, nn.LSTMCell):
        return "LSTM"
    if isinstance(cell, nn.GRUCell):
        return "GRU"
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    raise TypeError(
        f"cell is a {type(cell).__name__}; give a torch.nn.LSTMCell, GRUCell or RNNCell (for a "
        "whole layer use tridrop.nn.VariationalRNN)"
    )
