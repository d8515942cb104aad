"""All of benchmarks/gpu.py with stubs for the device: budget, kill, archive, resume, report.

The records are made up, and all that is drawn of them says so.
"""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_plan import archive, headline, pieces, report, running  # noqa: E402
from gpu_plan.pieces import Piece  # noqa: E402

DEVICE = "made-up figures, no device"
ABOUT = {
    "device": DEVICE, "cuda": None, "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "python": "3.12.1", "cores": 16, "commit": "0" * 40, "kernels": "made-up",
}  # fmt: skip
# Writes records as `tridrop bench --out DIR` does: of {rows}, {factor} times what is expected.
TIMES = """
import json, pathlib, sys
sys.path[:0] = [{benchmarks!r}, {root!r}]
from gpu_plan import headline
records = []
for e in headline.expectations():
    if {rows!r} not in (e.case if e.mode != "step" else "step"):
        continue
    common = dict(p=0.1, dtype="bf16", device={device!r}, check="passed", rounds=10,
                  median_ms={factor} * e.ms, provider=e.provider, dropout_cost=e.price)
    if e.mode == "step":
        common |= dict(model="gpt2", layers=12, width=768, length=1024, batch=8, parameters=1)
        records += [common, common | dict(p=0.0, dropout_cost=None)]
    else:
        common |= dict(op=e.case.partition(":")[0], case=e.case, shape=e.shape, mode=e.mode)
        attention = "attention" in e.case
        common |= dict(tflops=(e.rate or 0) / {factor}) if attention else dict(
            copy_fraction=e.rate / {factor}, gb_per_s=1.0, bytes=2**20)
        records.append(common)
out = pathlib.Path({out!r})
kind = "bench-steps" if {rows!r} == "step" else "bench"
(out / f"{{kind}}-{{len(records)}}.json").write_text(
    json.dumps(dict(about=dict(device={device!r}), records=records)))
"""


def times(folder, name, rows, factor=1.0):
    program = TIMES.format(
        benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), rows=rows, factor=factor,
        device=DEVICE, out=str(folder / name),
    )  # fmt: skip
    return Piece(name, [sys.executable, "-c", program], 1.0, pieces.HEADLINE, limit=200.0)


def python(name, program, estimate_s=1.0, limit=200.0):
    return Piece(name, [sys.executable, "-c", program], estimate_s, limit=limit)


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    """A function that runs gpu.py with pieces, as if it were started at a time of its own."""
    starts = iter(f"2026112{i}T000000Z" for i in range(1, 9))
    about = dict(ABOUT)
    monkeypatch.setattr(archive, "circumstances", lambda: about | {"started": next(starts)})
    monkeypatch.setattr(running, "GRACE", 0.5)

    def run(make, *arguments, **changed):
        about.update(changed)
        monkeypatch.setattr(gpu, "all_pieces", lambda out, cache: make(out))
        return gpu.main(list(arguments))

    return run


def summary(out, run):
    with tarfile.open(out / archive.ARCHIVE) as packed:
        return json.load(packed.extractfile(f"{run}/{archive.SUMMARY}"))


def outcomes(about):
    return {p["piece"]: p["outcome"] for p in about["pieces"]}


def test_two_runs_and_their_report(rehearsal, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"

    def begins(out):
        return [
            python("device", "print('a device')"),
            times(out, "bench-attention", "attention", 2.0),
            python("hangs", "print('begun', flush=True); import time; time.sleep(99)", limit=6.0),
            python("wrong", "raise SystemExit(1)"),
            python("much", "", 5000.0),
        ]

    assert rehearsal(begins, "--minutes", "13", "--out", str(first)) == 1
    about = summary(first, "20261121T000000Z")
    assert outcomes(about) == {
        "device": "passed", "bench-attention": "passed", "hangs": "time limit",
        "wrong": "failed", "much": "no time left",
    }  # fmt: skip
    assert (about["device"], about["kernels"]) == (DEVICE, "made-up")
    assert about["cache"] == "none was given"
    assert sorted(f.name for f in first.iterdir()) == [archive.ARCHIVE, archive.SUMMARY]
    with tarfile.open(first / archive.ARCHIVE) as packed:
        log = packed.extractfile("20261121T000000Z/hangs/log.txt").read()
    assert log == b"begun\n"

    # The second run: what passed is not run again, and nothing of the first is lost.
    def goes_on(out):
        return [
            python("device", "raise SystemExit('not again')"),
            python("bench-attention", "raise SystemExit('not again')"),
            python("wrong", "print('right now')"),
            times(out, "bench-dropout_add", "dropout_add", 1.5),
            times(out, "steps", "step"),
        ]

    assert rehearsal(goes_on, "--out", str(second), "--resume", str(first)) == 0
    assert outcomes(summary(second, "20261122T000000Z")) == {
        "device": "skipped", "bench-attention": "skipped", "wrong": "passed",
        "bench-dropout_add": "passed", "steps": "passed",
    }  # fmt: skip
    assert outcomes(summary(second, "20261121T000000Z")) == outcomes(about)

    # A third finds in the second's archive all that passed in either.
    assert rehearsal(goes_on, "--out", str(tmp_path / "third"), "--resume", str(second)) == 0
    assert set(outcomes(summary(tmp_path / "third", "20261123T000000Z")).values()) == {"skipped"}

    # Other kernels, or another device: nothing that was found counts.
    capsys.readouterr()
    again = ["--out", str(tmp_path / "fourth"), "--resume", str(second)]
    assert rehearsal(goes_on, *again, kernels="mended") == 1
    found = outcomes(summary(tmp_path / "fourth", "20261124T000000Z"))
    assert (found["device"], found["wrong"]) == ("failed", "passed")
    note = "the run of 20261121T000000Z does not count, since these differ: kernels"
    assert note in capsys.readouterr().out

    # What is committed: records, plots, and the table in the page, with every row filled.
    page, into = tmp_path / "page.md", tmp_path / "results"
    place = "<!-- headline: begin -->\nnothing yet\n<!-- headline: end -->"
    page.write_text(f"before\n\n{place}\n\nafter\n")
    options = ["--report", str(second), "--into", str(into), "--docs", str(page)]
    assert gpu.main(options) == 0
    stem = "gpu-made-up-figures-no-device-2026-11-22"
    assert sorted(f.name for f in into.iterdir()) == sorted(
        f"{stem}{end}" for end in (".json", ".png", "-attention.png", "-steps.png")
    )
    written = json.loads((into / f"{stem}.json").read_text())
    assert [run["started"] for run in written["runs"]] == ["20261121T000000Z", "20261122T000000Z"]
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    table = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(table) == len(headline.expectations())
    for cells in table:
        factor = 2.0 if "attention" in cells[0] else 1.5 if "dropout_add" in cells[0] else 1.0
        assert float(cells[6]) == pytest.approx(factor * float(cells[3]), rel=0.01)


def test_the_pictures_say_what_they_are_of(tmp_path, monkeypatch):
    """The device stands in the title, so that made-up records cannot be taken for measured ones."""
    from matplotlib.figure import Figure

    titles = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig",
        lambda self, *a, **k: (titles.append(self.get_suptitle()), save(self, *a, **k)),
    )  # fmt: skip
    folder = tmp_path / "20261121T000000Z" / "bench"
    folder.mkdir(parents=True)
    exec(TIMES.format(
        benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), rows="attention", factor=1.0,
        device=DEVICE, out=str(folder),
    ))  # fmt: skip
    about = ABOUT | {"started": "20261121T000000Z", "pieces": []}
    archive.write_json(about, folder.parent / archive.SUMMARY)
    report.write(tmp_path, tmp_path / "results", None, tmp_path / "work")
    assert titles == [DEVICE]


