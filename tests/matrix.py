#!/usr/bin/env python3
"""The tests that depend on versions, with the versions that people install.

    python3 run.py matrix [ROW ...] [--again] [--only GROUP ...] [--list]

Each row is an environment of its own under .matrix: a torch with the triton it comes with, a
transformers, and a Python. torch comes as pip finds it, with its CUDA packages: some gigabytes a
row, and an hour for all on two cores. The rows that are wanted are named by their torch, all
without a name. A group of tests is run once for each state of the sources; a run that was stopped
goes on where it was, and --again runs what is done already.

A Python that a row asks for is looked for on the path and among pyenv's, and a row whose Python is
missing is told of as such. Results go to benchmarks/results/matrix.json, which README's table is
made of.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


class Row(NamedTuple):
    """An environment: its Python, and what pip is asked for beside the test extra."""

    torch: str
    python: str
    packages: tuple[str, ...]
    torchvision: str  # installed without its requirements, as run.py does


ROWS = (
    # Triton 3.6's interpreter takes a loop's bounds from arrays of one number, as NumPy before 2.4.
    Row("2.11.0", "3.12", ("triton==3.6.0", "transformers==5.17.0", "numpy<2.4"), "0.26.0"),
    # The newest transformers for Python 3.10.
    Row("2.12.1", "3.10", ("transformers==5.20.2",), "0.27.1"),
    Row("2.13.0", "3.11", ("triton==3.7.1", "transformers==5.24.0"), "0.28.0"),
    Row("2.14.1", "3.13", ("transformers==5.24.0",), "0.29.1"),
    Row("2.15.0", "3.13", ("triton==3.9.0", "transformers"), "0.29.2"),
)

# What depends on versions, by the part of a library that it leans on.
GROUPS: dict[str, tuple[str, ...]] = {
    "private names of torch": ("tests/project/test_torch_private.py",),
    "torch.compile": ("tests/ops/test_compiled_gradients.py", "tests/ops/test_torch.py"),
    "activation checkpointing": (
        "tests/contract/test_recomputation.py",
        "tests/swapping/test_swap_recomputation.py",
    ),
    "torch.func": ("tests/ops/test_vmap.py",),
    "DTensor and processes": (
        "tests/distributed/test_distributed.py",
        "tests/swapping/test_swap_distributed.py",
    ),
    "export, tracing, ONNX": (
        "tests/swapping/test_export.py",
        "tests/swapping/test_trace.py",
        "tests/swapping/test_onnx.py",
    ),
    "swap of torch.nn": (
        "tests/swapping/test_swap_torch.py",
        "tests/swapping/test_swap_lifecycle.py",
    ),
    "swap of transformers": (
        "tests/swapping/test_swap_transformers.py",
        "tests/integrations/test_transformers_attention.py",
        "tests/integrations/test_transformers_config.py",
    ),
    "swap of PEFT and timm": (
        "tests/integrations/test_lora_peft.py",
        "tests/integrations/test_lora_peft_states.py",
        "tests/swapping/test_swap_timm.py",
    ),
    "Triton's interpreter": (
        "tests/ops/test_elementwise.py",
        "tests/ops/test_norm.py",
        "tests/ops/test_attention.py",
        "tests/ops/test_softmax.py",
    ),
    "Triton's launchers": (
        "tests/benchmarks/test_gpu_rehearsal.py",
        "tests/benchmarks/test_gpu_cache.py",
    ),
    "machine code": (
        "tests/backends/test_machine_code.py",
        "tests/backends/test_attention_machine_code.py",
        "tests/backends/test_product_machine_code.py",
    ),
}


def sources() -> str:
    """A number of what is tested: every file of the package and of the tests, as it is now."""
    sha = hashlib.sha256()
    for folder in ("tridrop", "tests", "benchmarks/gpu_plan"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__).resolve():
                sha.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def find_python(version: str) -> str | None:
    """A Python of that version: on the path, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}*/bin/python"))]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        found = subprocess.run(asked, capture_output=True, text=True)
        if found.stdout.strip() == version:
            return candidate
    return None


