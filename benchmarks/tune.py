"""Try launch settings near the present ones: on a GPU by time, without one by machine code.

    python benchmarks/tune.py                              every family and size in bf16 (an hour)
    python benchmarks/tune.py --family norm_forward        one family (minutes)
    python benchmarks/tune.py --static --arch sm_90        compile only; needs no GPU
    python benchmarks/tune.py --list                       list families and numbers of candidates

Each candidate replaces the result of the pure function in tridrop/backends/triton that decides the
setting, and runs through the public op. On a GPU its results are first compared with those of the
present setting: masks decision by decision, values within rounding. Then the candidates run in turn
in each round, so that a slow moment of the machine affects all of them; the figure is the median.
Caches are overwritten before every run, and the device is kept busy while the host launches, so
that host time does not count.

With --static every candidate is compiled for GPUs that need not be present, as `tridrop inspect`
does, at that command's sizes. Those that spill, or take more shared memory than there is, are
rejected. Only a GPU can tell which of the others is fastest.

The results are printed. With --out FOLDER the rows are also written to tune-DEVICE-FAMILY-DATE.json
and .csv there, after each size, so that an interrupted run keeps what is done. Nothing else is
written, and nothing is changed in the package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from tune_cases import DTYPES, FAMILIES, Call, Family, Settings, Size, replaced

from tridrop.backends.triton import gpu
from tridrop.backends.triton.compile import SHARED
from tridrop.base.files import write_csv
from tridrop.commands import inspection

Row = dict[str, Any]
GENERATIONS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
ARCHS = {arch: gpu.Gpu(generation, SHARED[arch]) for arch, generation in GENERATIONS.items()}
FLUSHED = 256 << 20  # bytes written before a run: more than any cache
BUSY = 500_000  # clocks that the device waits while the host launches: about 0.25 ms
WORTH = 1.02  # the least gain that is more than noise


def candidates(family: Family, size: Size, present: Settings) -> list[Settings]:
    """The present setting, then the candidates that differ from it and from each other."""
    found = [present]
    for settings in family.candidates(size):
        # A number that a candidate sets besides its tile has the module's value in the present one.
        full = {n: getattr(family.module, n) for n in settings if n not in present} | present
        if settings != full and settings not in found:
            found.append(settings)
    return found


def shown(settings: Settings) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


# On a GPU.


def difference(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> str | None:
    """How results differ from those of the present setting; None if only by rounding."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        largest = float(b.abs().max())
        # Another order of sums changes a few roundings to the dtype, more of them in fp32.
        limit = max(4 * torch.finfo(b.dtype).eps, 2**-18) * largest
        error = float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max())
        if a.dtype != b.dtype or not error <= limit:
            return f"result {i} differs by {error:.3g}, more than the {limit:.3g} allowed"
    return None