def test_a_report_refuses_what_it_cannot_put_together(tmp_path):
    with pytest.raises(ValueError, match="holds no earlier run"):
        report.write(tmp_path, tmp_path / "results", None, tmp_path / "work")
    for i, device in enumerate(("one", "another")):
        run = tmp_path / "runs" / f"2026112{i}T000000Z"
        run.mkdir(parents=True)
        about = ABOUT | {"started": run.name, "device": device, "pieces": []}
        archive.write_json(about, run / archive.SUMMARY)
    with pytest.raises(ValueError, match="runs are of another and one: report each separately"):
        report.write(tmp_path / "runs", tmp_path / "results", None, tmp_path / "more")


def test_what_is_committed_and_the_page_agree():
    """The table of docs/performance.md is what the committed records of GPUs give: none as yet."""
    text = (ROOT / "docs" / "performance.md").read_text()
    known = [
        record
        for file in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
        for record in json.loads(file.read_text())["records"]
    ]
    assert headline.between(text, report.PLACE, headline.table(known)) == text
    with pytest.raises(ValueError, match="no place between"):
        headline.between("no place", report.PLACE, [])


def test_a_row_whose_check_failed_has_no_figure():
    (first, *_) = headline.expectations()
    record = {
        "case": first.case, "shape": first.shape, "mode": first.mode, "provider": "tridrop",
        "p": 0.1, "dtype": "bf16", "median_ms": 1.0, "tflops": 1.0, "check": "failed value: 2 > 1",
    }  # fmt: skip
    assert headline.table([record])[2].endswith("| its check failed |  |  |")
    assert headline.table([record | {"check": "passed"}])[2].endswith("| 1 | 1 |  |")
    assert headline.table([record | {"p": 0.0}])[2].endswith("|  |  |  |")


# ------------------------------------------------------------------------------- the archive


def test_the_archive_stays_small_and_keeps_what_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_LOG", 1000)
    work, out = tmp_path / "work", tmp_path / "out"
    piece = work / "20261121T000000Z" / "piece"
    piece.mkdir(parents=True)
    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (40_000,), dtype=torch.uint8, generator=generator)
    (piece / "large.bin").write_bytes(noise.numpy().tobytes())
    (piece / "small.json").write_text("{}")
    (piece / "log.txt").write_bytes(b"a" * 5000 + b"b" * 5000)
    (piece.parent / archive.SUMMARY).write_text("{}")
    assert archive.pack(work, out) == []
    assert archive.pack(work, out, most=20_000) == ["20261121T000000Z/piece/large.bin"]
    assert (out / archive.ARCHIVE).stat().st_size <= 20_000
    (run,) = archive.unpack(out, tmp_path / "back")
    names = sorted(str(f.relative_to(run)) for f in run.rglob("*") if f.is_file())
    assert names == ["piece/log.txt", "piece/small.json", "summary.json"]
    log = (run / "piece" / "log.txt").read_bytes()
    assert (log[:500], log[-500:]) == (b"a" * 500, b"b" * 500)
    assert b"9000 bytes are left out" in log
    # The summary stays whatever the limit.
    left_out = archive.pack(work, out, most=1)
    assert "20261121T000000Z/summary.json" not in left_out
    assert len(left_out) == 3


def test_kernels_are_told_apart_by_their_text(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(archive, "KERNELS", tmp_path)
    before = archive.kernels()
    assert archive.kernels() == before
    (tmp_path / "a.py").write_text("two")
    assert archive.kernels() != before
