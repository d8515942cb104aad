"""The code in the documentation runs."""

import linecache
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {
    "keras-models.md": "keras",
    "lightning.md": "pytorch_lightning",
    "lora.md": "peft",
    "masks-elsewhere.md": "keras",
    "timm.md": "timm",
    "transformers.md": "transformers",
}
os.environ.setdefault("KERAS_BACKEND", "torch")  # of the page about Keras


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {"__name__": page.stem}
    for i, block in enumerate(blocks):
        name = f"<{page.name}, block {i}>"
        # tridrop.swap reads the source of the classes that a page defines.
        linecache.cache[name] = (len(block), None, block.splitlines(True), name)
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_recipes_name_files_and_tables_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:tridrop|tests|docs)/[^`]*)`", text)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path
    for path, name in re.findall(r"`(tridrop/[^`]*)`, `(\w+)`", text):
        there = re.search(rf"^(def )?{name}\b", (ROOT / path).read_text(), flags=re.MULTILINE)
        assert there, f"{name} in {path}"
