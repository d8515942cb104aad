"""Subjects warmed up, measured once and timed in rounds: what all rows have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import probes
from .machine import Machine
from .records import Probe
from .timing import Copy, Key, Subject, Timed, rounds


@dataclass(frozen=True)
class Findings:
    """What was measured of a row."""

    samples: Mapping[Key, Sequence[float]]
    probes: Mapping[tuple[str, float], Probe]
    reasons: Mapping[tuple[str, float], str]
    """of those that cannot run"""
    moved: Mapping[str, int]
    """bytes by mode; empty where tridrop, by which they are counted, cannot run"""


def measure(
    machine: Machine,
    subjects: Iterable[tuple[Subject, Subject]],
    ours: Subject,
    main: str,
    modes: Sequence[str],
    limits: tuple[int, float],
) -> Findings:
    """Time subjects in turn, beside a device copy of as many bytes.

    Args:
        machine: the stopwatch.
        subjects: each with the one whose calls tell its host time.
        ours: tridrop's, by which bytes are counted.
        main: the operand that is no parameter even if it is a vector.
        modes: of "forward", "backward" and "both".
        limits: rounds, and the seconds they may take.
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
