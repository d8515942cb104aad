"""``python -m tests.abuse --calls 60000 [--seed 1] [--op NAME] [--only 123] [--against triton]``"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .outcomes import KINDS

_PATIENCE = 120.0  # seconds for one call: two compilations
_BATCH = 2000  # calls a process


class Found:
    """The outcomes of a run."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.counts: Counter[str] = Counter()
        self.by_op: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        self.counts[kind] += 1
        self.by_op[record["op"]][kind] += 1
        if KINDS[kind]:
            self.faults.append(record)
            if len(self.faults) <= self.examples:
                print(f"{kind}: number {record['number']}: {record['what']}", flush=True)
                print(f"    {record['detail']}", flush=True)


def child(
    seed: int, first: int, last: int, op: str | None, against: str, found: Found, verbose: bool
) -> int:
    """Run calls in a process; the number of the next call, which is past one that crashed."""
    command = [sys.executable, "-m", __package__, "--child", "--seed", str(seed)]
    command += ["--first", str(first), "--calls", str(last - first)]
    command += [] if op is None else ["--op", op]
    command += ["--against", against]
    root = Path(__file__).parents[__package__.count(".") + 1]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    if against == "triton":
        environment["TRITON_INTERPRET"] = "1"
    paths = [str(root), str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    selector = selectors.DefaultSelector()
    for stream in (process.stdout, process.stderr):
        os.set_blocking(stream.fileno(), False)
        selector.register(stream, selectors.EVENT_READ)
    begun, done, rest, errors, heard = first - 1, False, b"", b"", time.monotonic()
    while selector.get_map():
        for key, _ in selector.select(1.0):
            data = os.read(key.fd, 1 << 16)
            if not data:
                selector.unregister(key.fileobj)
            elif key.fileobj is process.stderr:
                errors = (errors + data)[-8000:]
            else:
                heard = time.monotonic()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    record = json.loads(line)
                    begun = record.get("begun", begun)
                    done = done or "done" in record
                    if "poisoned" in record:
                        kind, what = "a right call differs afterwards", record["poisoned"]
                        found.add(
                            {"number": last, "op": "", "kind": kind, "what": what, "detail": ""}
                        )
                    if "kind" in record:
                        found.add(record)
                        if verbose:
                            print(line.decode(), flush=True)
        if time.monotonic() - heard > _PATIENCE:
            process.kill()
            break
    code = process.wait()
    if done:
        return last
    kind = "hang" if time.monotonic() - heard > _PATIENCE else "crash"
    detail = f"exit code {code}: " + errors.decode(errors="replace")[-1500:]
    found.add({"number": begun, "op": "", "kind": kind, "what": f"call {begun}", "detail": detail})
    return max(begun, first) + 1


def table(found: Found) -> str:
    """Outcomes a row, and for ops with faults their counts."""
    width = max(map(len, KINDS))
    lines = [f"{'outcome':{width}}  {'calls':>7}"]
    lines += [f"{kind:{width}}  {found.counts[kind]:7d}" for kind in KINDS]
    lines += [f"{'all':{width}}  {sum(found.counts.values()):7d}"]
    for op, counts in sorted(found.by_op.items()):
        bad = {kind: n for kind, n in counts.items() if KINDS[kind]}
        if bad:
            lines.append(f"  {op or '-'}: " + ", ".join(f"{n} x {kind}" for kind, n in bad.items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.abuse", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--op", help="one public name; all by default")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--only", type=int, help="one call, by its number, in this process")
    parser.add_argument("--examples", type=int, default=40, help="faults to print")
    parser.add_argument(
        "--against",
        choices=("reference", "triton"),
        default="reference",
        help="what the compiled loops are compared with; Triton runs in its interpreter",
    )
    parser.add_argument("--verbose", action="store_true", help="print each call")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child or given.only is not None:
        from .child import run

        first = given.first if given.only is None else given.only
        count = given.calls if given.only is None else 1
        run(given.seed, range(first, first + count), given.op, given.against)
        return 0
    found, number, last = Found(given.examples), given.first, given.first + given.calls
    while number < last:
        batch = min(last, number + _BATCH)
        number = child(given.seed, number, batch, given.op, given.against, found, given.verbose)
        if given.calls > _BATCH:
            print(f"{number - given.first} calls, {len(found.faults)} faults", flush=True)
    print(table(found))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
