"""Files that are whole, or as they were: written beside their place, then moved there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a draft, which takes the place of ``path`` when the block ends well.

    The draft lies in the same folder and ends alike, so that whoever writes it knows the format.
    Where the block raises, for instance since the disk is full, the draft is removed and what was
    at ``path`` stays. The target of a link is replaced, not the link; a device or a pipe, which has
    no place to move a file to, is written to as it stands.

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
