"""The runs with many versions: README says what is recorded, and the rows can be run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def matrix():
    """tests/matrix.py, which is a program and no module of the tests."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tests" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # its named tuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["matrix"]


def test_readme_has_the_table_of_the_last_run(matrix):
    results = json.loads(matrix.RESULTS.read_text())
    text = (ROOT / "README.md").read_text()
    found = text.split(matrix.BEGIN)[1].split(matrix.END)[0].strip()
    assert found == matrix.table(results)


def test_every_group_is_of_tests_that_are_there(matrix):
    for files in matrix.GROUPS.values():
        assert all((ROOT / name).exists() for name in files)


def test_the_rows_are_the_versions_that_private_names_were_checked_with(matrix):
    from tridrop.base.torch_private import CHECKED

    assert tuple(row.torch.rsplit(".", 1)[0] for row in matrix.ROWS) == CHECKED


def test_a_row_of_the_pinned_torch_has_the_pinned_transformers(matrix):
    pins = (ROOT / "constraints.txt").read_text()
    (row,) = (row for row in matrix.ROWS if f"torch=={row.torch}\n" in pins)
    for package in row.packages:
        assert any(line.split(";")[0] == package for line in pins.splitlines())


def test_the_table_tells_of_failures_and_of_what_was_not_run(matrix):
    names = list(matrix.GROUPS)
    versions = {"torch": "2.9.0+cpu", "triton": "3.5", "transformers": "5.0", "python": "3.10.1"}
    done = {"passed": 1200, "skipped": 1, "failed": [], "sources": "x"}
    bad = {**done, "failed": ["test_a::test_b"]}
    groups = dict.fromkeys(names[:-1], done) | {names[0]: bad}
    line = matrix.table({"2.9.0": {"versions": versions, "groups": groups, "date": "2026-01-02"}})
    passed = 1200 * (len(names) - 1)
    expected = f"{passed:,} pass, 1 fail; not run: {names[-1]} (2026-01-02) |"
    assert line.splitlines()[-1].endswith(expected)
    assert "| 2.9.0 | 3.5 | 5.0 | 3.10.1 |" in line


def test_a_run_that_was_stopped_goes_on(matrix, monkeypatch, tmp_path, capsys):
    """A group is run again where the sources or the versions changed, and not else."""
    ran = []

    class Environment:
        def __init__(self, row):
            self.row = row

        def set_up(self):
            pass

        def versions(self):
            return {"torch": self.row.torch, "triton": "1", "transformers": "1", "python": "3"}

        def run(self, files, workers):
            ran.append((self.row.torch, files))
            if len(ran) == 2:
                raise KeyboardInterrupt
            return {"passed": 1, "skipped": 0, "failed": []}

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{matrix.BEGIN}\n{matrix.END}\nafter\n")
    monkeypatch.setattr(matrix, "Environment", Environment)
    monkeypatch.setattr(matrix, "find_python", lambda version: "python")
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "README", readme)
    arguments = ["2.13.0", "--only", "torch.compile", "torch.func"]
    with pytest.raises(KeyboardInterrupt):
        matrix.main(arguments)
    assert [files for _, files in ran] == [
        matrix.GROUPS["torch.compile"],
        matrix.GROUPS["torch.func"],
    ]
    assert matrix.main(arguments) == 0
    assert ran[2:] == [("2.13.0", matrix.GROUPS["torch.func"])]
    assert matrix.main(arguments) == 0
    assert len(ran) == 3
    monkeypatch.setattr(matrix, "sources", lambda: "others")
    assert matrix.main(arguments) == 0
    assert len(ran) == 5
    assert "2 pass; not run: private names of torch" in readme.read_text()
    assert readme.read_text().startswith("before\n")


def test_a_row_without_its_python_is_told_of(matrix, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{matrix.BEGIN}\n{matrix.END}")
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "README", readme)
    assert matrix.main(["2.15.0"]) == 1
    assert "there is no Python 3.13 here; the row is not run" in capsys.readouterr().out


def test_an_unknown_row_says_which_there_are(matrix, capsys):
    with pytest.raises(SystemExit):
        matrix.main(["1.0"])
    assert "no row 1.0; there are 2.11.0" in capsys.readouterr().err


def test_a_python_is_found(matrix):
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert matrix.find_python(version)
    assert matrix.find_python("2.6") is None
