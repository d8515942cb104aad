"""What all rows have in common: warms subjects up, measures each once, times them in rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import probes
from .machine import Machine
from .records import Probe
from .timing import Copy, Key, Subject, Timed, rounds


@dataclass(frozen=True)
class Findings:
    """The measurements of a row."""

    samples: Mapping[Key, Sequence[float]]
    probes: Mapping[tuple[str, float], Probe]
    reasons: Mapping[tuple[str, float], str]
    """why subjects cannot run"""
    moved: Mapping[str, int]
    """bytes in each mode, counted on tridrop's calls; empty if those cannot run"""


def measure(
    machine: Machine,
    subjects: Iterable[tuple[Subject, Subject]],
    ours: Subject,
    main: str,
    modes: Sequence[str],
    limits: tuple[int, float],
) -> Findings:
    """Time subjects in turns, together with a device copy of as many bytes.

    Args:
        machine: times the calls.
        subjects: each with the subject on whose calls its host time is measured.
        ours: tridrop's subject, on which the bytes are counted.
        main: the operand that is no parameter even if it is a vector.
        modes: some of "forward", "backward" and "both".
        limits: the number of rounds, and the seconds they may take.
    """
    running: list[Timed] = []
    found: dict[tuple[str, float], Probe] = {}
    reasons: dict[tuple[str, float], str] = {}
    for subject, host in subjects:
        who = (subject.provider, subject.p)
        reason, seconds = probes.warm(machine, subject)
        if reason:
            reasons[who] = reason
            continue
        found[who] = probes.probe(machine, subject, main, modes, host)
        running.append(subject.lasting(seconds))
    moved: dict[str, int] = {}
    if not probes.warm(machine, ours)[0]:
        moved = probes.moved_bytes(ours.call, ours.rotation.sets[0])
        running.append(Copy(moved, machine.device, machine.cache_bytes))
    seconds_of = {(*who, mode): s for who, p in found.items() for mode, s in p.host.items()}
    samples = rounds(machine, running, modes, limits[0], seconds_of, limits[1])
    return Findings(samples, found, reasons, moved)
