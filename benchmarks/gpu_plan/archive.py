"""What comes home: one archive with every run, written again after each piece.

An archive holds a folder for each run, named by when it started: summary.json and a folder for each
piece with its log and results. A run that resumes others takes their folders along, so that nothing
is overwritten and one archive says all.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .pieces import ROOT, installed
from .running import PASSED

ARCHIVE, SUMMARY = "gpu-results.tar.gz", "summary.json"
MOST_BYTES = 16 * 2**20 - 2**16  # of the archive
MOST_LOG = 2**19  # of a log: its first and its last half
KERNELS = ROOT / "tridrop" / "backends" / "triton"
SHOWN = ("torch", "triton", "numpy", "transformers", "peft", "timm", "accelerate", "numba")
# What must be the same for a passed piece to count in a later run.
SAME = ("kernels", "device", "torch", "triton")
Summary = dict[str, Any]


def kernels() -> str:
    """A fingerprint of the kernels' text and their launchers'."""
    digest = hashlib.sha256()
    for file in sorted(KERNELS.rglob("*.py")):
        digest.update(str(file.relative_to(KERNELS)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def circumstances() -> Summary:
    """What a run is about: device, versions, commit, kernels, start."""
    import torch

    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True,
    )  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "started": now.strftime("%Y%m%dT%H%M%SZ"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "versions": {n: importlib.metadata.version(n) for n in SHOWN if installed(n)},
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "commit": git.stdout.strip() or None,
        "kernels": kernels(),
    }


def write_json(what: Any, file: Path) -> None:
    """Write it whole: a cut leaves what was there before."""
    draft = file.with_name(file.name + ".new")
    draft.write_text(json.dumps(what, indent=1) + "\n")
    draft.replace(file)


def pack(work: Path, out: Path, most: int = MOST_BYTES) -> list[str]:
    """Pack the runs of ``work`` into one archive in ``out``.

    Returns what was left out, largest first, to stay under ``most`` bytes; summaries never are.
    """
    files = sorted((f for f in work.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    left_out: list[str] = []
    draft = out / f"{ARCHIVE}.new"
    while True:
        with tarfile.open(draft, "w:gz") as archive:
            for file in sorted(files):
                data = _content(file)
                member = tarfile.TarInfo(str(file.relative_to(work)))
                member.size, member.mtime = len(data), int(file.stat().st_mtime)
                archive.addfile(member, io.BytesIO(data))
        droppable = [f for f in files if f.name != SUMMARY]
        if draft.stat().st_size <= most or not droppable:
            break
        files.remove(droppable[-1])
        left_out.append(str(droppable[-1].relative_to(work)))
    draft.replace(out / ARCHIVE)
    return left_out


def _content(file: Path) -> bytes:
    """What a file holds; of a log that is too long its two ends."""
    data = file.read_bytes()
    if file.name != "log.txt" or len(data) <= MOST_LOG:
        return data
    middle = b"\n... %d bytes are left out here ...\n" % (len(data) - MOST_LOG)
    return data[: MOST_LOG // 2] + middle + data[-MOST_LOG // 2 :]


def unpack(source: Path, work: Path) -> list[Path]:
    """Put the runs of an archive, or of a folder that has archives or runs, into ``work``.

    Returns the folders of the runs. Raises ValueError where there is none.
    """
    if source.is_file():
        archives, summaries = [source], []
    else:
        archives = sorted(source.rglob("*.tar.gz"))
        summaries = sorted(source.glob(f"*/{SUMMARY}"))
    found: list[Path] = []
    for archive in archives:
        with tarfile.open(archive) as packed:
            members = [m for m in packed.getmembers() if m.isfile()]
            runs = {
                PurePosixPath(m.name).parts[0]
                for m in members
                if PurePosixPath(m.name).name == SUMMARY and len(PurePosixPath(m.name).parts) == 2
            }
            wanted = [m for m in members if PurePosixPath(m.name).parts[0] in runs]
            packed.extractall(work, wanted, filter="data")
            found += [work / run for run in sorted(runs)]
    for summary in summaries:
        target = work / summary.parent.name
        shutil.copytree(summary.parent, target, dirs_exist_ok=True)
        found.append(target)
    if not found:
        raise ValueError(
            f"{source} holds no earlier run: give {ARCHIVE} of one, or a folder that has it"
        )
    return list(dict.fromkeys(found))


def summaries(runs: Sequence[Path]) -> Iterator[tuple[Path, Summary]]:
    """The runs with their summaries, the earliest first."""
    for run in sorted(runs, key=lambda path: path.name):
        yield run, json.loads((run / SUMMARY).read_text())


def differs(now: Summary, then: Summary) -> list[str]:
    """What is not the same in two runs, of what must be."""

    def of(summary: Summary) -> Mapping[str, Any]:
        return {**summary, **summary.get("versions", {})}

    return [name for name in SAME if of(now).get(name) != of(then).get(name)]


def passed(now: Summary, runs: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """The pieces that earlier runs had pass, each with its run; and why runs do not count."""
    found: dict[str, str] = {}
    notes: list[str] = []
    for run, then in summaries(runs):
        if others := differs(now, then):
            notes.append(f"the run of {run.name} does not count: other {', '.join(others)}")
            continue
        for piece in then["pieces"]:
            if piece["outcome"] == PASSED:
                found[piece["piece"]] = run.name
    return found, notes
