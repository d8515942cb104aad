"""Many calls in one process, which may crash: what was last begun is on its standard output."""

from __future__ import annotations

import faulthandler
import io
import json
import random
import sys
import time
from typing import Any

import torch

from . import values
from .calls import Call
from .outcomes import Outcome, difference, disagreement, refused
from .targets import Target, targets

SLOW = 10.0  # seconds; a wrong call that compiles anew takes longer than any that does not


_output = sys.stdout  # what the calls themselves print goes elsewhere


def say(**record: Any) -> None:
    print(json.dumps(record), file=_output, flush=True)


def pick(names: list[str], seed: int, number: int) -> str:
    """The target of a call."""
    return random.Random(f"{seed}:{number}").choice(names)


def right_calls(found: dict[str, Target], seed: int) -> list[tuple[str, Outcome]]:
    """What right calls of every target give, by the loops."""
    made = []
    for target in found.values():
        for number in range(2):
            call = Call(target, seed, -1 - number, oddities=0)
            made.append((f"{call.key}", call.run("cpu")))
    return made


def changed(before: list[tuple[str, Outcome]], after: list[tuple[str, Outcome]]) -> list[str]:
    """What right calls no longer give, to the bit."""
    found = []
    for (name, a), (_, b) in zip(before, after, strict=True):
        if (a.kind, a.error) != (b.kind, b.error):
            found.append(f"{name}: {a.kind} {a.error}, then {b.kind} {b.error}")
        elif any(_differ(x, y) for x, y in zip(a.results, b.results, strict=True)):
            found.append(f"{name}: other numbers than before")
    return found


def _differ(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or a.is_meta:
        return False
    return difference(a, b) is not None or not torch.equal(a.nan_to_num(), b.nan_to_num())


def run(seed: int, numbers: range, only: str | None, against: str) -> None:
    """Make the calls of ``numbers``, one record a call, by the loops and by another way."""
    faulthandler.enable()
    sys.stdout = io.StringIO()
    torch.set_num_threads(1)
    if against == "triton":
        from .. import quick_interpreter  # noqa: F401
    found = targets()
    if only is not None:
        found = {only: found[only]}
    names = sorted(found)
    for change in values.WRONG.values():  # torch imports much at its first nested tensor
        change(torch.ones(2, 2))
    before = right_calls(found, seed)
    for number in numbers:
        say(begun=number)
        call = Call(found[pick(names, seed, number)], seed, number)
        start = time.thread_time()
        first = call.run("cpu")
        taken = time.thread_time() - start
        what = call.what
        kind, detail = first.kind, first.error
        # Triton's interpreter multiplies and rounds bfloat16 in another way than its compiler.
        second = first if against == "triton" and call.narrow else call.run(against)
        apart = disagreement(first, second, against)
        if apart is not None and call.is_attention and second.kind == "ok":
            torchs = call.run("torch")
            if torchs.kind == "ok" and disagreement(first, torchs) is None:
                apart = "as torch's attention", apart[1]
        if apart is not None:
            kind, detail = apart
        elif (
            second.kind == "another error of ours"
            and kind != "as torch's module"
            and not refused(second)
        ):
            kind, detail = second.kind, second.error
        elif taken > SLOW:
            kind, detail = "slow", f"{taken:.0f} s"
        say(number=number, op=call.target.name, kind=kind, what=what, detail=detail)
    for line in changed(before, right_calls(found, seed)):
        say(poisoned=line)
    say(done=True)
