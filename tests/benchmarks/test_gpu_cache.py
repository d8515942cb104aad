"""Kernels compiled before the clock runs: filled without a GPU, moved, taken, and enough."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_plan import cache, pieces, running  # noqa: E402

# Compile what a headline row launches, against a driver that launches nothing; count.
PROGRAM = """
import json, sys
sys.path[:0] = [{clone!r}, {benchmarks!r}]
from gpu_plan import cache, stub
with stub.launching(90), stub.counting() as counts:
    cache.perform("row", 0)
print(json.dumps([counts.hits, counts.misses]))
"""


def launch(folder, clone=ROOT):
    """(found in the cache, compiled) by a process of its own."""
    program = PROGRAM.format(clone=str(clone), benchmarks=str(clone / "benchmarks"))
    environ = running.environment(folder) | {"TRITON_STORE_BINARY_ONLY": "1", "PYTHONPATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return tuple(json.loads(found.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with the kernels of one row."""
    folder = tmp_path_factory.mktemp("cache")
    hits, misses = launch(folder)
    assert hits == 0
    assert misses == cache.count(folder) > 1
    about = {**cache.identity(), "arch": 90, "kernels": cache.kernels(), "sets": ["headline"]}
    (folder / cache.MANIFEST).write_text(json.dumps(about))
    cache.trim(folder)
    return folder


def test_launches_take_a_moved_cache_and_compile_nothing(filled, tmp_path):
    """In another clone and from another folder, after the first is gone."""
    clone, moved, taken = tmp_path / "clone", tmp_path / "moved", tmp_path / "taken"
    for name in ("tridrop", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    shutil.copytree(filled, moved)
    for group in moved.glob("*/__grp__*.json"):  # what they name is no longer there
        group.write_text(group.read_text().replace(str(filled), str(tmp_path / "gone")))
    said = cache.take(moved, taken, 90)
    assert said == f"{cache.count(filled)} kernels for sm_90, Triton {triton.__version__}"
    shutil.rmtree(moved)
    assert launch(taken, clone) == (cache.count(filled), 0)


def test_a_cache_is_packed_and_taken_from_its_archive(filled, tmp_path):
    packed = shutil.make_archive(str(tmp_path / "kernels"), "gztar", filled)
    taken = tmp_path / "taken"
    cache.take(Path(packed), taken, 90)
    assert cache.count(taken) == cache.count(filled)
    group = next(taken.glob("*/__grp__*.json"))
    assert all(Path(p).exists() for p in json.loads(group.read_text())["child_paths"].values())


@pytest.mark.parametrize(
    ("change", "said"),
    [({"triton": "3.0.0"}, "triton 3.0.0, here"), ({"arch": 80}, "arch 80, here 90"),
     ({"triton_files": "others"}, "triton_files others, here")],
)  # fmt: skip
def test_a_cache_of_another_triton_or_gpu_is_a_miss(filled, tmp_path, change, said):
    other = tmp_path / "other"
    shutil.copytree(filled, other)
    about = json.loads((other / cache.MANIFEST).read_text())
    (other / cache.MANIFEST).write_text(json.dumps(about | change))
    with pytest.raises(cache.Mismatch, match=said):
        cache.take(other, tmp_path / "taken", 90)


def test_a_run_says_hit_or_miss(filled, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    count = cache.count(filled)
    assert gpu._cache(None, tmp_path / "a") == "none was given"
    assert gpu._cache(filled, tmp_path / "b").startswith(f"hit: {count} kernels for sm_90")
    assert cache.complete(tmp_path / "b", "headline")
    assert not cache.complete(tmp_path / "b", "tests")
    assert (
        gpu._cache(tmp_path / "nowhere", tmp_path / "c") == f"miss: there is no {tmp_path}/nowhere"
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (10, 0))
    assert gpu._cache(filled, tmp_path / "d") == "miss: it is for arch 90, here 100"
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(cache, "kernels", lambda: "mended")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert gpu._cache(filled, tmp_path / "e").endswith(", of kernels that have changed since")
    assert not cache.complete(tmp_path / "e", "headline")


def test_precompile_fills_a_cache_from_the_tests_that_will_run(tmp_path, monkeypatch, capsys):
    """Of one small case; what its kernels computed was never there, and that is no matter."""
    case = "test_every_case_holds[triton-float32-dropout: plain [6, 11, 40]]"
    case = f"tests/commands/test_check.py::{case}"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider",
               "--junitxml=nowhere.xml", case]  # fmt: skip
    small = pieces.Piece("tests-small", command, 1.0, pieces.RIGHT)
    monkeypatch.setattr(gpu, "all_pieces", lambda out, folder: [small])
    folder = tmp_path / "cache"
    options = ["--precompile", str(folder), "--kernels", "tests", "--workers", "1"]
    assert gpu.main([*options, "--triton", triton.__version__]) == 0
    said = capsys.readouterr().out
    assert f"{cache.count(folder)} kernels for sm_90, Triton {triton.__version__}" in said
    assert cache.count(folder) >= 2
    assert (tmp_path / "cache.tar.gz").stat().st_size < 2**20
    assert cache.complete(folder, "tests")
    assert not cache.complete(folder, "headline")
    about = json.loads((folder / cache.MANIFEST).read_text())
    assert about["arch"] == 90
    assert "TRITON_CACHE_DIR" not in os.environ or os.environ["TRITON_CACHE_DIR"] != str(folder)


def test_precompile_fills_a_cache_with_the_headline_in_processes(tmp_path, monkeypatch):
    """Of the row that compiles soonest; run again it compiles nothing."""
    monkeypatch.setattr(cache, "jobs", lambda: iter([("row", 0)]))
    about = cache.precompile(tmp_path, ["headline"], 90, 2, [])
    assert about["compiled"] == about["count"] == cache.count(tmp_path) > 1
    assert "TRITON_STORE_BINARY_ONLY" not in os.environ
    assert cache.precompile(tmp_path, ["headline"], 90, 1, [])["compiled"] == 0
    assert cache.precompile(tmp_path, ["tests"], 90, 1, [])["sets"] == ["tests", "headline"]
    monkeypatch.setattr(cache, "jobs", lambda: iter([]))
    with pytest.raises(RuntimeError, match="the headline launched nothing"):
        cache.precompile(tmp_path / "other", ["headline"], 90, 1, [])


def test_another_triton_than_the_one_asked_for_is_refused(tmp_path, capsys):
    assert gpu.main(["--precompile", str(tmp_path / "cache"), "--triton", "3.0.1"]) == 2
    assert f"has Triton {triton.__version__}, not 3.0.1" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_tests_that_cannot_be_run_are_an_error(tmp_path):
    command = [sys.executable, "-m", "pytest", "-n", "1", "tests/there_is_none.py"]
    missing = pieces.Piece("tests-none", command, 1.0, pieces.RIGHT)
    with pytest.raises(RuntimeError, match="tests-none did not run"):
        cache.precompile(tmp_path, ["tests"], 90, 1, [missing])


def test_the_headline_is_compiled_in_parts_for_every_row_and_a_step():
    jobs = list(cache.jobs())
    rows = {i for kind, i in jobs if kind == "row"}
    assert rows == {i for kind, i in jobs if kind == "check"} == set(range(15))
    assert ("step", 0) in jobs
