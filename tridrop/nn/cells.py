"""One step of torch's recurrent layers as formulas, and the loop over a sequence's steps.

torch's fused layers have no place for a mask inside a step. Here there are two places: ``hidden``,
the state that enters the matrix product, and ``candidate``, what a step would add to the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.arguments import check_tensor, given

State = tuple[Tensor, ...]  # (h,), or (h, c) for an LSTM


def as_tuple(state: Any) -> State:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def given_state(hx: Any) -> State:
    """:func:`as_tuple` of a caller's argument; TypeError unless it consists of tensors."""
    if not isinstance(hx, (Tensor, tuple, list)):
        raise TypeError(f"{given(hx, 'hx')}; give a tensor, or a pair of them for an LSTM")
    state = as_tuple(hx)
    for s in state:
        check_tensor(s, "hx")
    return state


def as_given(state: State) -> Any:
    """The state as torch's layers take and return it: (h, c), or h alone."""
    return state if len(state) == 2 else state[0]


def check_place(place: str, kind: str) -> None:
    if place not in ("hidden", "candidate"):
        raise ValueError(f"recurrent_place = {place!r}; known: 'hidden', 'candidate'")
    if place == "candidate" and kind not in ("LSTM", "GRU"):
        raise ValueError(
            "recurrent_place = 'candidate' is for an LSTM or a GRU; an Elman network has no gates "
            "and no candidate: use 'hidden'"
        )


def _keep(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Drops:
    """The functions that drop inside a step; by default nothing is dropped."""

    hidden: Callable[[Tensor], Tensor] = _keep
    candidate: Callable[[Tensor], Tensor] = _keep


@dataclass(frozen=True)
class Weights:
    """The parameters of one layer in one direction, by torch's names."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @classmethod
    def of(cls, module: nn.RNNBase, given: Sequence[Tensor]) -> Weights:
        """The weights from a list in torch's order, without those that the module does not have."""
        w_ih, w_hh, *rest = given
        b_ih, b_hh = rest[:2] if module.bias else (None, None)
        projected = module.proj_size > 0
        return cls(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None)


def project(kind: str, x: Tensor, w: Weights) -> Tensor:
    """The inputs' part of the gates, for any number of steps: [..., gates]."""
    # A GRU's reset gate multiplies the state's part with its bias. In other layers both biases are
    # added up first.
    bias = w.b_ih
    if kind != "GRU" and w.b_ih is not None and w.b_hh is not None:
        bias = w.b_ih + w.b_hh
    return nn.functional.linear(x, w.w_ih, bias)


def step(kind: str, gates: Tensor, state: State, w: Weights, drops: Drops) -> State:
    """The next state, from the inputs' part of the gates, [batch, gates], and the last state."""
    h = state[0]
    entering = drops.hidden(h)
    if kind == "LSTM":
        i, f, g, o = torch.addmm(gates, entering, w.w_hh.t()).chunk(4, dim=1)
        c = f.sigmoid() * state[1] + i.sigmoid() * drops.candidate(g.tanh())
        h = o.sigmoid() * c.tanh()
        if w.w_hr is not None:
            h = nn.functional.linear(h, w.w_hr)
        return h, c
    if kind == "GRU":
        r, z, n = gates.chunk(3, dim=1)
        hr, hz, hn = nn.functional.linear(entering, w.w_hh, w.b_hh).chunk(3, dim=1)
        z = (z + hz).sigmoid()
        n = drops.candidate((n + (r + hr).sigmoid() * hn).tanh())
        return (n + z * (h - n),)
    total = torch.addmm(gates, entering, w.w_hh.t())
    return (total.tanh() if kind == "RNN_TANH" else total.relu(),)


def scan(
    steps: Sequence[Tensor], first: State, advance: Callable[[Tensor, State], State], reverse: bool
) -> tuple[list[Tensor], State]:
    """The outputs of all steps, in their order, and the last state of every sequence.

    Each of ``steps`` is [batch, gates]. The sequences of a packed batch are sorted by length, the
    longest first, so each step has the first of them. Going forwards, sequences that end leave the
    state at its end; in reverse, they enter it there.
    """
    outputs = []
    ended: list[State] = []
    state = first
    if reverse:
        steps = steps[::-1]
        state = tuple(s[: len(steps[0])] for s in first)
    for gates in steps:
        now, before = len(gates), len(state[0])
        if now > before:
            state = tuple(torch.cat((s, f[before:now])) for s, f in zip(state, first, strict=True))
        elif now < before:
            ended.append(tuple(s[now:] for s in state))
            state = tuple(s[:now] for s in state)
        state = advance(gates, state)
        outputs.append(state[0])
    if ended:
        parts = zip(state, *ended[::-1], strict=True)
        state = tuple(torch.cat(part) for part in parts)
    return outputs[::-1] if reverse else outputs, state
