"""The pieces of work for a GPU, by value: correctness first, then the headline, then the rest.

A piece is a process with an estimate, in seconds on an H100 with 16 cores, and a limit at which it
is killed. Nothing here has run on a GPU yet: the estimates come from compile times on a CPU and
from the number of rounds of a benchmark, and the first run will show how good they are.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .headline import LENGTHS, MEMORY_OPS, MEMORY_SIZE, PROVIDERS, WIDTHS

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
# Parts of the plan, in their order.
DEVICE, COMPILE, RIGHT, HEADLINE, MORE, ALL = (
    "device", "compile", "right or wrong", "headline", "more", "everything",
)  # fmt: skip
RIGHT_SECONDS, HEADLINE_SECONDS = 270.0, 360.0  # what these two parts may take
MOST_WORKERS = 15

# Groups of test files, by patterns: the first pattern that fits a file decides its group.
TESTS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("test_cuda.py",),
    "check": ("test_check.py",),
    "compile": ("test_*machine_code.py", "test_inspect.py", "test_offsets*.py", "test_gpu_*.py"),
    "elementwise": ("test_elementwise.py", "test_norm.py", "test_softmax.py", "test_shims.py"),
    "masks": ("test_mask*.py", "test_attention_mask*.py", "test_seeds.py"),
    "modules": ("test_layers.py", "test_torch.py", "test_transformer_block.py",
                "test_attention_module.py", "test_attention_torch.py"),
    "attention": ("test_attention*.py",),
    "lora": ("test_lora*.py",),
    "swap": ("test_swap*.py", "test_transformers*.py"),
    "others": ("*",),
}  # fmt: skip
NEED_NO_GPU = ("compile",)
# The part of test_check.py that runs first: the table of cases, computed by the kernels.
TABLE = "triton and (test_every_case_holds or test_every_invariant_holds)"
# These tests are about the environment that run.py sets up.
ENVIRONMENT = (
    "tests/project/test_environment.py",
    "tests/project/test_package.py::test_the_version_is_the_packages",
)
BENCH = {
    "elementwise": ("dropout", "dropout_add", "activation_dropout"),
    "norms": ("dropout_add_layer_norm", "dropout_add_rms_norm", "layer_norm_dropout",
              "rms_norm_dropout"),
    "softmax": ("softmax_dropout",),
    "attention": ("scaled_dot_product_attention",),
}  # fmt: skip
TUNE_ATTENTION = ("attention_forward", "attention_dquery", "attention_dkey")
TUNE = (
    "elementwise_forward", "elementwise_backward", "elementwise_sums", "gated_sums",
    "norm_forward", "norm_backward", "softmax_forward", "softmax_backward",
)  # fmt: skip
# What ncu profiles: family, size and kernel, as in benchmarks/tune.py. The first four tell most.
PROFILED = (
    ("attention_forward", "4,16,4096,0,128", "attention_forward_kernel"),
    ("attention_dkey", "4,16,4096,0,128", "attention_dkey_kernel"),
    ("elementwise_forward", "8192,4096", "forward_kernel"),
    ("norm_backward", "8192,4096", "norm_backward_kernel"),
    ("attention_dquery", "4,16,4096,0,128", "attention_dquery_kernel"),
    ("attention_forward", "4,16,4096,0,64", "attention_forward_kernel"),
    ("attention_dquery", "4,16,4096,0,64", "attention_dquery_kernel"),
    ("attention_dkey", "4,16,4096,0,64", "attention_dkey_kernel"),
    ("elementwise_backward", "8192,4096", "backward_kernel"),
    ("norm_forward", "8192,4096", "norm_forward_kernel"),
)
FIRST_PROFILED = 4
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",  # achieved occupancy
    "smsp__warps_eligible.avg.per_cycle_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    "smsp__inst_executed_op_local_ld.sum",  # spilled registers: reads here, writes below
    "smsp__inst_executed_op_local_st.sum",
)
REFUSALS = {
    r"ERR_NVGPUCTRPERM": "the driver keeps performance counters for administrators",
    r"profiling is not supported|ERR_NVGPUCTRUNSUP": "ncu cannot profile this device",
}


@dataclass(frozen=True)
class Piece:
    """A command, its estimate and limit, and how to judge its output."""

    name: str
    command: Sequence[str]
    estimate_s: float
    part: str = MORE
    why_not: str | None = None
    """why it cannot run here; None if it can"""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """what is left out of the command -> why"""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """pattern in the output of a failure -> the reason for which it counts as skipped"""
    proof: str | None = None
    """pattern that the output must contain for a piece to pass, whatever its exit status"""
    limit: float | None = None
    """seconds after which it is killed; None stands for twice the estimate"""

    @property
    def limit_s(self) -> float:
        """Seconds after which it is killed, whatever is left of the budget."""
        return 2 * self.estimate_s if self.limit is None else self.limit


def missing(file: Path) -> str | None:
    """A library that a test file imports at its top and that is not installed, or None.

    Imported helpers may lie beside the file, or in the folder above, which conftest.py puts on the
    path; their imports count as well.
    """
    for node in ast.parse(file.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in (name.partition(".")[0] for name in names):
            beside = [folder / f"{name}.py" for folder in (file.parent, file.parents[1])]
            helper = next((path for path in beside if path.exists()), None)
            if helper is not None:
                if found := missing(helper):
                    return found
            elif name != "tridrop" and importlib.util.find_spec(name) is None:
                return name
    return None


def groups(folder: Path) -> dict[str, list[Path]]:
    """The test files of each group; every file is in exactly one."""
    found: dict[str, list[Path]] = {name: [] for name in TESTS}
    for file in sorted(folder.rglob("test_*.py")):
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


def workers() -> int:
    """How many processes compile and test at a time; each has its own context on the GPU."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))


