"""Compares tridrop's attention on packed sequences and on the same ones padded to the longest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import functional
from ..check.case import Inputs
from ..check.measure import error, tolerance
from . import records
from .gate import PASSED, first_line
from .machine import Machine
from .providers import PACKED, PADDED
from .records import About, Record
from .rows import ATTENTION
from .timing import Rotation, Subject
from .turns import measure

SEQUENCES = 16
Call = Callable[[Inputs, int | None, float], Tensor]
SEED = 0


@dataclass(frozen=True)
class Sequences:
    """Sequences of different lengths; their tensors can be packed or padded."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    causal: bool
    device: str

    @staticmethod
    def of(longest: int, heads: int, width: int, causal: bool, device: str) -> Sequences:
        """Random lengths, from a sixteenth of ``longest`` on; the same in every run."""
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randint(max(1, longest // 16), longest + 1, (SEQUENCES,), generator=generator)
        return Sequences(tuple(drawn.tolist()), heads, width, causal, device)

    @property
    def label(self) -> str:
        """The name of the row."""
        kind = "causal" if self.causal else "plain"
        return f"{ATTENTION}: {kind}, {len(self.lengths)} packed sequences"

    @property
    def flops(self) -> float:
        """Of the forward, without the padding."""
        scores = sum(n**2 for n in self.lengths)
        return 4.0 * self.heads * scores * self.width * (0.5 if self.causal else 1.0)

    def packed_inputs(self, dtype: torch.dtype) -> Inputs:
        """Normal query, key and value, [1, H, tokens, D]."""
        shape = (1, self.heads, sum(self.lengths), self.width)
        return {n: torch.randn(shape, dtype=dtype, device=self.device) for n in "qkv"}

    def padded_inputs(self, packed: Inputs) -> Inputs:
        """The same tensors as [B, H, longest, D], with random numbers as the padding."""
        shape = (len(self.lengths), self.heads, max(self.lengths), self.width)
        return {
            name: self.pad(t, torch.randn_like(t.new_empty(shape))) for name, t in packed.items()
        }

    def pad(self, packed: Tensor, padded: Tensor) -> Tensor:
        """Copy the sequences of [1, H, tokens, D] to the beginnings of [B, H, longest, D]."""
        parts = packed[0].split(list(self.lengths), 1)
        for place, part in zip(padded, parts, strict=True):
            place[:, : part.shape[1]] = part
        return padded

    def calls(self) -> dict[str, Call]:
        """(inputs, seed, p) -> result, for both forms; their masks are on the device."""
        ends = [0, *itertools.accumulate(self.lengths)]
        offsets = torch.tensor(ends, dtype=torch.int32, device=self.device)
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]
        present = torch.arange(max(self.lengths), device=self.device) < lengths
        longest = max(self.lengths)

        def packed(i: Inputs, seed: int | None, p: float) -> Tensor:
            out = functional.scaled_dot_product_attention(
                i["q"], i["k"], i["v"], None, p, self.causal, cu_seqlens_q=offsets,
                cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, seed=seed,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        def padded(i: Inputs, seed: int | None, p: float) -> Tensor:
            out = functional.scaled_dot_product_attention(
                i["q"], i["k"], i["v"], None, p, self.causal, key_mask=present, seed=seed
            )
            assert isinstance(out, Tensor)
            return out

        return {PACKED: packed, PADDED: padded}


def verdict(sequences: Sequences, packed: Inputs, p: float) -> str:
    """ "passed" if packed and padded sequences give the same, since they have the same mask."""
    calls = sequences.calls()
    try:
        # As in Gate, an exception of a broken kernel counts as a failed check.
        padded = calls[PADDED](sequences.padded_inputs(packed), SEED, p)
        # The results of padding are meaningless: take those of the padded form for both.
        found = sequences.pad(calls[PACKED](packed, SEED, p), padded.clone())
    except Exception as raised:
        return f"raised {type(raised).__name__}: {first_line(raised)}"
    wrong, allowed = error(found, padded), tolerance(padded, padded.double())
    # Both round once, but in different places.
    return PASSED if wrong <= 4 * allowed else f"failed value: {wrong:.3g} > {4 * allowed:.3g}"


def run(
    machine: Machine,
    sequences: Sequences,
    dtype: tuple[str, torch.dtype],
    modes: Sequence[str],
    p: float,
    limits: tuple[int, float],
) -> list[Record]:
    """The records of both forms.

    Args:
        machine: times the calls.
        sequences: the sequences of self-attention.
        dtype: its name, and the dtype.
        modes: some of "forward", "backward" and "both".
        p: the probability of dropping; 0 is timed as well.
        limits: the number of rounds, and the seconds they may take.
    """
    torch.manual_seed(SEED)
    first = sequences.packed_inputs(dtype[1])
    check = verdict(sequences, first, p)
    rotations = {
        PACKED: Rotation(first, machine.cache_bytes),
        PADDED: Rotation(sequences.padded_inputs(first), machine.cache_bytes),
    }
    calls = sequences.calls()

    def subject(name: str, rate: float) -> Subject:
        return Subject(name, rate, lambda i: calls[name](i, None, rate), rotations[name])

    # Host time is measured on the calls themselves, also on a CPU: they have no tiny form.
    subjects = [subject(name, rate) for name in calls for rate in (p, 0.0)]
    found = measure(machine, [(s, s) for s in subjects], subjects[0], "q", modes, limits)
    about = About(
        ATTENTION, sequences.label, (1, sequences.heads, sum(sequences.lengths), sequences.width),
        dtype[0], machine.name, found.moved, sequences.flops, check, frozenset(calls),
    )  # fmt: skip
    return records.make(about, modes, found.samples, found.probes, found.reasons)