def flips(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> int:
    """How many decisions differ in the results of a probe."""
    pairs = zip(found, expected, strict=True)
    return sum(int((~((a.float() - b.float()).abs() < 0.5)).sum()) for a, b in pairs)


class Problem:
    """A family's call at one size, the probe of its masks, and the present results of both."""

    def __init__(self, family: Family, size: Size, dtype: torch.dtype, device: str) -> None:
        self.family = family
        self.call: Call = family.problem(size, dtype, device, False)
        self.probe: Call = family.problem(size, dtype, device, True)
        self.expected, self.expected_probe = self.call(), self.probe()

    def why_not(self, settings: Settings) -> str | None:
        """Why a candidate cannot be used, or None. This runs it once, which also compiles it."""
        try:
            with replaced(self.family.module, settings):
                flipped = flips(self.probe(), self.expected_probe)
            with replaced(self.family.module, settings):
                wrong = difference(self.call(), self.expected)
        except OutOfResources as error:
            return str(error).splitlines()[0]
        return f"{flipped} decisions differ" if flipped else wrong


def timed(problem: Problem, tried: list[Settings], rounds: int) -> list[list[float]]:
    """Milliseconds of every candidate in every round."""
    cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    times: list[list[float]] = [[] for _ in tried]
    for _ in range(rounds):
        events = []
        for settings in tried:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with replaced(problem.family.module, settings):
                cache.zero_()
                torch.cuda._sleep(BUSY)
                start.record()
                problem.call()
                end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        for found, (start, end) in zip(times, events, strict=True):
            found.append(start.elapsed_time(end))
    return times


def measure(family: Family, size: Size, dtype: str, rounds: int, device: str = "cuda") -> list[Row]:
    """One row per candidate, with its time or why it has none; the present setting first."""
    problem = Problem(family, size, DTYPES[dtype], device)
    present = family.present(size, DTYPES[dtype], gpu.of(torch.device(device)))
    tried = candidates(family, size, present)
    about = {"family": family.name, "size": list(size), "dtype": dtype}
    rows: list[Row] = [about | {"settings": shown(s), "present": s is present} for s in tried]
    for row, settings in zip(rows, tried, strict=True):
        row["why_not"] = problem.why_not(settings)
    right = [i for i, row in enumerate(rows) if row["why_not"] is None]
    if 0 not in right:
        raise RuntimeError(f"the present setting fails its own check: {rows[0]['why_not']}")
    for i, times in zip(right, timed(problem, [tried[i] for i in right], rounds), strict=True):
        low, _, high = statistics.quantiles(times, n=4)
        rows[i] |= {"ms": statistics.median(times), "ms_quartiles": [low, high]}
    for i in right:
        rows[i]["gain"] = rows[0]["ms"] / rows[i]["ms"]
    return rows


# Without a GPU.


def compiled(name: str, row: str, arch: str, dtype: str, settings: Settings) -> Row:
    """Figures from a candidate's machine code; runs in a worker process."""
    from tridrop.commands.inspection.records import compile_row

    family = FAMILIES[name]
    about = {"family": name, "size": list(family.rows[row]), "dtype": dtype, "arch": arch}
    about["settings"] = shown(settings)
    try:
        with replaced(family.module, settings):
            records = compile_row(row, arch, dtype, "tridrop")
    except Exception as error:  # a compiler may fail with anything; the row records it
        reason = f"{type(error).__name__}: {error}"
        return about | {"why_not": f"does not compile: {reason.splitlines()[0][:200]}"}
    (record,) = (r for r in records if r["kernel"] == family.kernel)
    kept = ("instructions_per_element", "elements_per_thread", "registers", "spill_bytes",
            "shared_bytes", "philox_rounds")  # fmt: skip
    why_not = None
    if record["spill_bytes"]:
        why_not = f"spills {record['spill_bytes']} bytes"
    if record["shared_bytes"] > SHARED[arch]:
        why_not = f"takes {record['shared_bytes']} bytes of shared memory of {SHARED[arch]}"
    return about | {k: record[k] for k in kept} | {"why_not": why_not}


def static(
    names: list[str], sizes: list[Size], archs: list[str], dtype: str, jobs: int
) -> Iterator[list[Row]]:
    """The rows of every family, size and architecture, the present setting first."""
    # New processes read the environment again: Triton compiles there, even if it interprets here.
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for name in names:
            family = FAMILIES[name]
            for inspected, size in family.rows.items():
                for arch in archs if not sizes or size in sizes else ():
                    present = family.present(size, DTYPES[dtype], ARCHS[arch])
                    tried = [
                        {k: v for k, v in s.items() if k != "REDUCTION_PROGRAMS"}
                        for s in candidates(family, size, present)
                    ]  # the number of programs does not affect the machine code
                    tried = [s for i, s in enumerate(tried) if s not in tried[:i]]
                    futures = [
                        pool.submit(compiled, name, inspected, arch, dtype, s) for s in tried
                    ]
                    rows = [future.result() for future in futures]
                    yield [row | {"present": i == 0} for i, row in enumerate(rows)]


# Reports.


def summary(rows: list[Row]) -> list[str]:
    """The table of a family at one size, and what its function would have to return."""
    first = rows[0]
    head = [str(first[k]) for k in ("family", "size", "dtype", "arch") if k in first]
    columns = ("ms", "gain") if "ms" in first else (
        "instructions_per_element", "registers", "spill_bytes", "shared_bytes",
    )  # fmt: skip
    lines = ["", " ".join(head), "  ".join(["  ", *columns])]
    far = float("inf")
    for row in sorted(rows, key=lambda r: (r["why_not"] is not None, r.get(columns[0], far))):
        figures = "  ".join(f"{row[c]:9.4g}" for c in columns if c in row)
        mark = "*" if row["present"] else " "
        lines.append(f"{mark} {figures}  {row['settings']}  {row['why_not'] or ''}".rstrip())
    return [*lines, verdict(rows)]


def verdict(rows: list[Row]) -> str:
    """What the pure function would have to return, and why."""
    first, usable = rows[0], [row for row in rows if row["why_not"] is None]
    if "ms" in first:
        best = min(usable, key=lambda row: row["ms"])
        if best["gain"] < WORTH:
            return f"-> stays: no candidate is {WORTH} times as fast"
        return f"-> {best['gain']:.2f} times as fast: {best['settings']}"
    if first["why_not"] is None:
        return "-> stays, by the machine code: it neither spills nor needs too much shared memory"
    least = first.get("instructions_per_element", float("inf"))
    better = [row["settings"] for row in usable if row["instructions_per_element"] <= least]
    if better:
        return f"-> {first['why_not']}; with no more instructions these do not: {'; '.join(better)}"
    if usable:
        best = min(usable, key=lambda row: row["instructions_per_element"])
        return (
            f"-> {first['why_not']}; with {best['instructions_per_element']:.4g} instructions per "
            f"element instead of {least:.4g} this does not: {best['settings']}"
        )
    return f"-> {first['why_not']}, and no candidate is better"


def write(rows: list[Row], path: Path) -> None:
    """Write the rows as JSON and as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    write_csv(path.with_suffix(".csv"), rows)


def report(
    groups: Iterable[list[Row]], path: Path | None, about: Row, say: Callable[[str], None] = print
) -> None:
    """Print the groups as they come, and write them if a path is given."""
    rows: list[Row] = []
    for group in groups:
        for line in summary(group):
            say(line)
        rows += [row | about for row in group]
        if path is not None:
            write(rows, path)


def _size(text: str) -> Size:
    return tuple(map(int, text.split(",")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--size", nargs="+", type=_size, default=[], help="sizes of --list, such as 8192,4096"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--static", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (--static)")
    parser.add_argument("--list", action="store_true", help="show the families and stop")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the rows there as well")
    options = parser.parse_args()
    if options.rounds < 2 or options.jobs < 1:
        parser.error("give --rounds 2 or more, and --jobs 1 or more")
    sizes = {size for f in FAMILIES.values() for size in (*f.sizes, *f.rows.values())}
    if unknown := set(options.size) - sizes:
        parser.error(f"--size {unknown.pop()}: no family has it; --list shows the sizes")
    return options


def main() -> None:
    """Run the command."""
    options = arguments()
    if options.list:
        for family in FAMILIES.values():
            counts = ", ".join(f"{size}: {len(family.candidates(size))}" for size in family.sizes)
            print(f"{family.name}: {family.module.__name__}.{family.setting}; {counts}")
        return
    if not options.static and not torch.cuda.is_available():
        sys.exit("tune.py: needs a CUDA device to time anything; without one use --static")
    today = datetime.date.today().isoformat()
    about: Row = dict(inspection.provenance()) | {"torch": torch.__version__}
    names = "" if options.family == list(FAMILIES) else "-" + "-".join(options.family)
    if options.static:
        groups = (
            group
            for dtype in options.dtype
            for group in static(options.family, options.size, options.arch, dtype, options.jobs)
        )
        report(groups, options.out and options.out / f"tune-static{names}-{today}", about)
        return
    device = torch.cuda.get_device_name()
    groups = (
        measure(FAMILIES[name], size, dtype, options.rounds)
        for name in options.family
        for dtype in options.dtype
        for size in FAMILIES[name].sizes
        if not options.size or size in options.size
    )
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.out and options.out / f"tune-{slug}{names}-{today}"
    report(groups, path, about | {"device": device})


if __name__ == "__main__":
    main()