def _tests(out: Path, name: str, files: Sequence[Path], estimate_s: float, part: str,
           more: Sequence[str] = (), limit: float | None = None) -> Piece:  # fmt: skip
    """pytest on a group of files, with a line per test, so that a killed run keeps its results."""
    absent = {file: missing(file) for file in files}
    left_out = {f.name: f"needs {lib}" for f, lib in absent.items() if lib is not None}
    paths = [str(f.relative_to(ROOT)) for f in files if f.name not in left_out]
    folder = out / f"tests-{name}"
    command = [sys.executable, "-m", "pytest", "-v", "-n", str(workers()),
               "-p", "no:cacheprovider", "-p", "gpu_plan.context",
               f"--junitxml={folder / 'tests.xml'}", *more]  # fmt: skip
    if installed("pytest-timeout"):
        command += ["--timeout", "120"]
    else:
        left_out["--timeout"] = "needs pytest-timeout: a test that hangs ends with its piece"
    if name == "others":
        paths.append("tridrop")  # the examples in its documentation
        if not installed("tridrop"):
            command += [f"--deselect={test}" for test in ENVIRONMENT]
            left_out |= dict.fromkeys(ENVIRONMENT, "about the environment that run.py makes")
    why_not = None if paths else "every file needs a library that is not installed"
    if not installed("pytest-xdist"):
        why_not = "pytest-xdist is not installed"
    return Piece(
        f"tests-{name}", [*command, *paths], estimate_s, part, why_not, left_out, limit=limit
    )


def _bench(out: Path, name: str, estimate_s: float, part: str, *more: str) -> Piece:
    command = [sys.executable, "-m", "tridrop", "bench", "--device", "cuda"]
    return Piece(name, [*command, "--out", str(out / name), *more], estimate_s, part)


def _attention(out: Path, length: int, estimate_s: float) -> Piece:
    """Attention and torch's: one row per width and order, forward and backward."""
    return _bench(
        out, f"bench-attention-{length}", estimate_s, HEADLINE,
        "--op", "scaled_dot_product_attention", "--dtype", "bf16", "--length", str(length),
        "--head-dim", ",".join(map(str, WIDTHS)), "--mode", "forward,backward",
        "--provider", ",".join(PROVIDERS["attention"]), "--rounds", "10",
    )  # fmt: skip


def _memory(out: Path, name: str, estimate_s: float, part: str, providers: Sequence[str]) -> Piece:
    return _bench(
        out, name, estimate_s, part, "--op", ",".join(MEMORY_OPS), "--dtype", "bf16",
        "--size", MEMORY_SIZE, "--mode", "forward,backward", "--provider", ",".join(providers),
        "--rounds", "10",
    )  # fmt: skip


def _steps(out: Path, model: str, estimate_s: float, part: str, providers: Sequence[str]) -> Piece:
    compiled = "-compile" if any("compile" in name for name in providers) else ""
    return _bench(
        out, f"steps-{model}{compiled}", estimate_s, part, "--steps", model,
        "--provider", ",".join(providers), "--rounds", "8",
    )  # fmt: skip


def _profiled(out: Path, family: str, size: str, kernel: str, part: str) -> Piece:
    """Three launches of a kernel under Nsight Compute, at the clocks of the other pieces."""
    ncu = shutil.which("ncu")
    name = f"ncu-{family}-{size.replace(',', 'x')}"
    command = [
        ncu or "ncu", "--csv", "--page", "raw", "--clock-control", "none",
        "--metrics", ",".join(METRICS), "--kernel-name", f"regex:^{kernel}$",
        "--launch-skip", "1", "--launch-count", "3",
        "--log-file", str(out / name / "ncu.csv"), sys.executable,
        str(BENCHMARKS / "run_kernel.py"), family, size, "--times", "4",
    ]  # fmt: skip
    why_not = None if ncu else "ncu (Nsight Compute) is not on PATH"
    return Piece(name, command, 20.0, part, why_not, refusals=REFUSALS, proof=kernel + r"\b")


