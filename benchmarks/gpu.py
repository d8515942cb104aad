"""Run all that needs a GPU, in pieces of under ten minutes: one command for whoever has one.

    python benchmarks/gpu.py                          everything, in order
    python benchmarks/gpu.py --piece tests ncu        the pieces whose names begin so
    python benchmarks/gpu.py --list                   the pieces
    python benchmarks/gpu.py --dry-run                the commands and their limits

Every piece is a process of its own with a time limit, at which it is killed with all that it
started; the others go on. DIR gets a log of each, its results, and summary.json, which is written
again after each piece, so that a cut leaves what is done. The exit status is 0 where no piece
failed, 1 where one did, 2 where nothing could be started.

The package need not be installed: the pieces find it in this clone. What a missing library leaves
out is named in the summary, and a piece that cannot run here is skipped with its reason: neither
counts as passed.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 540.0
GRACE = 10.0  # seconds between asking a piece to end and killing it
SHOWN = ("torch", "triton", "numpy", "transformers", "peft", "timm", "accelerate", "numba")
PASSED, FAILED, CUT, SKIPPED, RUNNING = "passed", "failed", "time limit", "skipped", "running"

# Test files, by patterns; the first that fits decides, and what fits none is in "others".
TESTS = {
    "cuda": ("test_cuda.py",),
    "compile": ("test_*machine_code.py", "test_inspect.py"),
    "elementwise": ("test_elementwise.py", "test_norm.py", "test_softmax.py", "test_shims.py"),
    "masks": ("test_mask*.py", "test_attention_mask*.py", "test_seeds.py", "test_check.py"),
    "modules": ("test_layers.py", "test_torch.py", "test_transformer_block.py",
                "test_attention_module.py", "test_attention_torch.py"),
    "attention": ("test_attention*.py",),
    "swap": ("test_swap*.py", "test_transformers*.py", "test_lora_peft.py"),
    "others": ("*",),
}  # fmt: skip
# run.py sets up an environment, which these tests describe.
ENVIRONMENT = [
    "tests/test_environment.py",
    "tests/test_package.py::test_the_version_is_the_packages",
]
BENCH = {
    "elementwise": ("dropout", "dropout_add", "activation_dropout"),
    "norms": ("dropout_add_layer_norm", "dropout_add_rms_norm", "layer_norm_dropout",
              "rms_norm_dropout"),
    "softmax": ("softmax_dropout",),
    "attention": ("scaled_dot_product_attention",),
}  # fmt: skip
STEPS = ("gpt2", "bert", "vit")
LORA = (8, 16, 64)  # ranks
TUNE = (
    "elementwise_forward", "elementwise_backward", "elementwise_sums", "gated_sums",
    "norm_forward", "norm_backward", "softmax_forward", "softmax_backward",
    "attention_forward", "attention_dquery", "attention_dkey",
)  # fmt: skip
# What ncu looks at: family, size and kernel, as in benchmarks/tune.py.
PROFILED = [
    (family, size, kernel)
    for family, kernel, sizes in (
        ("elementwise_forward", "forward_kernel", ["8192,4096"]),
        ("elementwise_backward", "backward_kernel", ["8192,4096"]),
        ("norm_forward", "norm_forward_kernel", ["8192,4096"]),
        ("norm_backward", "norm_backward_kernel", ["8192,4096"]),
        *(
            (f"attention_{way}", f"attention_{way}_kernel", ["4,16,4096,0,64", "4,16,4096,0,128"])
            for way in ("forward", "dquery", "dkey")
        ),
    )
    for size in sizes
]
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",  # achieved occupancy
    "smsp__warps_eligible.avg.per_cycle_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    "smsp__inst_executed_op_local_ld.sum",  # spilled registers that are read, and written
    "smsp__inst_executed_op_local_st.sum",
)
REFUSALS = {
    r"ERR_NVGPUCTRPERM": "the driver keeps performance counters for administrators",
    r"profiling is not supported|ERR_NVGPUCTRUNSUP": "ncu cannot profile this device",
}


@dataclass(frozen=True)
class Piece:
    """A command, and what is to be known of it before and after it runs."""

    name: str
    command: Sequence[str]
    why_not: str | None = None
    """why it cannot run here"""
    left_out: dict[str, str] = field(default_factory=dict)
    """part -> why it is not in the command"""
    refusals: dict[str, str] = field(default_factory=dict)
    """pattern in the output of a failure -> the reason for which it counts as skipped"""
    proof: str | None = None
    """pattern without which the output is that of a failure, whatever the exit status"""


# The pieces.


def missing(file: Path, folder: Path) -> str | None:
    """A library that a test file imports at its top and that is not installed."""
    for node in ast.parse(file.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in (name.partition(".")[0] for name in names):
            helper = folder / f"{name}.py"
            if helper.exists():
                if found := missing(helper, folder):
                    return found
            elif name != "tridrop" and importlib.util.find_spec(name) is None:
                return name
    return None


def groups(folder: Path) -> dict[str, list[Path]]:
    """The test files of each group; every file is in one."""
    found: dict[str, list[Path]] = {name: [] for name in TESTS}
    for file in sorted(folder.glob("test_*.py")):
        fits = (
            n
            for n, patterns in TESTS.items()
            if any(fnmatch.fnmatch(file.name, p) for p in patterns)
        )
        found[next(fits)].append(file)
    return found


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_pieces(out: Path) -> list[Piece]:
    """pytest on each group of files, and on the examples of the package."""
    # Workers share the GPU, and most of their time is the compiler's.
    workers = str(max(1, min(8, (os.cpu_count() or 2) - 1)))
    pieces = []
    for name, files in groups(ROOT / "tests").items():
        absent = {file: missing(file, file.parent) for file in files}
        left_out = {f.name: f"needs {lib}" for f, lib in absent.items() if lib is not None}
        paths = [str(f.relative_to(ROOT)) for f in files if f.name not in left_out]
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--timeout", "300",
                   "-p", "no:cacheprovider", f"--junitxml={out / f'tests-{name}.xml'}"]  # fmt: skip
        if name == "others":
            paths.append("tridrop")  # the examples in its documentation
            if not installed("tridrop"):
                command += [f"--deselect={test}" for test in ENVIRONMENT]
                left_out |= dict.fromkeys(ENVIRONMENT, "about the environment that run.py makes")
        why_not = None if paths else "every file needs a library that is not installed"
        pieces.append(Piece(f"tests-{name}", [*command, *paths], why_not, left_out))
    return pieces


def ncu_pieces(out: Path) -> list[Piece]:
    """The main kernels, three launches of each."""
    ncu = shutil.which("ncu")
    pieces = []
    for family, size, kernel in PROFILED:
        name = f"ncu-{family}-{size.replace(',', 'x')}"
        command = [
            ncu or "ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS),
            "--kernel-name", f"regex:^{kernel}$", "--launch-skip", "1", "--launch-count", "3",
            "--log-file", str(out / f"{name}.csv"), sys.executable,
            str(ROOT / "benchmarks" / "run_kernel.py"), family, size, "--times", "4",
        ]  # fmt: skip
        why_not = None if ncu else "ncu (Nsight Compute) is not on PATH"
        pieces.append(Piece(name, command, why_not, refusals=REFUSALS, proof=kernel + r"\b"))
    return pieces


def all_pieces(out: Path) -> list[Piece]:
    """Every piece, in the order in which they are wanted where time is short."""
    python = sys.executable
    tridrop = [python, "-m", "tridrop"]
    smi = shutil.which("nvidia-smi")
    bench = [*tridrop, "bench", "--device", "cuda", "--dtype", "bf16,fp32"]
    tests = test_pieces(out)
    tune = str(ROOT / "benchmarks" / "tune.py")
    return [
        Piece("env-smi", [smi or "nvidia-smi", "-q"], None if smi else "no nvidia-smi on PATH"),
        Piece("env-info", [*tridrop, "info"]),
        *tests,
        *(
            Piece(f"bench-{name}", [*bench, "--out", str(out / f"bench-{name}"),
                                    "--op", ",".join(ops)])
            for name, ops in BENCH.items()
        ),
        *(
            Piece(f"steps-{name}", [*tridrop, "bench", "--device", "cuda", "--steps", name,
                                    "--out", str(out / f"steps-{name}")])
            for name in STEPS
        ),
        *(
            Piece(f"lora-{rank}", [python, str(ROOT / "benchmarks" / "lora.py"), "--device", "cuda",
                                   "--ranks", str(rank), "--out", str(out / f"lora-{rank}")],
                  None if installed("peft") else "peft is not installed")
            for rank in LORA
        ),
        *ncu_pieces(out),
        *(Piece(f"tune-{name}", [python, tune, "--family", name, "--out", str(out)])
          for name in TUNE),
    ]  # fmt: skip


# Running them.


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which share its group."""
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


