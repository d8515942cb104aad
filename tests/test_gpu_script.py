"""benchmarks/gpu.py: its pieces, and what becomes of those that fail, hang or cannot run."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import lora  # noqa: E402

from tridrop import cli  # noqa: E402
from tridrop.bench import rows  # noqa: E402


def python(name, program, **about):
    return gpu.Piece(name, [sys.executable, "-c", program], **about)


def outcomes(out):
    found = json.loads((out / "summary.json").read_text())["pieces"]
    return {p["piece"]: p["outcome"] for p in found}


HANGS = """
import subprocess, sys, time, pathlib
child = "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
child += "time.sleep(4); pathlib.Path('{mark}').write_text('still here')"
subprocess.Popen([sys.executable, "-c", child])
print("begun", flush=True)
time.sleep(60)
"""
# Exits at once, and leaves something behind.
LEAVES = """
import subprocess, sys
child = "import time, pathlib; time.sleep(3); pathlib.Path('{mark}').write_text('still here')"
subprocess.Popen([sys.executable, "-c", child])
"""
READS = """
import json, pathlib
found = json.loads(pathlib.Path('{out}/summary.json').read_text())["pieces"]
assert [(p["piece"], p["outcome"]) for p in found] == [
    ("hangs", "time limit"), ("leaves", "passed"), ("fails", "failed"), ("reads", "running")], found
