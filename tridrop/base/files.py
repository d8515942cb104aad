"""Files that are replaced as a whole or not at all: a draft is written, then moved in place."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
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
    if whole.exists() and not whole.is_file():
        yield whole
        return
    draft = whole.with_name(f".{whole.stem[:100]}-{uuid.uuid4().hex[:12]}{whole.suffix}")
    try:
        yield draft
        if whole.exists():
            shutil.copymode(whole, draft)
        os.replace(draft, whole)
    finally:
        draft.unlink(missing_ok=True)
