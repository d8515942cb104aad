"""From options to records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..check.cases import Case
from ..inspection import DTYPES
from . import probes, records
from .gate import Gate
from .machine import Machine
from .options import Options
from .providers import TRIDROP, Provider, of
from .records import About, Probe, Record
from .rows import Row
from .timing import Copy, Rotation, Subject, Timed, rounds

SEED = 0


def run(
    options: Options,
    on_start: Callable[[int], None] | None = None,
    on_row: Callable[[str], None] | None = None,
    on_records: Callable[[Sequence[Record]], None] | None = None,
) -> list[Record]:
    """Time every row in every dtype.

    Args:
        options: of :meth:`Options.of`.
        on_start: called with the number of rows times dtypes.
        on_row: called before each of them with what it is.
        on_records: called after each of them with all records until then.

    Raises:
        RuntimeError: there is no such device, or its backend is one for tests.
    """
    machine = Machine(options.device)
    gate = Gate(machine)
    found: list[Record] = []
    if on_start is not None:
        on_start(len(options.rows) * len(options.dtypes))
    for dtype in options.dtypes:
        for row in options.rows:
            if on_row is not None:
                on_row(f"{row.label} {list(row.shape)} {dtype}")
            found.extend(_RowRun(machine, row, dtype, options).records(gate))
            if on_records is not None:
                on_records(found)
            torch._dynamo.reset()
            if machine.cuda:
                torch.cuda.empty_cache()
    return found


class _RowRun:
    """A row in a dtype: what takes turns, what cannot, and what is measured of each."""

    def __init__(self, machine: Machine, row: Row, dtype: str, options: Options) -> None:
        self.machine, self.row, self.dtype, self.options = machine, row, dtype, options
        first = self._inputs(row.sized(options.p))
        self.rotation = Rotation(first, machine.cache_bytes)
        self.small = Rotation(self._inputs(row.tiny(options.p)), 0)
        # Nothing is left of dropout itself at p = 0.
        self.rates = (options.p,) if row.op == "dropout" else (options.p, 0.0)

    def _inputs(self, case: Case) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        return case.inputs(DTYPES[self.dtype], self.machine.device, generator)

    def _subject(self, provider: Provider, p: float, tiny: bool = False) -> Subject:
        case = self.row.tiny(p) if tiny else self.row.sized(p)
        rotation = self.small if tiny else self.rotation
        return Subject(provider.name, p, provider.make(case), rotation, provider.context)

    def records(self, gate: Gate) -> list[Record]:
        """Check, warm up, measure once, then time in rounds."""
        options, machine = self.options, self.machine
        check = gate.verdict(self.row, DTYPES[self.dtype], options.p)
        subjects: list[Timed] = []
        measured: dict[tuple[str, float], Probe] = {}
        reasons: dict[tuple[str, float], str] = {}
        chosen = [p for p in of(self.row.sized(options.p)) if p.name in options.providers]
        for provider in chosen:
            for p in self.rates:
                subject = self._subject(provider, p)
                reason, seconds = probes.warm(machine, subject)
                if reason:
                    reasons[provider.name, p] = reason
                    continue
                host = subject if machine.cuda else self._subject(provider, p, tiny=True)
                main = self.row.case.main
                measured[provider.name, p] = probes.probe(
                    machine, subject, main, options.modes, host
                )
                subjects.append(subject.lasting(seconds))
        moved = self._moved()
        subjects.append(Copy(moved, machine.device, machine.cache_bytes))
        samples = rounds(
            machine, subjects, options.modes, options.rounds, _host(measured), options.seconds
        )
        return records.make(self._about(moved, check), options.modes, samples, measured, reasons)

    def _moved(self) -> dict[str, int]:
        case = self.row.sized(self.options.p)
        return probes.moved_bytes(
            lambda inputs: case.call(inputs, None, case.p, True), self.rotation.sets[0]
        )

    def _about(self, moved: dict[str, int], check: str) -> About:
        row = self.row
        return About(
            row.op, row.label, row.shape, self.dtype, self.machine.name, moved, row.flops, check,
            frozenset({TRIDROP}),
        )  # fmt: skip


def _host(measured: dict[tuple[str, float], Probe]) -> dict[tuple[str, float, str], float]:
    found = {
        (*who, mode): seconds
        for who, probe in measured.items()
        for mode, seconds in probe.host.items()
    }
    return found
