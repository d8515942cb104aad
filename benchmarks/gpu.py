"""Run everything that needs a GPU within a budget of minutes, the most valuable first.

    python benchmarks/gpu.py --minutes 13             correctness, the headline, then the rest
    python benchmarks/gpu.py --minutes 13 --dry-run   print what fits, with estimates; --json for
    programs python benchmarks/gpu.py --resume DIR             go on where earlier runs stopped
    python benchmarks/gpu.py --piece tests ncu        run the pieces whose names begin so python
    benchmarks/gpu.py --list                   list all pieces

Before that, on any machine with the same versions of Python and Triton as the one with the GPU:

    python benchmarks/gpu.py --precompile DIR --triton 3.6.0     fill a cache of kernels
    python benchmarks/gpu.py --minutes 13 --cache DIR            use it

And after that:

    python benchmarks/gpu.py --report DIR             write records and plots to benchmarks/results,
                                                      and the table in docs/performance.md

Each piece is a separate process. It starts if its estimate fits the time that is left; at its limit
it is killed, with every process that it started, and the other pieces go on. After each piece, all
results are packed into gpu-results.tar.gz in --out, with those of the resumed runs, so that an
interrupted run keeps what it has. The exit status is 0 if no piece failed, 1 if one failed or was
killed, and 2 if nothing could be started.

The package need not be installed: the pieces find it in this clone. The summary names the tests
that are left out because a library is missing, and the pieces that cannot run here with the reason;
neither count as passed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu_plan import archive, cache, report, running
from gpu_plan.pieces import COMPILE, RIGHT, ROOT, Piece, all_pieces, workers

MINUTES = 13.0


def chosen(pieces: Sequence[Piece], names: Sequence[str] | None) -> list[Piece]:
    """The pieces whose names are one of these or begin with one; ValueError if a name fits none."""
    for name in names or ():
        if not any((p.name + "-").startswith(name + "-") for p in pieces):
            every = ", ".join(p.name for p in pieces)
            raise ValueError(f"no piece is called {name!r} or begins with it; there are: {every}")
    fits = [p for p in pieces if any((p.name + "-").startswith(n + "-") for n in names or ())]
    return fits if names else list(pieces)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument(
        "--minutes", type=float, default=MINUTES, help="the budget (default %(default)g)"
    )
    found.add_argument(
        "--piece", nargs="+", metavar="NAME", help="run these, by name or its beginning"
    )
    found.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    found.add_argument(
        "--resume", type=Path, nargs="+", default=[], metavar="DIR",
        help="earlier runs: what passed there with the same kernels is not run again",
    )  # fmt: skip
    found.add_argument(
        "--cache", type=Path, metavar="DIR", help="the folder of --precompile, or its .tar.gz"
    )
    found.add_argument("--list", action="store_true", help="show the pieces and stop")
    found.add_argument("--dry-run", action="store_true", help="show what fits and stop")
    found.add_argument(
        "--json", action="store_true", help="with --dry-run: print a list of records"
    )
    found.add_argument("--precompile", type=Path, metavar="DIR", help="fill a cache and stop")
    found.add_argument("--triton", metavar="VERSION", help="with --precompile: the version needed")
    found.add_argument(
        "--kernels", choices=cache.SETS, nargs="+", default=list(cache.SETS),
        help="with --precompile: for which pieces (default: both)",
    )  # fmt: skip
    found.add_argument(
        "--arch", type=int, choices=cache.ARCHS, default=90, help="with --precompile"
    )
    found.add_argument(
        "--workers", type=int, default=workers(), help="with --precompile: processes"
    )
    found.add_argument(
        "--report", type=Path, metavar="DIR", help="make the table and plots, and stop"
    )
    found.add_argument("--into", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    found.add_argument(
        "--docs", type=Path, default=ROOT / "docs" / "performance.md", metavar="FILE",
        help="with --report: the page with the table",
    )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    for name in ("minutes", "workers"):
        if getattr(options, name) <= 0:
            command_line.error(f"--{name} {getattr(options, name):g}: give more than 0")
    with tempfile.TemporaryDirectory(prefix="tridrop-gpu-") as folder:
        work = Path(folder)
        try:
            if options.precompile is not None:
                return _precompile(options, work)
            if options.report is not None:
                written = report.write(options.report, options.into, options.docs, work)
                print(*written, sep="\n")
                return 0
            pieces = chosen(all_pieces(work, work), options.piece)
        except ValueError as error:
            command_line.error(str(error))
        if options.list or options.dry_run:
            _show(pieces, options)
            return 0
        return _run(options, work)


def _show(pieces: Sequence[Piece], options: argparse.Namespace) -> None:
    """Print all pieces, or with --dry-run those that fit."""
    if options.dry_run:
        pieces = running.planned(pieces, 60 * options.minutes)
    if options.json:
        about = [
            {
                "piece": p.name, "part": p.part, "estimate_s": p.estimate_s, "limit_s": p.limit_s,
                "command": shlex.join(p.command), "why_not": p.why_not,
                "left_out": dict(p.left_out),
            }
            for p in pieces
        ]  # fmt: skip
        print(json.dumps(about, indent=1))
        return
    for p in pieces:
        why_not = f"  (cannot run here: {p.why_not})" if p.why_not else ""
        command = f"  {shlex.join(p.command)}" if options.dry_run else ""
        print(f"{p.name}  {p.part}  {p.estimate_s:.0f} s{command}{why_not}")
    if options.dry_run:
        seconds = sum(p.estimate_s for p in pieces)
        print(f"{seconds:.0f} s of {60 * options.minutes:.0f} by the estimates")


def _precompile(options: argparse.Namespace, work: Path) -> int:
    """Fill a cache, and print what it holds and its size."""
    import triton

    if options.triton not in (None, triton.__version__):
        print(
            f"gpu.py: this Python has Triton {triton.__version__}, not {options.triton}: use a "
            "Python that has it, of the same version as on the machine with the GPU",
            file=sys.stderr,
        )
        return 2
    folder = options.precompile.resolve()
    tests = [p for p in all_pieces(work, folder) if p.part == RIGHT]
    about = cache.precompile(folder, options.kernels, options.arch, options.workers, tests)
    packed = shutil.make_archive(str(folder), "gztar", folder)
    size = Path(packed).stat().st_size / 2**20
    print(
        f"{about['count']} kernels for sm_{about['arch']}, Triton {about['triton']}, Python "
        f"{about['python']}; {about['compiled']} compiled now; {packed}: {size:.1f} MiB"
    )
    return 0


def _run(options: argparse.Namespace, work: Path) -> int:
    """Run the pieces that fit the budget; the exit status."""
    budget = running.Budget(60 * options.minutes)
    about = archive.circumstances()
    if about["device"] is None:
        print("gpu.py: torch finds no CUDA device, and every piece needs one", file=sys.stderr)
        return 2
    kept = work / "runs"
    earlier: dict[str, str] = {}
    try:
        runs = [run for source in options.resume for run in archive.unpack(source, kept)]
        earlier, notes = archive.passed(about, runs)
    except (ValueError, OSError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    compiled = work / "triton"
    about["cache"] = _cache(options.cache, compiled)
    print(*notes, f"Triton's cache: {about['cache']}", sep="\n", flush=True)
    out, run = options.out.resolve(), kept / about["started"]
    pieces = [
        p
        for p in chosen(all_pieces(run, compiled), options.piece)
        if p.part != COMPILE or not cache.complete(compiled, "headline")
    ]
    for folder in (out, run):
        folder.mkdir(parents=True, exist_ok=True)

    def save(found: list[running.Found]) -> None:
        archive.write_json(about | {"pieces": found}, run / archive.SUMMARY)
        left_out = archive.pack(kept, out)
        archive.write_json(about | {"pieces": found, "not_packed": left_out}, out / archive.SUMMARY)

    return running.run_all(pieces, run, compiled, budget, earlier, save)


def _cache(source: Path | None, target: Path) -> str:
    """Use a cache of kernels; returns whether it fits."""
    import torch

    if source is None:
        return "none was given"
    major, minor = torch.cuda.get_device_capability()
    try:
        return f"hit: {cache.take(source, target, 10 * major + minor)}"
    except cache.Mismatch as mismatch:
        shutil.rmtree(target, ignore_errors=True)
        return f"miss: {mismatch}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the package of this clone
    raise SystemExit(main())
