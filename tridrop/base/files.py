"""Files that are replaced as a whole or not at all: a draft is written, then moved in place."""

from __future__ import annotations

import csv
import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a draft, which replaces ``path`` when the block ends without an exception.

    The draft lies in the same folder and has the same suffix, by which writers recognise the
    format. Where the block raises, for instance because the disk is full, the draft is removed and
    ``path`` stays as it was. The target of a link is replaced, not the link. A device or a pipe
    cannot be replaced, so the block writes to it directly.

        with replacing("table.json") as draft:
            draft.write_text(text)
    """
    whole = Path(os.path.realpath(path))
    try:  # asked once: other processes may make or remove the file at any time
        mode = whole.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        yield whole
        return
    draft = whole.with_name(f".{whole.stem[:100]}-{uuid.uuid4().hex[:12]}{whole.suffix}")
    try:
        yield draft
        if mode is not None:
            draft.chmod(stat.S_IMODE(mode))
        os.replace(draft, whole)
    finally:
        draft.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Replace ``path`` by a table of the rows, whose columns are all of their keys.

    The columns come in the order in which the keys first occur; a row without a key has an empty
    cell there.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
