"""What tridrop writes is whole or as it was, also where a disk fills in between."""

import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tridrop
from tridrop.base.files import replacing, write_csv

PACKAGE = Path(tridrop.__file__).resolve().parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_draft_takes_the_place_at_the_end(tmp_path):
    path = tmp_path / "table.json"
    for text in ("one", "two"):
        with replacing(path) as draft:
            assert draft.parent == path.parent
            assert draft.suffix == ".json"
            draft.write_text(text)
            assert path.exists() == (text == "two")
        assert path.read_text() == text
    assert names(tmp_path) == ["table.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, "before"])
def test_what_was_there_stays_where_writing_fails(tmp_path, before, error):
    path = tmp_path / "table.json"
    if before is not None:
        path.write_text(before)

    def write():
        with replacing(str(path)) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == ([] if before is None else ["table.json"])
    assert before is None or path.read_text() == before


def test_where_the_move_fails(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "table.json") as draft:
        draft.write_text("whole")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="modes and links are others there")
def test_modes_and_links_stay(tmp_path):
    path, link = tmp_path / "table.json", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path.name)
    with replacing(link) as draft:
        draft.write_text("after")
    assert link.is_symlink()
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="devices are not files there")
def test_a_device_is_written_to_and_stays():
    with replacing("/dev/null") as draft:
        assert draft == Path("/dev/null")
        draft.write_text("nothing")
    assert not Path("/dev/null").is_file()


def test_a_file_that_another_process_removes(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("before")
    with replacing(path) as draft:
        draft.write_text("after")
        path.unlink()
    assert path.read_text() == "after"
    assert names(tmp_path) == ["table.json"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "table.json") as draft:
        draft.write_text("whole")


def test_a_table_has_the_columns_of_all_its_rows(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    write_csv(path, [{"a": 1, "b": "x, y"}, {"a": 2, "c": None}])
    assert path.read_bytes() == b'a,b,c\r\n1,"x, y",\r\n2,,\r\n'
    with pytest.raises(FileNotFoundError):
        write_csv(tmp_path / "none" / "table.csv", [])


WRITERS = ("savefig", "write_text", "write_bytes", "open")


@pytest.mark.parametrize("part", ["demo", "bench", "inspection"])
def test_the_programs_write_drafts_alone(part):
    """Every call that writes a file is of a draft, or given one."""
    found = []
    for path in (PACKAGE / "commands" / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if name in WRITERS:
                of = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert "draft" in of, f"{path.name}: {ast.unparse(node)}"
                found.append(name)
    assert "savefig" in found


FULL = """
import json, resource, sys
from pathlib import Path
from matplotlib.figure import Figure
from tridrop.commands.bench import plots, step_report
from tridrop.commands.bench.report import Files
from tridrop.commands.demo import report
from tridrop.commands.inspection import report as inspection

folder = Path(sys.argv[1])

def draw(*args):
    figure = Figure()
    figure.subplots().plot(range(100))
    return figure

plots._figure = step_report._figure = inspection._draw = draw

class Timed:
    why_not, p, provider, mode, tflops, op = "", 0.1, "tridrop", "both", 1.0, "dropout"
    median_ms, model = 1.0, "gpt2"

class Base(Timed):
    provider, p = step_report.EAGER, 0

class Machine:
    slug = "machine"
    def about(self):
        return {"date": "today"}

def write():
    yield lambda: report.save(draw, folder, "demo")
    yield lambda: report.write_json({"many": list(range(5000))}, folder)
    yield lambda: plots.draw([Timed], folder / "bench")
    yield lambda: step_report.draw([Base], folder / "steps")
    yield lambda: inspection.plot([], folder / "inspect")
    files = Files(Machine(), folder, "", "ops")
    yield lambda: files.write([{"number": 1}] * 5000)

if sys.argv[2] == "full":  # as on a full disk, a write ends in the middle of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for call in write():
    try:
        call()
        print("written")
    except OSError as error:
        print("error")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
def test_pictures_and_tables_on_a_disk_that_fills(tmp_path):
    pytest.importorskip("matplotlib")

    def run(how):
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        command = [sys.executable, "-c", FULL, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PACKAGE)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("full") == ["error"] * 6
    assert names(tmp_path) == []
    assert run("free") == ["written"] * 6
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == [
        "bench-attention.png", "bench.png", "demo.png", "demo.svg", "inspect.png",
        "ops-machine-today.csv", "ops-machine-today.json", "results.json", "steps.png",
    ]  # fmt: skip
    assert run("full") == ["error"] * 6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    json.loads(before["results.json"])