"""


def test_pieces_are_cut_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    marks = [tmp_path / "first", tmp_path / "second"]
    pieces = [
        python("hangs", HANGS.replace("{mark}", str(marks[0]))),
        python("leaves", LEAVES.replace("{mark}", str(marks[1]))),
        python("fails", "print('what is wrong'); raise SystemExit(3)"),
        python("reads", READS.replace("{out}", str(tmp_path))),
        python("absent", "raise SystemExit(1)", why_not="no such program"),
    ]
    start = time.monotonic()
    # Of the limit most is the start of Python on a busy machine.
    status = gpu.run_all(pieces, tmp_path, 3.0, {"device": "none"})
    assert status == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"] == "none"
    found = {p["piece"]: p for p in summary["pieces"]}
    assert outcomes(tmp_path) == {
        "hangs": "time limit", "leaves": "passed", "fails": "failed", "reads": "passed",
        "absent": "skipped",
    }  # fmt: skip
    assert found["hangs"]["seconds"] >= 3
    assert found["hangs"]["exit"] < 0
    assert (found["fails"]["exit"], found["fails"]["why"]) == (3, "exit status 3")
    assert "what is wrong" in (tmp_path / "fails.log").read_text()
    assert found["absent"]["why"] == "no such program"
    assert "exit" not in found["absent"]
    time.sleep(max(0.0, 9 - (time.monotonic() - start)))
    assert not any(mark.exists() for mark in marks), "a process of a piece that ended lives on"


def test_the_status_tells_whether_something_failed(tmp_path):
    good = python("good", "")
    skipped = python("skipped", "", why_not="nothing to do")
    assert gpu.run_all([good, skipped], tmp_path, 60, {}) == 0
    assert gpu.run_all([good, python("bad", "raise SystemExit(1)")], tmp_path, 60, {}) == 1


def test_a_refusal_is_skipped_with_its_reason_and_silence_is_a_failure(tmp_path):
    refused = "print('==ERROR== ERR_NVGPUCTRPERM - no permission'); raise SystemExit({status})"
    pieces = [
        python("refused", refused.format(status=1), refusals=gpu.REFUSALS, proof="kernel"),
        python("warned", refused.format(status=0), refusals=gpu.REFUSALS, proof="kernel"),
        python("broken", "print('kernel'); raise SystemExit(1)", refusals=gpu.REFUSALS),
        python("silent", "print('nothing')", refusals=gpu.REFUSALS, proof="kernel"),
        python("proven", "print('a kernel')", refusals=gpu.REFUSALS, proof="kernel"),
    ]
    assert gpu.run_all(pieces, tmp_path, 60, {}) == 1
    assert list(outcomes(tmp_path).values()) == [
        "skipped", "skipped", "failed", "failed", "passed",
    ]  # fmt: skip


def test_pieces_run_in_the_clone_and_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    program = (
        "import os, tridrop; assert 'TRITON_INTERPRET' not in os.environ;"
        f"assert tridrop.__file__.startswith({str(ROOT)!r}), tridrop.__file__"
    )
    assert gpu.run_all([python("place", program)], tmp_path, 120, {}) == 0


def test_counts_of_tests_are_in_the_summary(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip(reason='of it')\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += [f"--junitxml={tmp_path / 'tests.xml'}", str(tmp_path / "test_some.py")]
    assert gpu.run_all([gpu.Piece("tests", command)], tmp_path, 120, {}) == 1
    (result,) = json.loads((tmp_path / "summary.json").read_text())["pieces"]
    assert result["counts"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}


def test_every_test_file_is_in_one_group():
    groups = gpu.groups(ROOT / "tests")
    files = [file for group in groups.values() for file in group]
    assert sorted(files) == sorted((ROOT / "tests").glob("test_*.py"))
    assert all(groups.values()), "a group without files"
    commands = "\n".join(shlex.join(p.command) for p in gpu.test_pieces(Path("out")))
    left_out = {name for p in gpu.test_pieces(Path("out")) for name in p.left_out}
    for file in files:
        assert (f"tests/{file.name}" in commands) != (file.name in left_out), file.name


def test_files_that_need_what_is_missing_are_left_out_and_named(tmp_path):
    (tmp_path / "helper.py").write_text("import json\nfrom surely_missing.part import thing\n")
    sources = {
        "direct": "import numpy, surely_missing.part", "through": "import helper",
        "inside": "def f():\n    import surely_missing", "fine": "import tridrop, json",
    }  # fmt: skip
    found = {}
    for name, source in sources.items():
        file = tmp_path / f"test_{name}.py"
        file.write_text(source)
        found[name] = gpu.missing(file, tmp_path)
    missing = "surely_missing"
    assert found == {"direct": missing, "through": missing, "inside": None, "fine": None}


def test_the_pieces_name_what_there_is():
    tune_cases = pytest.importorskip("tune_cases")
    assert set(gpu.TUNE) == set(tune_cases.FAMILIES)
    for family, size, kernel in gpu.PROFILED:
        known = tune_cases.FAMILIES[family]
        assert (tuple(map(int, size.split(","))), kernel) == (
            next(s for s in known.sizes if ",".join(map(str, s)) == size), known.kernel,
        )  # fmt: skip
    ops = [op for ops in gpu.BENCH.values() for op in ops]
    assert set(ops) == set(rows.OPS)  # LoRA's products have a benchmark of their own
    pieces = gpu.all_pieces(Path("out"))
    assert len({piece.name for piece in pieces}) == len(pieces)
    for piece in pieces:
        kind, _, name = piece.name.partition("-")
        if kind in ("bench", "steps"):
            asked = cli.parser().parse_args(piece.command[piece.command.index("bench") :])
            given = tuple(asked.op) if kind == "bench" else asked.steps
            assert given == (gpu.BENCH[name] if kind == "bench" else [name])
        if kind == "lora":
            asked = lora.arguments(piece.command[2:])
            assert (asked.device, asked.ranks) == ("cuda", [int(name)])


def test_pieces_are_chosen_by_beginnings_and_unknown_ones_refused(capsys):
    assert gpu.main(["--list", "--piece", "tests-cuda", "env"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["env-smi", "env-info", "tests-cuda"]
    for arguments in (["--piece", "test"], ["--piece", "tests-cu"], ["--limit", "0"]):
        with pytest.raises(SystemExit) as stop:
            gpu.main(["--list", *arguments])
        assert stop.value.code == 2
    assert "no piece is or begins with 'test'" in capsys.readouterr().err


def test_a_dry_run_shows_commands_and_limits_and_runs_nothing(tmp_path, capsys):
    out = tmp_path / "results"
    assert gpu.main(["--dry-run", "--limit", "77", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.all_pieces(out))
    assert all("  77 s  " in line for line in lines)
    assert not out.exists()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
