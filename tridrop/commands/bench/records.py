"""A record: the time of a provider for a row in one mode, and the figures derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .providers import COMPILED, EAGER
from .timing import BACKWARD, BOTH, COPY, FORWARD, Key, quantiles

# FLOPs of each mode, relative to the forward. This is the convention of the FlashAttention papers,
# whatever a kernel really computes.
WORK = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}


@dataclass(frozen=True)
class About:
    """What the records of a row have in common.

    ``moved`` has the bytes of each mode, ``flops`` the FLOPs of the forward.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    moved: Mapping[str, int]
    flops: float
    check: str
    """ "passed", or what failed; then tridrop gets no speed-up"""
    ours: frozenset[str]
    """the providers that were checked"""


@dataclass(frozen=True)
class Probe:
    """What is measured once per provider: memory, and host time and launches in each mode."""

    saved_bytes: int
    peak_bytes: int | None
    host: Mapping[str, float] = field(default_factory=dict)
    launches: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One row of the results; docs/performance.md explains the fields."""

    op: str
    case: str
    shape: str
    dtype: str
    mode: str
    provider: str
    p: float
    device: str
    check: str
    rounds: int = 0
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    copy_fraction: float | None = None
    tflops: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    host_us: float | None = None
    launches: int | None = None
    speedup_over_eager: float | None = None
    speedup_over_compile: float | None = None
    dropout_cost: float | None = None
    why_not: str = ""


def digits(x: float) -> float:
    """Round to five significant digits; more would be noise."""
    return float(f"{x:.5g}")


def make(
    about: About,
    modes: Sequence[str],
    samples: Mapping[Key, Sequence[float]],
    probes: Mapping[tuple[str, float], Probe],
    reasons: Mapping[tuple[str, float], str],
) -> list[Record]:
    """The records of a row, for providers that were timed and for those that could not run."""
    medians = {key: quantiles(seconds)[0] for key, seconds in samples.items()}
    found = [_record(about, key, samples[key], medians, probes.get(key[:2])) for key in samples]
    found += [
        Record(*_common(about, (provider, p, mode)), why_not=reason)
        for (provider, p), reason in reasons.items()
        for mode in modes
    ]
    return found


def _common(about: About, key: Key) -> tuple[str, str, str, str, str, str, float, str, str]:
    provider, p, mode = key
    shape = "x".join(map(str, about.shape))
    check = about.check if provider in about.ours else ""
    return about.op, about.case, shape, about.dtype, mode, provider, p, about.device, check


def _record(
    about: About,
    key: Key,
    samples: Sequence[float],
    medians: Mapping[Key, float],
    probe: Probe | None,
) -> Record:
    provider, p, mode = key
    median, low, high = quantiles(samples)
    moved = about.moved.get(mode)
    copy = medians.get((COPY, 0.0, mode))
    free = medians.get((provider, 0.0, mode))
    trusted = provider not in about.ours or about.check == "passed"

    def speedup(other: str) -> float | None:
        base = medians.get((other, p, mode))
        if base is None or provider in (other, COPY) or not trusted:
            return None
        return digits(base / median)

    host = probe.host.get(mode) if probe else None
    return Record(
        *_common(about, key),
        rounds=len(samples),
        median_ms=digits(median * 1e3),
        q20_ms=digits(low * 1e3),
        q80_ms=digits(high * 1e3),
        bytes=moved,
        gb_per_s=digits(moved / median / 1e9) if moved else None,
        copy_gb_per_s=digits(moved / copy / 1e9) if moved and copy else None,
        copy_fraction=digits(copy / median) if copy else None,
        tflops=digits(WORK[mode] * about.flops / median / 1e12)
        if _multiplies(about, key)
        else None,
        peak_bytes=probe.peak_bytes if probe else None,
        saved_bytes=probe.saved_bytes if probe else None,
        host_us=digits(host * 1e6) if host is not None else None,
        launches=probe.launches.get(mode) if probe else None,
        speedup_over_eager=speedup(EAGER),
        speedup_over_compile=speedup(COMPILED),
        dropout_cost=digits(median / free - 1) if free and p else None,
    )


def _multiplies(about: About, key: Key) -> bool:
    return bool(about.flops) and key[0] != COPY