def run(piece: Piece, out: Path, limit: float) -> dict[str, Any]:
    """Run one piece under its limit; what came of it, for the summary."""
    about: dict[str, Any] = {"piece": piece.name, "command": shlex.join(piece.command)}
    about |= {"limit_s": limit, "left_out": piece.left_out}
    if piece.why_not is not None:
        return about | {"outcome": SKIPPED, "why": piece.why_not}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    log, start = out / f"{piece.name}.log", time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            piece.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        cut = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
        finally:
            end(process)  # also what a piece that ended by itself has left behind
    about |= {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1)}
    about |= counted(out / f"{piece.name}.xml")
    if cut:
        return about | {"outcome": CUT, "why": f"killed after {limit:g} s"}
    return about | judged(piece, process.returncode, out)


def judged(piece: Piece, status: int, out: Path) -> dict[str, str]:
    """The outcome of a piece that ended, by its exit status and what it wrote."""
    files = (out / f"{piece.name}{suffix}" for suffix in (".log", ".csv"))
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


def counted(file: Path) -> dict[str, dict[str, int]]:
    """How many tests ran, failed and were skipped, of a JUnit file."""
    if not file.exists():
        return {}
    suites = list(ElementTree.parse(file).iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return {"counts": {n: sum(int(suite.get(n, 0)) for suite in suites) for n in names}}


def circumstances() -> dict[str, Any]:
    """What the results are about."""
    import torch

    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True,
    )  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "versions": {n: importlib.metadata.version(n) for n in SHOWN if installed(n)},
        "python": sys.version.split()[0],
        "commit": git.stdout.strip() or None,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write(summary: dict[str, Any], out: Path) -> None:
    """Write the summary whole: a cut leaves the one before it."""
    draft = out / "summary.json.new"
    draft.write_text(json.dumps(summary, indent=1) + "\n")
    draft.replace(out / "summary.json")


