"""benchmarks/gpu.py: its pieces, its budget, and what becomes of those that fail or hang."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import lora  # noqa: E402
from gpu_plan import context, headline, pieces, running  # noqa: E402
from gpu_plan.pieces import Piece  # noqa: E402

from tridrop.commands import cli  # noqa: E402
from tridrop.commands.bench import rows  # noqa: E402


def python(name, program, estimate_s=1.0, **about):
    return Piece(name, [sys.executable, "-c", program], estimate_s, **about)


def run(given, out, seconds=600.0, earlier=None):
    """Run pieces; the status and what was found of each."""
    found = []
    status = running.run_all(
        given, out, out / "triton", running.Budget(seconds), earlier or {},
        lambda results: found.append([dict(r) for r in results]),
    )  # fmt: skip
    return status, {r["piece"]: r for r in found[-1]}, found


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


def test_pieces_are_cut_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.5)
    marks = [tmp_path / "first", tmp_path / "second"]
    given = [
        # Of the limit most is the start of Python on a busy machine.
        python("hangs", HANGS.replace("{mark}", str(marks[0])), limit=3.0),
        python("leaves", LEAVES.replace("{mark}", str(marks[1])), limit=60.0),
        python("fails", "print('what is wrong'); raise SystemExit(3)", limit=60.0),
        python("absent", "raise SystemExit(1)", why_not="no such program"),
    ]
    start = time.monotonic()
    status, found, saved = run(given, tmp_path)
    assert status == 1
    assert {n: r["outcome"] for n, r in found.items()} == {
        "hangs": "time limit", "leaves": "passed", "fails": "failed", "absent": "skipped",
    }  # fmt: skip
    assert found["hangs"]["seconds"] >= 3
    assert found["hangs"]["exit"] < 0
    assert (found["fails"]["exit"], found["fails"]["why"]) == (3, "exit status 3")
    assert "what is wrong" in (tmp_path / "fails" / "log.txt").read_text()
    assert found["absent"]["why"] == "no such program"
    assert "exit" not in found["absent"]
    # Saved before a piece begins, too: a cut from outside says which one it met.
    assert [(r["piece"], r["outcome"]) for r in saved[2]] == [
        ("hangs", "time limit"), ("leaves", "passed"), ("fails", "running"),
    ]  # fmt: skip
    time.sleep(max(0.0, 9 - (time.monotonic() - start)))
    assert not any(mark.exists() for mark in marks), "a process of a piece that ended lives on"


def test_what_does_not_fit_is_left_and_what_does_still_runs(tmp_path):
    given = [python("long", "", 50.0), python("short", "", 3.0), python("longer", "", 70.0)]
    status, found, _ = run(given, tmp_path, seconds=20.0 + running.PACKING)
    assert status == 0
    assert {n: r["outcome"] for n, r in found.items()} == {
        "long": "no time left", "short": "passed", "longer": "no time left",
    }  # fmt: skip
    assert found["long"]["why"].startswith("50 s expected, ")
    assert not (tmp_path / "long").exists()


def test_the_budget_cuts_a_piece_that_its_own_limit_would_not(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.5)
    given = [python("hangs", "import time; time.sleep(60)", 1.0, limit=50.0)]
    status, found, _ = run(given, tmp_path, seconds=4.0 + running.PACKING)
    assert (status, found["hangs"]["outcome"]) == (1, "time limit")
    assert found["hangs"]["seconds"] < 20


def test_a_part_has_a_share_of_the_budget():
    now = [0.0]
    budget = running.Budget(780.0, lambda: now[0])
    assert budget.left(pieces.RIGHT) == 270
    budget.spend(pieces.RIGHT, 250.0)
    now[0] = 250.0
    assert budget.left(pieces.RIGHT) == 20
    assert budget.left(pieces.HEADLINE) == 360
    assert budget.left(pieces.MORE) == 530 - running.PACKING
    now[0] = 770.0
    assert budget.left(pieces.HEADLINE) == 10 - running.PACKING


def test_what_passed_earlier_is_not_run_again(tmp_path):
    given = [python("done", "raise SystemExit(1)"), python("new", "")]
    status, found, _ = run(given, tmp_path, earlier={"done": "20261127T000000Z"})
    assert status == 0
    assert found["done"]["outcome"] == "skipped"
    assert found["done"]["why"] == "passed in the run of 20261127T000000Z"
    assert found["new"]["outcome"] == "passed"


def test_sigterm_ends_the_piece_and_keeps_what_there_is(tmp_path):
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
from pathlib import Path
from gpu_plan import running
from gpu_plan.pieces import Piece
import json
sleeps = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
pieces = [Piece("first", [sys.executable, "-c", ""], 1.0),
          Piece("sleeps", sleeps, 1.0, limit=50.0), Piece("after", sleeps, 1.0)]
out = Path({str(tmp_path)!r})
def save(found):
    (out / "found.json").write_text(json.dumps(found))
raise SystemExit(running.run_all(pieces, out, out / "triton", running.Budget(600), {{}}, save))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    log = tmp_path / "sleeps" / "log.txt"
    for _ in range(600):
        if log.exists() and "begun" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(r["piece"], r["outcome"]) for r in found] == [
        ("first", "passed"), ("sleeps", "interrupted"),
    ]  # fmt: skip


def test_the_status_tells_whether_something_failed(tmp_path):
    good = python("good", "", limit=60.0)
    skipped = python("skipped", "", why_not="nothing to do")
    assert run([good, skipped], tmp_path)[0] == 0
    assert run([good, python("bad", "raise SystemExit(1)", limit=60.0)], tmp_path)[0] == 1


def test_a_refusal_is_skipped_with_its_reason_and_silence_is_a_failure(tmp_path):
    refused = "print('==ERROR== ERR_NVGPUCTRPERM - no permission'); raise SystemExit({status})"
    about = {"refusals": pieces.REFUSALS, "limit": 60.0}
    given = [
        python("refused", refused.format(status=1), proof="kernel", **about),
        python("warned", refused.format(status=0), proof="kernel", **about),
        python("broken", "print('kernel'); raise SystemExit(1)", **about),
        python("silent", "print('nothing')", proof="kernel", **about),
        python("proven", "print('a kernel')", proof="kernel", **about),
    ]
    status, found, _ = run(given, tmp_path)
    assert status == 1
    assert [r["outcome"] for r in found.values()] == [
        "skipped", "skipped", "failed", "failed", "passed",
    ]  # fmt: skip


def test_pieces_run_in_the_clone_and_compile_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    program = (
        "import os, tridrop, gpu_plan; assert 'TRITON_INTERPRET' not in os.environ;"
        f"assert tridrop.__file__.startswith({str(ROOT)!r}), tridrop.__file__;"
        f"assert os.environ['TRITON_CACHE_DIR'] == {str(tmp_path / 'triton')!r}"
    )
    assert run([python("place", program, limit=120.0)], tmp_path)[0] == 0


TESTED = """
import pytest
def test_a(): pass
def test_b(): assert 0
@pytest.mark.skip(reason='of it')
def test_c(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "a worker"])
@pytest.mark.parametrize("junit", [True, False], ids=["with JUnit", "with the log alone"])
def test_counts_of_tests_are_in_the_summary(tmp_path, workers, junit):
    """A piece that was killed has no JUnit file: its log says what was found until then."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(TESTED)
    command = [sys.executable, "-m", "pytest", "-v", "-c", "/dev/null", "--rootdir", str(tmp_path),
               "-p", "no:cacheprovider", *workers, str(folder)]  # fmt: skip
    if junit:
        command.append(f"--junitxml={tmp_path / 'out' / 'tests' / 'tests.xml'}")
    _, found, _ = run([Piece("tests", command, 1.0, limit=200.0)], tmp_path / "out")
    result = found["tests"]
    assert result["outcome"] == "failed"
    assert result["counts"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    (name,) = result["failed_tests"]
    assert name.endswith("tests/test_some.py::test_b")


def test_a_worker_with_a_broken_context_ends_and_the_rest_is_tested(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import pytest, torch\n"
        "torch.cuda.is_available = torch.cuda.is_initialized = lambda: True\n"
        "bad = []\n"
        "def wait():\n"
        "    if bad: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "torch.cuda.synchronize = wait\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test_each(i):\n"
        "    assert not bad, 'the context is broken'\n"
        "    if i == 2: bad.append(1); assert False, 'a wrong address'\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-n", "1", "-c", "/dev/null", "--rootdir",
               str(tmp_path), "-p", "gpu_plan.context", "-p", "no:cacheprovider",
               str(folder)]  # fmt: skip
    _, found, _ = run([Piece("tests", command, 1.0, limit=200.0)], tmp_path / "out")
    (name,) = found["tests"]["failed_tests"]
    assert name.endswith("tests/test_some.py::test_each[2]")
    log = (tmp_path / "out" / "tests" / "log.txt").read_text()
    lines = [line for line in log.splitlines() if " PASSED " in line]
    assert all(any(f"test_each[{i}]" in line for line in lines) for i in (0, 1, 3, 4, 5))
    assert "replacing crashed worker" in log
    assert not context.broken()  # there is no device here


def test_every_test_file_is_in_one_group_and_all_but_those_that_compile_are_run():
    groups = pieces.groups(ROOT / "tests")
    files = [file for group in groups.values() for file in group]
    assert sorted(files) == sorted((ROOT / "tests").rglob("test_*.py"))
    assert all(groups.values()), "a group without files"
    every = pieces.all_pieces(Path("out"), Path("triton"))
    tests = [p for p in every if p.name.startswith("tests-")]
    commands = "\n".join(shlex.join(p.command) for p in tests)
    left_out = {name for p in tests for name in p.left_out}
    for name, group in groups.items():
        for file in group:
            run_there = f"{file.parent.name}/{file.name}" in commands
            wanted = name not in pieces.NEED_NO_GPU and file.name not in left_out
            assert run_there == wanted, file.name


def test_without_pytests_plugins_the_tests_run_or_say_why_not(monkeypatch):
    def tests_of(*missing):
        monkeypatch.setattr(pieces, "installed", lambda name: name not in missing)
        every = pieces.all_pieces(Path("out"), Path("triton"))
        return next(p for p in every if p.name == "tests-cuda")

    assert "--timeout" in tests_of().command
    without = tests_of("pytest-timeout")
    assert "--timeout" not in without.command
    assert "needs pytest-timeout" in without.left_out["--timeout"]
    assert tests_of("pytest-xdist").why_not == "pytest-xdist is not installed"


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
        found[name] = pieces.missing(file)
    missing = "surely_missing"
    assert found == {"direct": missing, "through": missing, "inside": None, "fine": None}


def test_the_pieces_name_what_there_is():
    tune_cases = pytest.importorskip("tune_cases")
    assert {*pieces.TUNE, *pieces.TUNE_ATTENTION} == set(tune_cases.FAMILIES)
    for family, size, kernel in pieces.PROFILED:
        known = tune_cases.FAMILIES[family]
        assert (tuple(map(int, size.split(","))), kernel) == (
            next(s for s in known.sizes if ",".join(map(str, s)) == size), known.kernel,
        )  # fmt: skip
    assert {op for ops in pieces.BENCH.values() for op in ops} == set(rows.OPS)
    every = pieces.all_pieces(Path("out"), Path("triton"))
    assert len({piece.name for piece in every}) == len(every)
    for piece in every:
        if "bench" in piece.command:
            asked = cli.parser().parse_args(piece.command[piece.command.index("bench") :])
            assert asked.device == "cuda"
            kind, _, name = piece.name.partition("-")
            if kind == "steps":
                assert asked.steps == [name.partition("-")[0]]
            elif name in pieces.BENCH:
                assert tuple(asked.op) == pieces.BENCH[name]
        if piece.name.startswith("lora"):
            asked = lora.arguments(piece.command[2:])
            assert (asked.device, asked.ranks) == ("cuda", [int(piece.name[5:])])
        if piece.name.startswith("ncu"):
            at = piece.command.index("--clock-control")
            assert piece.command[at + 1] == "none"


def test_the_plan_is_in_the_order_of_value_and_fits_thirteen_minutes(capsys):
    assert gpu.main(["--dry-run", "--json", "--minutes", "13"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(p["estimate_s"] for p in plan) <= 780
    parts = [p["part"] for p in plan]
    order = [pieces.DEVICE, pieces.RIGHT, pieces.COMPILE, pieces.HEADLINE, pieces.MORE]
    assert parts == sorted(parts, key=order.index)
    seconds = {name: sum(p["estimate_s"] for p in plan if p["part"] == name) for name in order}
    assert seconds[pieces.DEVICE] <= 10
    assert 0 < seconds[pieces.RIGHT] <= 270
    assert 0 < seconds[pieces.HEADLINE] <= 360
    assert seconds[pieces.MORE] > 0
    assert all(p["limit_s"] >= p["estimate_s"] for p in plan)
    limits = [p["limit_s"] for p in plan if p["part"] == pieces.RIGHT]
    assert sum(limits) <= 270
    headlines = [p["piece"] for p in plan if p["part"] == pieces.HEADLINE]
    assert headlines[0] == "bench-attention-4096"
    assert {"bench-memory", "steps-gpt2"} <= set(headlines)
    # Less time takes from the end.
    assert gpu.main(["--dry-run", "--json", "--minutes", "6"]) == 0
    shorter = [p["piece"] for p in json.loads(capsys.readouterr().out)]
    assert shorter[:2] == ["device-clocks", "device-info"]
    assert "tests-check" in shorter
    assert len(shorter) < len(plan)


def test_the_headline_has_every_row_that_is_expected():
    """What is asked of `tridrop bench` gives a record for each prediction, under the same name."""
    found = set()
    for piece in pieces.all_pieces(Path("out"), Path("triton")):
        if piece.part != pieces.HEADLINE or "--steps" in piece.command:
            continue
        asked = cli.parser().parse_args(piece.command[piece.command.index("bench") :])
        options = rows_of(asked)
        found |= {
            (row.label, "x".join(map(str, row.shape)), mode, "tridrop")
            for row in options.rows for mode in options.modes
        }  # fmt: skip
    expected = {e.key for e in headline.expectations() if e.mode != "step"}
    assert found == expected
    steps = [e for e in headline.expectations() if e.mode == "step"]
    assert [e.provider for e in steps] == list(headline.PROVIDERS["steps"])


def rows_of(asked):
    from tridrop.commands.bench.options import Options

    return Options.of(
        "cuda", ops=asked.op, dtypes=asked.dtype, sizes=asked.size, lengths=asked.length,
        head_dims=asked.head_dim, modes=asked.mode, providers=asked.provider,
    )  # fmt: skip


def test_pieces_are_chosen_by_beginnings_and_unknown_ones_refused(capsys):
    assert gpu.main(["--list", "--piece", "tests-cuda", "device"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["device-clocks", "device-info", "tests-cuda"]
    for arguments in (["--piece", "test"], ["--piece", "tests-cu"], ["--minutes", "0"]):
        with pytest.raises(SystemExit) as stop:
            gpu.main(["--list", *arguments])
        assert stop.value.code == 2
    assert "no piece is called 'test' or begins with it" in capsys.readouterr().err


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    out = tmp_path / "results"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    assert "by the estimates" in capsys.readouterr().out
    assert not out.exists()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
