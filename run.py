#!/usr/bin/env python3
"""Set up a virtual environment and run one of the project's commands in it.

    python3 run.py demo [options of tridrop demo]   run the demo (--model installs transformers)
    python3 run.py test [options of pytest]         run the tests
    python3 run.py lint                             run ruff and mypy
    python3 run.py site                             build the documentation site, in site/
    python3 run.py build                            build a wheel and an sdist, in dist/
    python3 run.py oldest [options of pytest]       test with the oldest supported transformers
    python3 run.py frameworks [options of pytest]   test other frameworks; Python 3.11 and clang
    python3 run.py matrix [options, see --help]     test many versions; downloads gigabytes

It needs Python 3.10 or newer and a clone of the repository. The environment is .venv beside
this file, and is made once. On a machine without an NVIDIA GPU it gets the CPU build of torch,
which needs no CUDA packages; `--cuda` or `--cpu` before the command overrides this choice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {
    "demo": "demo",
    "test": "demo,test",
    "oldest": "demo,test",
    "frameworks": "demo,test",
    "lint": "demo,test,dev",
    "site": "docs",
    "build": "demo,test,dev",
}
# Two processes, which take whole files: what the tests of a file share is then made once.
TESTS = ["-m", "pytest", "-n", "2", "--dist", "loadfile"]
COMMANDS = {
    "demo": [["-m", "tridrop", "demo"]],
    "test": [TESTS],
    "site": [["-m", "mkdocs", "build"]],
    "build": [["-m", "build"]],
    "lint": [["-m", "ruff", "check"], ["-m", "ruff", "format", "--check"], ["-m", "mypy"]],
}
# These are installed without their requirements, which the test extra includes: torchvision
# requires a certain build of torch, and pip would replace the CPU build by it.
BARE = ("timm", "torchvision", "keras-hub")
# Other requirements of KerasHub, which only its downloads and tokenizers need, not its models.
# tensorflow-text would install TensorFlow.
NOT_NEEDED = {"keras-hub": ("kagglehub", "kagglesdk", "sentencepiece", "tensorflow-text")}
# The oldest transformers has its own folder, which comes before the environment's on the path.
OLDEST = ENVIRONMENT / "oldest"
MATRIX = ROOT / "tests" / "matrix.py"
# Other frameworks have an environment on top of this one, which stays as it is.
FRAMEWORKS = ENVIRONMENT / "frameworks"
PORTING = ROOT / "benchmarks" / "porting"
FACTS_CHANGED = 3  # the status that its facts.py exits with
OLDEST_TESTS = ("test_environment.py", "test_*transformers*.py")


def pinned(package: str) -> str:
    """The line of constraints.txt for a package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def pip(*arguments: str, attempt: bool = False, python: Path = PYTHON) -> bool:
    """Install; returns whether it succeeded. An attempt may fail, quietly."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    silenced = subprocess.DEVNULL if attempt else None
    run = subprocess.run([*command, *arguments], cwd=ROOT, check=not attempt, stderr=silenced)
    return run.returncode == 0


def install_torch(cpu: bool) -> None:
    """Install torch first and alone, so that the other packages find it installed."""
    torch = pinned("torch")
    if not cpu or sys.platform != "linux":
        pip(torch)
    # Try the configured index or wheel folder for a "+cpu" build first, then torch's own index.
    elif not pip(f"{torch}+cpu", attempt=True):
        pip(f"{torch}+cpu", "--index-url", CPU_INDEX)


def set_up(extras: str, cpu: bool) -> None:
    """Make the environment if it is missing, and install if the requirements changed."""
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"".join([*inputs, extras.encode(), bytes([cpu])])).hexdigest()
    stamp = ENVIRONMENT / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Setting up {ENVIRONMENT} ...", flush=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    install_torch(cpu)
    pip("-e", f".[{extras}]", "-c", "constraints.txt")
    if "test" in extras.split(","):
        pip("--no-deps", *map(pinned, BARE))
    elif "hf" in extras.split(","):
        # transformers imports torchvision if it is installed, and that one works only in the tests.
        remove = [str(PYTHON), "-m", "pip", "uninstall", "-q", "-y", *BARE]
        subprocess.run(remove, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    stamp.write_text(wanted)


def oldest_transformers() -> str:
    """The lower bound in pyproject.toml, in the form x.y.z."""
    text = (ROOT / "pyproject.toml").read_text()
    (bound,) = re.findall(r'"transformers>=([\d.]+)"', text)
    return ".".join([*bound.split("."), "0", "0"][:3])


def run_oldest(rest: list[str]) -> int:
    """Run the tests of transformers with its oldest version, in the same environment."""
    version, stamp = oldest_transformers(), OLDEST / "installed"
    if not stamp.exists() or stamp.read_text() != version:
        print(f"Setting up {OLDEST} ...", flush=True)
        shutil.rmtree(OLDEST, ignore_errors=True)
        pip("--target", str(OLDEST), f"transformers=={version}")
        stamp.write_text(version)
    # test_environment.py checks that this is the version that is imported.
    environment = {**os.environ, "PYTHONPATH": str(OLDEST), "TRIDROP_TEST_TRANSFORMERS": version}
    files = [str(path) for name in OLDEST_TESTS for path in sorted((ROOT / "tests").rglob(name))]
    return subprocess.run(
        [str(PYTHON), *TESTS, *files, *rest], cwd=ROOT, env=environment
    ).returncode


def run_frameworks(rest: list[str]) -> int:
    """Test the masks in other frameworks, facts that the docs state about these, and the ports."""
    requirements = PORTING / "requirements.txt"
    python, stamp = FRAMEWORKS / PYTHON.relative_to(ENVIRONMENT), FRAMEWORKS / "installed"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"Setting up {FRAMEWORKS} ...", flush=True)
        shutil.rmtree(FRAMEWORKS, ignore_errors=True)
        subprocess.run([str(PYTHON), "-m", "venv", str(FRAMEWORKS)], check=True)
        below = "import sysconfig; print(sysconfig.get_path('purelib'))"
        folders = [
            subprocess.run([str(p), "-c", below], check=True, capture_output=True, text=True)
            for p in (PYTHON, python)
        ]
        base, above = (Path(run.stdout.strip()) for run in folders)
        (above / "below.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
        pip("-r", str(requirements), "-c", "constraints.txt", python=python)
        stamp.write_text(requirements.read_text())
    # A crash inside a framework then says where.
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONFAULTHANDLER": "1"}
    steps = [(["-m", "pytest", str(ROOT / "tests" / "masks" / "frameworks.py"), *rest], {})]
    for path in sorted([*PORTING.glob("*_facts.py"), *PORTING.glob("port_*.py")]):
        backends = ["torch"]
        if "tensorflow" in path.name:
            # TensorFlow imports Keras. On its torch backend that imports Triton, and Triton 3.7.1
            # ends the process when it is imported after TensorFlow 2.21.
            backends = ["tensorflow"]
        elif "keras" in path.name:
            backends += ["tensorflow"]
            backends += ["jax"] if path.name == "keras_facts.py" else []
        steps += [([str(path)], {"KERAS_BACKEND": backend}) for backend in backends]
    failed = []
    for command, environment in steps:
        script = next(part for part in command if part.endswith(".py"))
        name = " ".join([Path(script).name, *environment.values()])
        print(f"--- {name}", flush=True)
        status = subprocess.run(
            [str(python), *command], cwd=ROOT, env=quiet | environment
        ).returncode
        if status:
            # A script of facts says itself which have changed, and where all hold says that last.
            end = f"ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            end = "facts have changed" if status == FACTS_CHANGED else end
            print(f"--- {name}: {end}", flush=True)
            failed.append(f"{name} ({end})")
    print(f"failed: {', '.join(failed)}" if failed else f"{len(steps)} steps passed")
    return bool(failed)


def main(arguments: list[str]) -> int:
    cpu = shutil.which("nvidia-smi") is None
    if arguments and arguments[0] in ("--cpu", "--cuda"):
        cpu = arguments.pop(0) == "--cpu"
    if arguments[:1] == ["matrix"]:  # it makes its own environments
        return subprocess.run([sys.executable, str(MATRIX), *arguments[1:]], cwd=ROOT).returncode
    if sys.version_info < (3, 10) or not arguments or arguments[0] not in EXTRAS:
        print(__doc__, file=sys.stderr)
        return 2
    command, *rest = arguments
    extras = EXTRAS[command]
    if command == "demo" and any(a.partition("=")[0] == "--model" for a in rest):
        extras += ",hf"
    set_up(extras, cpu)
    if command == "oldest":
        return run_oldest(rest)
    if command == "frameworks":
        return run_frameworks(rest)
    for step in COMMANDS[command]:
        status = subprocess.run([str(PYTHON), *step, *rest], cwd=ROOT).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
