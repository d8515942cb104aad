"""Turn an archive into the files to commit: records, plots, and the table in the docs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import archive, headline

PLACE = "headline"


def records(runs: Sequence[Path]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(circumstances, record) of everything that was timed, the earliest run first."""
    for run, _ in archive.summaries(runs):
        for file in sorted(run.glob("*/bench-*.json")):
            found = json.loads(file.read_text())
            for record in found["records"]:
                yield found["about"], record


def write(source: Path, into: Path, docs: Path | None, work: Path) -> list[Path]:
    """Write gpu-DEVICE-DATE.json and its plots to a folder, and the table to a page.

    Args:
        source: an archive, or a folder that has one.
        into: the folder for the files, such as benchmarks/results.
        docs: the page with the place for the table; None leaves it out.
        work: an empty folder to unpack into.

    Returns the files. Raises ValueError if there is no run in ``source``, if the runs are of
    different devices, or if the page has no place for the table.
    """
    runs = archive.unpack(source, work)
    summaries = [summary for _, summary in archive.summaries(runs)]
    devices = {str(summary["device"]) for summary in summaries}
    if len(devices) > 1:
        raise ValueError(f"the runs are of {' and '.join(sorted(devices))}: report each separately")
    timed = list(records(runs))
    (device,) = devices
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    day = summaries[-1]["started"][:8]
    stem = into / f"gpu-{slug}-{day[:4]}-{day[4:6]}-{day[6:]}"
    into.mkdir(parents=True, exist_ok=True)
    path = Path(f"{stem}.json")
    archive.write_json({"runs": summaries, "records": [record for _, record in timed]}, path)
    found = [path, *_plots(device, [record for _, record in timed], stem)]
    if docs is not None:
        lines = headline.table([record for _, record in timed])
        docs.write_text(headline.between(docs.read_text(), PLACE, lines))
        found.append(docs)
    return found


def _plots(device: str, timed: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """Plots of the ops and of the steps, each with the device in its title."""
    from tridrop.commands.bench import plots, step_report
    from tridrop.commands.bench.records import Record
    from tridrop.commands.bench.steps import StepRecord

    def made(cls: Any, rows: Sequence[dict[str, Any]]) -> list[Any]:
        names = {f.name for f in fields(cls)}
        return [cls(**{k: v for k, v in row.items() if k in names}) for row in rows]

    ops = made(Record, [r for r in timed if "case" in r])
    steps = made(StepRecord, [r for r in timed if "model" in r])
    found = plots.draw(ops, stem, title=device) if ops else []
    if steps:
        found += step_report.draw(steps, Path(f"{stem}-steps"), title=device)
    return found
