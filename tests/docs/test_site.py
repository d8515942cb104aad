"""The documentation as a site: it builds without a warning, and all links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import tridrop

pytest.importorskip("mkdocs", reason="needs the extra docs, which the test extra has")

ROOT = Path(__file__).parents[2]
MODULES = ("", ".nn", ".shims", ".distributed", ".swapping")
if importlib.util.find_spec("keras"):  # it has no version for Python 3.10
    os.environ.setdefault("KERAS_BACKEND", "torch")
    MODULES += (".keras",)
# Public where they are, and in no __all__.
MORE = {
    "tridrop.swapping.trainer.SwapCallback",
    "tridrop.swapping.lightning.SwapCallback",
    "tridrop.swapping.verify.Verification",
    *(f"tridrop.schedules.{name}" for name in ("Linear", "Cosine", "Curriculum", "Early", "Late")),
}


class Page(HTMLParser):
    """What a page links to, and what may be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        for name in ("href", "src"):
            if found.get(name):
                self.links.append(found[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages by path, built as `python3 run.py site` does."""
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr  # strict: a warning is an error
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}, folder


def test_every_link_and_anchor_leads_somewhere(site):
    pages, folder = site
    assert len(pages) > 30
    for path, page in pages.items():
        if path.name == "404.html":  # served from anywhere
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            assert target.exists(), f"{path.relative_to(folder)}: {link}"
            if parts.fragment and target.suffix == ".html" and not link.startswith("#__"):
                anchors = pages[target].anchors
                assert unquote(parts.fragment) in anchors, f"{path.relative_to(folder)}: {link}"


def test_nothing_is_loaded_from_elsewhere(site):
    pages, _ = site
    for path, page in pages.items():
        for link in page.links:
            loaded = link.endswith((".js", ".css", ".woff2", ".png", ".svg"))
            assert not (loaded and urlsplit(link).netloc), f"{path.name}: {link}"


def test_the_reference_has_every_public_name(site):
    pages, folder = site
    anchors = set()
    for path, page in pages.items():
        if path.parent == folder / "reference":
            anchors |= page.anchors
    wanted = set(MORE)
    for name in MODULES:
        module = importlib.import_module(f"tridrop{name}")
        for public in module.__all__:
            if not isinstance(getattr(module, public), type(tridrop)):
                wanted.add(f"tridrop{name}.{public}")
    # What the package gives under a shorter name stands there.
    wanted -= {f"tridrop.swapping.{name}" for name in tridrop.__all__}
    assert wanted <= anchors, sorted(wanted - anchors)


def test_examples_of_docstrings_are_code(site):
    _, folder = site
    text = (folder / "reference" / "ops.html").read_text()
    assert "&gt;&gt;&gt;" in text
    assert "<blockquote>" not in text  # what Markdown makes of a bare prompt
    assert ":func:" not in text


def test_what_is_returned_is_one_item_in_words(site):
    """Lines of a docstring's section are neither items of their own nor, before a colon, a type."""
    found = 0
    for path in (site[1] / "reference").glob("*.html"):
        for part in re.findall(r"Returns:</span>.*?<ul>(.*?)</ul>", path.read_text(), re.DOTALL):
            (item,) = re.findall(r"<li[^>]*>(.*?)</li>", part, re.DOTALL)
            named = re.match(r"\s*<code>(.*?)</code>", item, re.DOTALL)
            assert named is None or len(re.sub("<[^>]+>", "", named[1]).split(". ")) == 1, item
            found += 1
    assert found > 20


def test_there_is_search(site):
    _, folder = site
    assert "dropout_add" in (folder / "search" / "search_index.json").read_text()
