"""What is measured once per provider: whether it runs, memory, bytes, host time, launches."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..check.case import Inputs
from ..check.measure import saved_bytes
from ..saved import kept_by, storage_bytes
from .gate import first_line
from .machine import Machine
from .records import Probe
from .timing import BACKWARD, BOTH, FORWARD, Operands, Subject, results

WARM_UP = 3
HOST_CALLS = 20
HOST_SECONDS = 0.2


def warm(machine: Machine, subject: Subject) -> tuple[str, float]:
    """Warm a provider up, which includes compiling.

    Returns (why it cannot run, or "", the seconds of the last forward and backward).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with subject.context():
                for _ in range(WARM_UP):
                    machine.synchronize()
                    start = time.perf_counter()
                    subject.step(subject.rotation.sets[0])
                    machine.synchronize()
            return "", time.perf_counter() - start
        except Exception as error:  # a compiler or a kernel can raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
    if machine.cuda:
        torch.cuda.empty_cache()
    # torch explains in warnings why one of its attentions cannot run.
    said = dict.fromkeys(str(w.message).split(" (Triggered")[0].strip() for w in caught)
    return " ".join([reason, *said])[:300], 0.0


def moved_bytes(call: Callable[[Inputs], Any], operands: Operands) -> dict[str, int]:
    """The bytes that a row has to move in each mode, at least, whichever provider computes it.

    Forward: the inputs, the results, and what tridrop keeps for backward, once each. Backward: the
    incoming gradients, what was kept, and the gradients, once each. A gradient that shares the
    storage of an incoming one counts once.
    """
    found, kept = kept_by(lambda: call(operands.leaves))
    outs = results(found)
    forward = storage_bytes([*operands.leaves.values(), *outs, *kept])
    grads = [g for g in operands.backward(outs) if g is not None]
    backward = storage_bytes([*operands.grads(outs), *kept, *grads])
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def probe(
    machine: Machine, subject: Subject, main: str, modes: Sequence[str], host: Subject
) -> Probe:
    """Measure a provider that can run.

    ``host`` is the subject on whose calls the host time is measured. On a CPU it has a tiny size,
    since host and device time cannot be separated there.
    """
    operands = subject.rotation.sets[0]
    with subject.context():
        return Probe(
            saved_bytes(subject.call, operands.leaves, main),
            machine.peak_bytes(lambda: subject.step(operands)),
            {mode: _host(machine, host, mode) for mode in modes},
            {mode: machine.launches(subject.thunks(mode)[0]) for mode in modes},
        )


def _host(machine: Machine, subject: Subject, mode: str) -> float:
    with subject.context():
        for thunk in subject.thunks(mode)[:1]:
            thunk()  # warm: it may compile
        times: list[float] = []
        while len(times) < HOST_CALLS and sum(times) < HOST_SECONDS:
            times.append(machine.host_seconds(subject.thunks(mode)[0]))
    return statistics.median(times)
