"""Run pieces one after the other within a budget, and kill those that exceed their limit."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .pieces import BENCHMARKS, HEADLINE, HEADLINE_SECONDS, RIGHT, RIGHT_SECONDS, ROOT, Piece

GRACE = 10.0  # seconds between asking a piece to end and killing it
PACKING = 5.0  # seconds of the budget, for the work after the last piece
PASSED, FAILED, CUT, SKIPPED, NO_TIME = "passed", "failed", "time limit", "skipped", "no time left"
RUNNING, STOPPED = "running", "interrupted"
PART_SECONDS = {RIGHT: RIGHT_SECONDS, HEADLINE: HEADLINE_SECONDS}
Found = dict[str, Any]


class Budget:
    """The seconds left for the run, and for each part that has its own share."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds - PACKING
        self._parts = dict(PART_SECONDS)

    def left(self, part: str) -> float:
        """Seconds that a piece of this part may still take."""
        return min(self._end - self._clock(), self._parts.get(part, float("inf")))

    def spend(self, part: str, seconds: float) -> None:
        """Subtract the seconds of a piece from the share of its part."""
        if part in self._parts:
            self._parts[part] -= seconds


def planned(pieces: Sequence[Piece], seconds: float) -> list[Piece]:
    """The pieces that fit by their estimates, in order; one that does not fit is left out.

    This is the plan of a run in which every estimate holds. A real run decides before each piece,
    so pieces that end early make room for more.
    """
    now = 0.0
    budget = Budget(seconds, lambda: now)
    found = []
    for piece in pieces:
        if piece.estimate_s <= budget.left(piece.part):
            found.append(piece)
            now += piece.estimate_s
            budget.spend(piece.part, piece.estimate_s)
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all processes that it started, which share its group."""
    for how, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def environment(cache: Path) -> dict[str, str]:
    """The environment of the pieces: this clone, compiled kernels, and one cache of Triton's."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(BENCHMARKS), *filter(None, [found.get("PYTHONPATH")])]
    return found | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(cache),
    }


def run(piece: Piece, out: Path, cache: Path, limit: float) -> Found:
    """Run one piece with a limit; its entry in the summary."""
    about: Found = {"piece": piece.name, "part": piece.part, "command": shlex.join(piece.command)}
    about |= {"estimate_s": piece.estimate_s, "limit_s": round(limit, 1)}
    about |= {"left_out": dict(piece.left_out)}
    if piece.why_not is not None:
        return about | {"outcome": SKIPPED, "why": piece.why_not}
    folder = out / piece.name
    folder.mkdir(parents=True, exist_ok=True)
    log, start, interrupted = folder / "log.txt", time.monotonic(), False
    with log.open("wb") as file:
        process = subprocess.Popen(
            piece.command, cwd=ROOT, env=environment(cache), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        cut = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
        except KeyboardInterrupt:
            interrupted = True
        finally:
            end(process)  # this also ends processes that the piece left behind
    about |= {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1)}
    about |= counted(folder)
    if interrupted:
        return about | {"outcome": STOPPED, "why": "the run was asked to end"}
    if cut:
        return about | {"outcome": CUT, "why": f"killed after {limit:.0f} s"}
    return about | judged(piece, process.returncode, folder)


def judged(piece: Piece, status: int, folder: Path) -> dict[str, str]:
    """The outcome of a piece that ended, by its exit status and what it wrote."""
    files = (folder / name for name in ("log.txt", "ncu.csv"))
    text = "\n".join(f.read_text(errors="replace") for f in files if f.exists())
    proven = piece.proof is None or re.search(piece.proof, text) is not None
    if status == 0 and proven:
        return {"outcome": PASSED}
    for pattern, reason in piece.refusals.items():
        if re.search(pattern, text):
            return {"outcome": SKIPPED, "why": reason}
    if status == 0:
        return {"outcome": FAILED, "why": f"nothing in its output matches {piece.proof!r}"}
    return {"outcome": FAILED, "why": f"exit status {status}"}


# A line of `pytest -v`, without or with workers.
_LINE = re.compile(
    r"(?:(PASSED|FAILED|ERROR|SKIPPED) (\S+\.py::.*)|"
    r"^(\S+\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED))"
)


def counted(folder: Path) -> dict[str, Any]:
    """How many tests ran, failed and were skipped, and the names of those that failed.

    The counts are those of the JUnit file, or of the log if a killed run wrote no such file.
    """
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_LINE.search, lines)):
        outcome, test = match[1] or match[4], match[2] or match[3]
        found.setdefault(outcome, set()).add(test.partition(" - ")[0].strip())
    bad = sorted(found.get("FAILED", set()) | found.get("ERROR", set()))
    named = {"failed_tests": bad} if bad else {}
    junit = folder / "tests.xml"
    if junit.exists():
        suites = list(ElementTree.parse(junit).iter("testsuite"))
        names = ("tests", "failures", "errors", "skipped")
        return named | {"counts": {n: sum(int(suite.get(n, 0)) for suite in suites) for n in names}}
    if not found:
        return named
    counts = Counter({name: len(tests) for name, tests in found.items()})
    return named | {
        "counts": {
            "tests": sum(counts.values()), "failures": counts["FAILED"],
            "errors": counts["ERROR"], "skipped": counts["SKIPPED"],
        }
    }  # fmt: skip


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C inside, so that the results so far are packed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(
    pieces: Sequence[Piece],
    out: Path,
    cache: Path,
    budget: Budget,
    earlier: Mapping[str, str],
    save: Callable[[list[Found]], None],
) -> int:
    """Run what fits, in order; 1 if a piece failed, was killed or was interrupted, else 0.

    Args:
        pieces: in the order of their value.
        out: the folder of this run.
        cache: the folder of Triton's cache.
        budget: how long all may take.
        earlier: pieces that need not run again, each with the run in which it passed.
        save: called with the results so far, before and after each piece.
    """
    found: list[Found] = []
    with interruptible():
        for piece in pieces:
            about: Found = {"piece": piece.name, "part": piece.part}
            left = budget.left(piece.part)
            if piece.name in earlier:
                why = f"passed in the run of {earlier[piece.name]}"
                found.append(about | {"outcome": SKIPPED, "why": why})
            elif piece.why_not is None and piece.estimate_s > left:
                why = f"{piece.estimate_s:.0f} s expected, {max(left, 0):.0f} s left"
                found.append(about | {"outcome": NO_TIME, "why": why})
            else:
                try:
                    save([*found, about | {"outcome": RUNNING}])
                    print(f"{piece.name} ...", flush=True)
                    result = run(piece, out, cache, min(piece.limit_s, left))
                except KeyboardInterrupt:
                    result = about | {"outcome": STOPPED, "why": "the run was asked to end"}
                found.append(result)
                budget.spend(piece.part, result.get("seconds", 0.0))
                print(line(result), flush=True)
            if found[-1]["outcome"] == STOPPED:
                break
        save(found)
    return int(any(result["outcome"] in (FAILED, CUT, STOPPED) for result in found))


def line(result: Found) -> str:
    """The outcome of a piece, for the terminal."""
    parts = [
        result["outcome"], f"{result['seconds']} s" if "seconds" in result else "",
        result.get("why", ""), str(result.get("counts", "")),
        *(f"without {part}: {why}" for part, why in result.get("left_out", {}).items()),
        *(f"failed: {test}" for test in result.get("failed_tests", [])[:20]),
    ]  # fmt: skip
    return f"{result['piece']}: {', '.join(filter(None, parts))}"
