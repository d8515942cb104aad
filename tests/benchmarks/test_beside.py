"""Two states of the project are timed in turns: rows for the calls that both have, and refusals."""

import csv
import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "beside.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.fixture
def beside():
    spec = importlib.util.spec_from_file_location("beside", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stub:
    """A state whose calls take what a table says."""

    def __init__(self, seconds):
        self.seconds = seconds

    def ask(self, verb, name, count=None):
        return list(self.seconds) if verb == "names" else self.seconds[name]


def test_a_row_is_the_median_of_ratios_and_only_for_calls_that_both_have(beside):
    before, after = Stub({"gone": 1.0, "same": 0.5, "half": 0.2}), Stub({"same": 0.5, "half": 0.1})
    rows = {row["call"]: row for row in beside.compare([before, after], "host", 4)}
    assert list(rows) == ["same", "half"]
    assert [row["after_over_before"] for row in rows.values()] == [1.0, 0.5]
    assert rows["half"]["before_us"] == 200_000
    assert rows["half"]["quartiles"] == "0.500 to 0.500"


def test_the_command_writes_a_row_per_call(tmp_path):
    file = tmp_path / "host.csv"
    found = run(ROOT, ROOT, "--table", "host", "--rounds", "2", "--out", file)
    assert found.returncode == 0, found.stderr
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert len(rows) == 12
    assert "geometric mean of 12 ratios" in found.stdout
    assert all(float(row["after_over_before"]) > 0 for row in rows)


def test_a_state_that_is_none_is_named(beside):
    with ExitStack() as stack, pytest.raises(SystemExit, match="nowhere is neither a folder nor"):
        beside.folder_of("nowhere", stack)
