"""What mkdocs needs beside its settings: the repository's files that the pages link to.

A page links to a file of the repository as it is seen in a clone (``../benchmarks/a.json``). On the
site a copy of that file lies in ``repository/``, and the link leads there.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def outside(page: Path, name: str) -> Path | None:
    """The file of the repository that a link of a page leads to, if it lies outside of docs/."""
    target = Path(os.path.normpath(page.parent / name))
    return target if not target.is_relative_to(DOCS) and target.is_file() else None


def copy_of(target: Path) -> str:
    """Its place on the site. What ends in .md would be taken for a page."""
    name = f"repository/{target.relative_to(ROOT).as_posix()}"
    return f"{name}.txt" if target.suffix == ".md" else name


def on_files(files: Any, config: Any) -> Any:
    """Add the copies."""
    from mkdocs.structure.files import File

    for page in sorted(DOCS.rglob("*.md")):
        for _, name, _ in LINK.findall(page.read_text(encoding="utf-8")):
            target = outside(page, name)
            if target is not None and files.get_file_from_path(copy_of(target)) is None:
                files.append(File.generated(config, copy_of(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links to them."""
    source = DOCS / page.file.src_uri
    up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")

    def turned(match: re.Match[str]) -> str:
        target = outside(source, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.join(up, copy_of(target))})"

    return LINK.sub(turned, markdown)
