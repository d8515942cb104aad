"""The archive of results: one file with every run, rewritten after each piece.

An archive holds one folder per run, named by the time of its start. It contains summary.json and a
folder for each piece, with its log and results. A run that resumes others includes their folders,
so that nothing is overwritten and one archive holds everything.
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
MOST_BYTES = 16 * 2**20 - 2**16  # the most that the archive may have
MOST_LOG = 2**19  # the most of a log; of a longer one, its beginning and its end
KERNELS = ROOT / "tridrop" / "backends" / "triton"
SHOWN = ("torch", "triton", "numpy", "transformers", "peft", "timm", "accelerate", "numba")
# A passed piece counts in a later run only if these are the same.
SAME = ("kernels", "device", "torch", "triton")
Summary = dict[str, Any]


def kernels() -> str:
    """A fingerprint of the text of the kernels and their launchers."""
    digest = hashlib.sha256()
    for file in sorted(KERNELS.rglob("*.py")):
        digest.update(str(file.relative_to(KERNELS)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def circumstances() -> Summary:
    """The circumstances of a run: device, versions, commit, kernels, start."""
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
    """Write a file at once: an interruption leaves the previous file."""
    draft = file.with_name(file.name + ".new")
    draft.write_text(json.dumps(what, indent=1) + "\n")
    draft.replace(file)


def pack(work: Path, out: Path, most: int = MOST_BYTES) -> list[str]:
    """Pack the runs of ``work`` into one archive in ``out``.

    Returns the files that were left out to stay under ``most`` bytes, largest first. Summaries are
    never left out.
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
    """The content of a file; of a log that is too long, its two ends."""
    data = file.read_bytes()
    if file.name != "log.txt" or len(data) <= MOST_LOG:
        return data
    middle = b"\n... %d bytes are left out here ...\n" % (len(data) - MOST_LOG)
    return data[: MOST_LOG // 2] + middle + data[-MOST_LOG // 2 :]


def unpack(source: Path, work: Path) -> list[Path]:
    """Put the runs of an archive, or of a folder with archives or runs, into ``work``.

    Returns the folders of the runs. Raises ValueError if there are none.
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
            f"{source} holds no earlier run: give its {ARCHIVE}, or a folder that contains it"
        )
    return list(dict.fromkeys(found))


def summaries(runs: Sequence[Path]) -> Iterator[tuple[Path, Summary]]:
    """The runs with their summaries, the earliest first."""
    for run in sorted(runs, key=lambda path: path.name):
        yield run, json.loads((run / SUMMARY).read_text())


def differs(now: Summary, then: Summary) -> list[str]:
    """Those of SAME in which two runs differ."""

    def of(summary: Summary) -> Mapping[str, Any]:
        return {**summary, **summary.get("versions", {})}

    return [name for name in SAME if of(now).get(name) != of(then).get(name)]


def passed(now: Summary, runs: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """The pieces that passed in earlier runs, each with its run; and why some runs do not count."""
    found: dict[str, str] = {}
    notes: list[str] = []
    for run, then in summaries(runs):
        if others := differs(now, then):
            notes.append(
                f"the run of {run.name} does not count, since these differ: {', '.join(others)}"
            )
            continue
        for piece in then["pieces"]:
            if piece["outcome"] == PASSED:
                found[piece["piece"]] = run.name
    return found, notes
