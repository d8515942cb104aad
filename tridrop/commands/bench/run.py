"""Times the rows of the options, and gives the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from ..check.case import Case
from ..inspection import DTYPES
from . import packed, records
from .gate import Gate
from .machine import Machine
from .options import Options
from .providers import PACKED, PADDED, TRIDROP, Provider, of, tridrop_call
from .records import About, Record
from .rows import Row
from .timing import Rotation, Subject
from .turns import measure

SEED = 0


def run(
    options: Options,
    on_start: Callable[[int], None] | None = None,
    on_row: Callable[[str], None] | None = None,
    on_records: Callable[[Sequence[Record]], None] | None = None,
) -> list[Record]:
    """Time every row in every dtype.

    Args:
        options: from :meth:`Options.of`.
        on_start: called with the number of rows, in all dtypes.
        on_row: called before each row with its name.
        on_records: called after each row with all records so far.

    Raises:
        RuntimeError: there is no such device, or its backend is only for tests.
    """
    machine = Machine(options.device)
    gate = Gate(machine)
    found: list[Record] = []
    jobs = [job for dtype in options.dtypes for job in _jobs(machine, gate, options, dtype)]
    if on_start is not None:
        on_start(len(jobs))
    for what, job in jobs:
        if on_row is not None:
            on_row(what)
        found.extend(job())
        if on_records is not None:
            on_records(found)
        torch.compiler.reset()
        if machine.cuda:
            torch.cuda.empty_cache()
    return found


def _jobs(
    machine: Machine, gate: Gate, options: Options, dtype: str
) -> Iterator[tuple[str, Callable[[], list[Record]]]]:
    """The measurements to make in a dtype, each with its name."""
    for row in options.rows:
        run_row = _RowRun(machine, row, dtype, options)
        yield f"{row.label} {list(row.shape)} {dtype}", partial(run_row.records, gate)
    if not {PACKED, PADDED} <= set(options.providers):
        return
    kind, limits = (dtype, DTYPES[dtype]), (options.rounds, options.seconds)
    for longest, heads, width in options.packed:
        for causal in (False, True):
            sequences = packed.Sequences.of(longest, heads, width, causal, machine.device)
            job = partial(packed.run, machine, sequences, kind, options.modes, options.p, limits)
            yield f"{sequences.label} {dtype}", job


class _RowRun:
    """The measurement of a row in a dtype."""

    def __init__(self, machine: Machine, row: Row, dtype: str, options: Options) -> None:
        self.machine, self.row, self.dtype, self.options = machine, row, dtype, options
        # At p = 0 the op dropout does nothing that could be timed.
        self.rates = (options.p,) if row.op == "dropout" else (options.p, 0.0)

    def _inputs(self, case: Case) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        return case.inputs(DTYPES[self.dtype], self.machine.device, generator)

    def _subject(
        self, provider: Provider, p: float, rotation: Rotation, tiny: bool = False
    ) -> Subject:
        case = self.row.tiny(p) if tiny else self.row.sized(p)
        return Subject(provider.name, p, provider.make(case), rotation, provider.context)

    def records(self, gate: Gate) -> list[Record]:
        """Check the row, then time it."""
        options = self.options
        check = gate.verdict(self.row, DTYPES[self.dtype], options.p)
        sized = Rotation(self._inputs(self.row.sized(options.p)), self.machine.cache_bytes)
        tiny = Rotation(self._inputs(self.row.tiny(options.p)), 0)
        found = measure(
            self.machine,
            self._subjects(sized, tiny),
            self._subject(Provider(TRIDROP, tridrop_call), options.p, sized),
            self.row.case.main,
            options.modes,
            (options.rounds, options.seconds),
        )
        about = self._about(found.moved, check)
        return records.make(about, options.modes, found.samples, found.probes, found.reasons)

    def _subjects(self, sized: Rotation, tiny: Rotation) -> Iterator[tuple[Subject, Subject]]:
        """The chosen providers at both rates, each with the subject that gives its host time."""
        for provider in of(self.row.sized(self.options.p)):
            if provider.name in self.options.providers:
                for p in self.rates:
                    host = subject = self._subject(provider, p, sized)
                    if not self.machine.cuda:
                        # On a CPU it can be separated from device time only at a tiny size.
                        host = self._subject(provider, p, tiny, tiny=True)
                    yield subject, host

    def _about(self, moved: Mapping[str, int], check: str) -> About:
        row = self.row
        return About(
            row.op, row.label, row.shape, self.dtype, self.machine.name, moved, row.flops, check,
            frozenset({TRIDROP}),
        )  # fmt: skip