def run_all(pieces: Sequence[Piece], out: Path, limit: float, about: dict[str, Any]) -> int:
    """Run the pieces in order; 1 where one failed or met its limit, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for piece in pieces:
        print(f"{piece.name} ...", flush=True)
        write(about | {"pieces": [*found, {"piece": piece.name, "outcome": RUNNING}]}, out)
        found.append(run(piece, out, limit))
        write(about | {"pieces": found}, out)
        last = found[-1]
        parts = [last["outcome"], f"{last['seconds']} s" if "seconds" in last else "",
                 last.get("why", ""), str(last.get("counts", "")),
                 *(f"without {part}: {why}" for part, why in piece.left_out.items())]  # fmt: skip
        print(f"{piece.name}: {', '.join(filter(None, parts))}", flush=True)
    return int(any(result["outcome"] in (FAILED, CUT) for result in found))


def chosen(pieces: Sequence[Piece], names: Sequence[str] | None) -> list[Piece]:
    """The pieces whose names are, or begin with, one of these; ValueError where none does."""
    for name in names or ():
        if not any((p.name + "-").startswith(name + "-") for p in pieces):
            known = ", ".join(p.name for p in pieces)
            raise ValueError(f"no piece is or begins with {name!r}; known: {known}")
    fits = [p for p in pieces if any((p.name + "-").startswith(n + "-") for n in names or ())]
    return fits if names else list(pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it as asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--piece", nargs="+", metavar="NAME", help="these, by name or beginning")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a piece (%(default)g)")
    parser.add_argument("--list", action="store_true", help="show the pieces and stop")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and stop")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    try:
        if options.limit <= 0:
            raise ValueError(f"--limit {options.limit:g}: give seconds, more than 0")
        pieces = chosen(all_pieces(out), options.piece)
    except ValueError as error:
        parser.error(str(error))
    if options.list or options.dry_run:
        for piece in pieces:
            why_not = f"  (skipped: {piece.why_not})" if piece.why_not else ""
            command = f"  {options.limit:g} s  {shlex.join(piece.command)}"
            print(piece.name + (command if options.dry_run else "") + why_not)
        return 0
    about = circumstances()
    if about["device"] is None:
        print("gpu.py: torch finds no CUDA device, and all of this is about one", file=sys.stderr)
        return 2
    return run_all(pieces, out, options.limit, about)


if __name__ == "__main__":
    raise SystemExit(main())
