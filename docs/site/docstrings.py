"""Docstrings as Markdown: examples become code, and reST's roles the names that they stand for."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`[~.]?([^`]+)`")
# A paragraph that begins with a prompt, and its output: up to the next blank line.
EXAMPLE = re.compile(r"(?m)^(?P<indent>[ \t]*)>>> .*(?:\n(?![ \t]*$).+)*")


def markdown(text: str) -> str:
    """A docstring's text in Markdown.

    Examples have an empty line on either side, and an indented one stays in its section.
    """

    def fenced(match: re.Match[str]) -> str:
        code = textwrap.dedent(match[0])
        return textwrap.indent(f"\n```pycon\n{code}\n```\n", match["indent"])

    return EXAMPLE.sub(fenced, ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):
    """Applies it to all that is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
