"""The package as it is built and installed, and what stands beside it."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import tridrop

pytest.importorskip("build", reason="needs build, which the test extra has")
pytest.importorskip("hatchling", reason="needs hatchling, which the test extra has")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made of the sdist as installers make it, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tridrop").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "tridrop/py.typed" in names
    info = f"tridrop-{tridrop.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == sources
    assert f"{info}/licenses/LICENSE" in names


def test_its_metadata_says_what_it_is(built):
    wheel = zipfile.ZipFile(built[0])
    about = message_from_string(
        wheel.read(f"tridrop-{tridrop.__version__}.dist-info/METADATA").decode()
    )
    assert about["Name"] == "tridrop"
    assert about["Version"] == tridrop.__version__
    pythons = {c.rpartition(" ")[2] for c in about.get_all("Classifier") if "Python :: 3." in c}
    assert pythons == {f"3.{minor}" for minor in range(10, 15)}
    assert about["Requires-Python"] == ">=3.10"
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0] for line in needed}
    assert names == {"torch", "triton", "rich", "numba"}


def test_the_sdist_can_be_built_tested_and_read(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml",
        "constraints.txt", "run.py", "mkdocs.yml", "tests/conftest.py", "docs/index.md",
        "examples/doubt.ipynb",
    ):  # fmt: skip
        assert name in names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


SMOKE = """
import pathlib, sys, torch, tridrop
assert pathlib.Path(tridrop.__file__).is_relative_to(sys.prefix), tridrop.__file__
model = torch.nn.TransformerEncoderLayer(8, 2, 16)
assert tridrop.swap(model).counts()["left"] == 0
model(torch.ones(3, 1, 8)).sum().backward()
"""


def test_the_wheel_works_outside_of_the_clone(built, tmp_path):
    """In an environment of its own, with the libraries of this one."""
    place = tmp_path / "fresh"
    venv.create(place, with_pip=False)
    python = next(place.glob("bin/python"))
    libraries = next(place.glob("lib/python*/site-packages"))
    here = [path for path in sys.path if path.endswith("site-packages")]
    (libraries / "libraries.pth").write_text("\n".join(here))
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(libraries)]
    subprocess.run([sys.executable, *install, str(built[0])], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["TRIDROP_CPU"] = "torch"  # to compile the loops anew takes half a minute
    for arguments in (["-c", SMOKE], ["-m", "tridrop", "info"]):
        run = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    assert "backend reference: available" in run.stdout


def test_what_names_the_version_names_the_same():
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", cited, re.MULTILINE)[1] == tridrop.__version__
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert heading == tridrop.__version__


def test_the_job_for_public_runners_runs_commands_that_there_are():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = set(re.findall(r"run\.py (?:--cpu )?(\w+)", "\n".join(steps)))
    source = (ROOT / "run.py").read_text()
    assert commands == {"test", "matrix", "lint", "oldest", "site", "frameworks"}
    assert all(f'"{command}"' in source for command in commands)
    rows = [row["torch"] for row in jobs["test"]["strategy"]["matrix"]["include"]]
    matrix = (ROOT / "tests" / "matrix.py").read_text()
    torches = re.findall(r'Row\("([\d.]+)"', matrix)
    assert {row for row in rows if row != "pinned"} == {torches[0], torches[-1]}
    # A row of tests/matrix.py looks for its own Python, which the job has to set up.
    pythons = {r["torch"]: r["python"] for r in jobs["test"]["strategy"]["matrix"]["include"]}
    for row, python in re.findall(r'Row\("([\d.]+)", "([\d.]+)"', matrix):
        assert pythons.get(row, python) == python
    # The oldest and the newest Python that the package names.
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    ends = {named[0], named[-1]}
    pinned = {r["python"] for r in jobs["test"]["strategy"]["matrix"]["include"]}
    assert ends <= pinned
    assert ends == set(jobs["package"]["strategy"]["matrix"]["python"])


def test_a_python_has_one_pin_of_a_package():
    """A pin that only newer Pythons have leaves an older one another, and not two or none."""
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [requirements.Requirement(line) for line in lines if line and line[0] != "#"]
    for minor in range(10, 15):
        here = {"python_version": f"3.{minor}"}
        names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(here)]
        assert len(names) == len(set(names)), minor
        missing = {pin.name for pin in pins} - set(names)
        assert missing <= {"keras", "keras-hub"}, (
            minor
        )  # which pyproject.toml asks for from 3.11 on