class Environment:
    """A row's environment, made where it is missing or was made of something else."""

    def __init__(self, row: Row) -> None:
        self.row, self.folder = row, FOLDER / row.torch
        self.python = self.folder / "bin" / "python"

    def set_up(self) -> None:
        wanted = json.dumps([self.row, (ROOT / "pyproject.toml").read_text()])
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        print(f"Setting up {self.folder} ...", flush=True)
        stamp.unlink(missing_ok=True)
        if not self.python.exists():
            base = find_python(self.row.python)
            assert base is not None
            subprocess.run([base, "-m", "venv", str(self.folder)], check=True)
        self._pip(f"torch=={self.row.torch}", *self.row.packages, "-e", ".[demo,test]")
        self._pip("--no-deps", "timm==1.0.31", f"torchvision=={self.row.torchvision}")
        stamp.write_text(wanted)

    def _pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*command, *arguments], cwd=ROOT, check=True)

    def versions(self) -> dict[str, str]:
        names = ("torch", "triton", "transformers", "peft", "timm", "numpy", "numba")
        code = (
            "import importlib.metadata as m, json, platform; "
            f"print(json.dumps({{'python': platform.python_version(), "
            f"**{{n: m.version(n) for n in {names!r}}}}}))"
        )
        text = subprocess.run([str(self.python), "-c", code], check=True, capture_output=True)
        found: dict[str, str] = json.loads(text.stdout)
        return found

    def run(self, files: Sequence[str], workers: int) -> dict[str, Any]:
        """The counts of a group of tests, and the names of those that fail."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            options = ["-q", "-n", str(workers), "-p", "no:cacheprovider", f"--junitxml={report}"]
            command = [str(self.python), "-m", "pytest", *options, *files]
            status = subprocess.run(command, cwd=ROOT).returncode
            if status not in (0, 1) or not report.exists():
                return {"passed": 0, "skipped": 0, "failed": [f"pytest ended with {status}"]}
            cases = list(xml.parse(report).getroot().iter("testcase"))
        failed = [
            f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        skipped = sum(case.find("skipped") is not None for case in cases)
        return {
            "passed": len(cases) - skipped - len(failed),
            "skipped": skipped,
            "failed": sorted(failed),
        }


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def save(results: dict[str, Any]) -> None:
    """Written whole or not at all: a run may be stopped anywhere."""
    beside = RESULTS.with_suffix(".partial")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(beside, RESULTS)


def table(results: dict[str, Any]) -> str:
    """README's table: a line for each row of which there are results."""
    lines = [
        "| torch | triton | transformers | Python | tests that depend on versions |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(results, key=lambda n: [int(part) for part in n.split(".")]):
        row = results[name]
        versions, groups = row["versions"], row["groups"]
        passed = sum(group["passed"] for group in groups.values())
        failed = sum(len(group["failed"]) for group in groups.values())
        missing = [g for g in GROUPS if g not in groups]
        told = f"{passed:,} pass" + (f", {failed} fail" if failed else "")
        told += f"; not run: {', '.join(missing)}" if missing else ""
        lines.append(
            f"| {versions['torch'].split('+')[0]} | {versions['triton']} | "
            f"{versions['transformers']} | {versions['python']} | {told} ({row['date']}) |"
        )
    return "\n".join(lines)


def write_readme(results: dict[str, Any]) -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def run_row(row: Row, options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Run what is not done yet; whether everything passed."""
    if find_python(row.python) is None:
        print(f"torch {row.torch}: there is no Python {row.python} here; the row is not run")
        return False
    environment = Environment(row)
    environment.set_up()
    versions, tested = environment.versions(), sources()
    known = results.get(row.torch, {})
    if known.get("versions") != versions:
        known = {"versions": versions, "groups": {}}
    for name in options.only:
        done = known["groups"].get(name)
        if done is not None and done["sources"] == tested and not options.again:
            continue
        print(f"torch {row.torch}: {name}", flush=True)
        known["groups"][name] = {
            **environment.run(GROUPS[name], options.workers),
            "sources": tested,
        }
        known["date"] = datetime.date.today().isoformat()
        results[row.torch] = known
        save(results)
    return not any(group["failed"] for group in known["groups"].values())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py matrix", description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a torch, such as 2.15.0")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--workers", type=int, default=2, help="processes that test; default 2")
    parser.add_argument("--list", action="store_true", help="say the rows and groups, and end")
    options = parser.parse_args(arguments)
    by_name = {row.torch: row for row in ROWS}
    unknown = [name for name in options.rows if name not in by_name]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(by_name)}")
    if options.list:
        for row in ROWS:
            print(f"torch {row.torch}, Python {row.python}: {', '.join(row.packages)}")
        for name, files in GROUPS.items():
            print(f"{name}: {', '.join(files)}")
        return 0
    results = load()
    passed = [run_row(by_name[name], options, results) for name in options.rows or by_name]
    write_readme(results)
    print(table(results))
    for name, row in results.items():
        for group, found in row["groups"].items():
            for test in found["failed"]:
                print(f"torch {name}, {group}: {test}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
