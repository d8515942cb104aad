"""Rows of variational dropout for sequences, and of dropout of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from ... import functional
from .case import Case, Drop, Inputs
from .family_cases import one_tensor
from .invariants import Found, Invariant, Trial, uneven, z_of_mean


def _vocabulary(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _lookup(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
    """All words of the vocabulary, one per row."""
    x = inputs["x"]
    return functional.embedding_dropout(_vocabulary(x), x, p, training, seed=seed)


def _lookup_eager(inputs: Inputs, drop: Drop) -> Tensor:
    x = inputs["x"]
    return torch.nn.functional.embedding(_vocabulary(x), drop("elements", x))


CASES: Sequence[Case] = (
    one_tensor("locked_dropout", (7, 5, 12), (1, None, None)),
    one_tensor("embedding_dropout", (60, 11), (None, 1), call=_lookup, eager=_lookup_eager),
)


def _steps(batch_first: bool) -> Invariant:
    """A feature of a sample is dropped at all steps or at none, at its rate."""
    p, time = 0.3, 1 if batch_first else 0

    def measure(trial: Trial) -> Iterator[Found]:
        x = trial.ones(6, 8, 16)
        kept = [
            functional.locked_dropout(x, p, batch_first=batch_first, seed=seed) > 0
            for seed in range(trial.seeds)
        ]
        yield Found("shared", float(sum(uneven(k, (time,)) for k in kept)), 0.0)
        yield Found("rate |z|", *z_of_mean([k.select(time, 0).double() for k in kept], 1 - p))

    layout = "batch first" if batch_first else "time first"
    return Invariant(f"locked_dropout: all steps, {layout}", "locked_dropout", measure)


def _packed() -> Invariant:
    """A packed sequence has the same mask as in a padded batch, at its rate."""
    p = 0.3
    lengths = torch.tensor([2, 6, 1, 6, 3])

    def measure(trial: Trial) -> Iterator[Found]:
        x = pack_padded_sequence(trial.ones(6, 5, 40), lengths, enforce_sorted=False)
        rates, differing = [], 0
        for seed in range(trial.seeds):
            out = functional.locked_dropout(x, p, seed=seed)
            padded = functional.locked_dropout(trial.ones(6, 5, 40), p, seed=seed)
            expected = pack_padded_sequence(padded, lengths, enforce_sorted=False)
            differing += int((out.data != expected.data).sum())
            rates.append((padded[0] > 0).double())
        yield Found("shared", float(differing), 0.0)
        yield Found("rate |z|", *z_of_mean(rates, 1 - p))

    return Invariant("locked_dropout: packed as padded", "locked_dropout", measure)


def _words() -> Invariant:
    """A word is dropped at all its occurrences or at none, at its rate."""
    p, words = 0.2, 50

    def measure(trial: Trial) -> Iterator[Found]:
        weight = trial.ones(words, 6)
        text = torch.arange(4 * words, device=trial.device).view(4, words) % words
        outs = [
            functional.embedding_dropout(text, weight, p, seed=seed) for seed in range(trial.seeds)
        ]
        kept = [out > 0 for out in outs]
        yield Found("shared", float(sum(uneven(k, (0, 2)) for k in kept)), 0.0)
        yield Found("rate |z|", *z_of_mean([k[0, :, 0].double() for k in kept], 1 - p))

    return Invariant("embedding_dropout: whole words", "embedding_dropout", measure)


def _tokens() -> Invariant:
    """Words are replaced at their rate, exempt words never."""
    p = 0.2

    def measure(trial: Trial) -> Iterator[Found]:
        text = torch.arange(1000, device=trial.device).view(20, 50) % 10
        outs = [
            functional.word_dropout(text, p, token=10, exempt=[0], seed=seed)
            for seed in range(trial.seeds)
        ]
        yield Found("exempt", float(sum(int((out[text == 0] != 0).sum()) for out in outs)), 0.0)
        free = text != 0
        yield Found("rate |z|", *z_of_mean([(out == 10)[free].double() for out in outs], p))

    return Invariant("word_dropout: tokens", "word_dropout", measure)


INVARIANTS: Sequence[Invariant] = (_steps(False), _steps(True), _packed(), _words(), _tokens())