def _tuned(out: Path, family: str, part: str) -> Piece:
    tune = str(BENCHMARKS / "tune.py")
    name = f"tune-{family}"
    command = [sys.executable, tune, "--family", family, "--out", str(out / name)]
    return Piece(name, command, 150.0, part)


def _hopper(out: Path, name: str, *more: str) -> Piece:
    """Changes made for Hopper, checked and timed against what they replaced."""
    command = [sys.executable, str(BENCHMARKS / "hopper.py"), *more, "--out", str(out / name)]
    refusals = {"this needs a Hopper GPU": "the settings are for Hopper"}
    return Piece(name, command, 60.0 if more else 120.0, MORE, refusals=refusals)


def _lora(out: Path, rank: int, part: str) -> Piece:
    name = f"lora-{rank}"
    command = [sys.executable, str(BENCHMARKS / "lora.py"), "--device", "cuda",
               "--ranks", str(rank), "--out", str(out / name)]  # fmt: skip
    why_not = None if installed("peft") else "peft is not installed"
    return Piece(name, command, 60.0, part, why_not)


def all_pieces(out: Path, cache: Path) -> list[Piece]:
    """Every piece, in the order of its value when time is short.

    Args:
        out: the folder of the run; each piece writes to one of its own name there.
        cache: the folder of Triton's cache, which the piece compile-headline fills if it is empty.
    """
    return [*_first(out, cache), *_more(out), *_everything(out)]


def _first(out: Path, cache: Path) -> Iterator[Piece]:
    """The most important pieces: the device, correctness, the headline."""
    python = sys.executable
    smi = shutil.which("nvidia-smi")
    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    yield Piece(
        "device-clocks", [smi or "nvidia-smi", f"--query-gpu={asked}", "--format=csv"], 2.0, DEVICE,
        None if smi else "no nvidia-smi on PATH", limit=10.0,
    )  # fmt: skip
    yield Piece("device-info", [python, "-m", "tridrop", "info"], 8.0, DEVICE, limit=20.0)
    files = groups(ROOT / "tests")
    yield _tests(out, "cuda", files["cuda"], 75.0, RIGHT, limit=90.0)
    # The table of cases, every row in three dtypes, computed by the kernels.
    yield _tests(
        out, "check", files["check"], 170.0, RIGHT,
        ["-k", TABLE], 180.0,
    )  # fmt: skip
    # Compile before anything is timed, on all cores.
    yield Piece(
        "compile-headline",
        [python, str(BENCHMARKS / "gpu.py"), "--precompile", str(cache), "--kernels", "headline",
         "--workers", str(workers())],
        25.0, COMPILE, limit=60.0,
    )  # fmt: skip
    yield _attention(out, LENGTHS[0], 100.0)
    yield _memory(out, "bench-memory", 85.0, HEADLINE, PROVIDERS["memory"])
    yield _steps(out, "gpt2", 60.0, HEADLINE, PROVIDERS["steps"])
    yield _attention(out, LENGTHS[1], 110.0)


def _more(out: Path) -> Iterator[Piece]:
    """The next most important pieces."""
    yield _hopper(out, "hopper")
    yield _hopper(out, "hopper-specialised", "--specialised")
    yield _memory(out, "bench-memory-compile", 110.0, MORE, ["eager", "torch.compile", "tridrop"])
    for model in ("bert", "vit"):
        yield _steps(out, model, 60.0, MORE, PROVIDERS["steps"])
    yield _lora(out, 16, MORE)
    yield from (_profiled(out, *about, MORE) for about in PROFILED[:FIRST_PROFILED])
    yield from (_tuned(out, family, MORE) for family in TUNE_ATTENTION)
    compiled = ["torch.compile", "tridrop+torch.compile"]
    yield from (_steps(out, model, 180.0, MORE, compiled) for model in ("gpt2", "bert", "vit"))


def _everything(out: Path) -> Iterator[Piece]:
    """The whole test suite, every size of every op, and all profiling and tuning: hours."""
    for name, files in groups(ROOT / "tests").items():
        if name == "check":
            yield _tests(out, "check-others", files, 200.0, ALL, ["-k", f"not ({TABLE})"])
        elif name != "cuda" and name not in NEED_NO_GPU:
            yield _tests(out, name, files, 200.0, ALL)
    for name, ops in BENCH.items():
        seconds = 1700.0 if name in ("norms", "attention") else 900.0
        yield _bench(
            out, f"bench-{name}", seconds, ALL, "--op", ",".join(ops), "--dtype", "bf16,fp32"
        )
    yield from (_lora(out, rank, ALL) for rank in (8, 64))
    yield from (_profiled(out, *about, ALL) for about in PROFILED[FIRST_PROFILED:])
    yield from (_tuned(out, family, ALL) for family in TUNE)
