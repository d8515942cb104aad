"""Reaching definitions: what of a forward reaches a use, and what others may see."""

import ast
import textwrap

import pytest

from tridrop.swapping import flow


def defined(text: str) -> tuple[dict[str, set[str]], flow.Flow]:
    """Of each use, as "name@line", the lines (0: a parameter) of what reaches it."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    found = flow.analyse(node)
    uses: dict[str, set[str]] = {}
    for name, ids in found.reaching.items():
        lines = set()
        for i in ids:
            d = found.definitions[i]
            lines.add(d.statement.lineno if d.statement is not None else 0)
        uses.setdefault(f"{name.id}@{name.lineno}", set()).update(lines)
    return uses, found


FLOWS = {
    "straight": ("def f(x):\n x = x\n return x", {"x@2": {0}, "x@3": {2}}),
    "if": (
        "def f(x, c):\n if c:\n  x = 1\n return x",
        {"c@2": {0}, "x@4": {0, 3}},
    ),
    "if that returns": (
        "def f(x, c):\n if c:\n  x = 1\n  return x\n return x",
        {"c@2": {0}, "x@4": {3}, "x@5": {0}},
    ),
    "loop": (
        "def f(x):\n for i in x:\n  y = x\n  x = y\n return x",
        {"x@2": {0}, "x@3": {0, 4}, "y@4": {3}, "x@5": {0, 4}},
    ),
    "break": (
        "def f(x):\n while x:\n  x = 1\n  if x:\n   break\n  x = 2\n else:\n  x = x\n return x",
        {"x@2": {0, 6}, "x@4": {3}, "x@8": {0, 6}, "x@9": {3, 8}},
    ),
    "continue": (
        "def f(x):\n for i in []:\n  if i:\n   x = 1\n   continue\n  x = 2\n return x",
        {"i@3": {2}, "x@7": {0, 4, 6}},
    ),
    "try": (
        "def f(x):\n try:\n  x = 1\n  x = 2\n except E:\n  x\n else:\n  x\n finally:\n  x\n",
        {"E@5": set(), "x@6": {0, 3, 4}, "x@8": {4}, "x@10": {0, 3, 4}},
    ),
    "augmented": ("def f(x, y):\n x += y\n return x", {"y@2": {0}, "x@2": {0}, "x@3": {2}}),
    "tuple": ("def f(x):\n a, b = x, x\n return b", {"x@2": {0}, "b@3": {2}}),
    "with": ("def f(x):\n with x as y:\n  x = y\n return x", {"x@2": {0}, "y@3": {2}, "x@4": {3}}),
    "annotated": ("def f(x):\n y: int = x\n z: int\n return y", {"x@2": {0}, "y@4": {2}}),
    "keyword only": ("def f(*a, x=1, **k):\n return a, x, k", {"a@2": {0}, "x@2": {0}, "k@2": {0}}),
    "return in try": (
        "def f(x):\n try:\n  x = 1\n  return x\n finally:\n  x\n",
        {"x@4": {3}, "x@6": {0, 3}},
    ),
    "break in try": (
        "def f(x):\n for i in []:\n  try:\n   x = 1\n   break\n  finally:\n   x\n return x",
        {"x@7": {0, 4}, "x@8": {0, 4}},
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_what_reaches_a_use(name):
    text, expected = FLOWS[name]
    assert defined(text)[0] == expected


@pytest.mark.parametrize(
    "line",
    [
        "g = lambda: y",
        "[y for _ in ()]",
        "def g():\n  return y",
        "class G:\n  a = y",
        "del y",
        "sum(y for _ in ())",
        "(y := 1)",
        "{**{1: y for _ in ()}}",
    ],
    ids=str,
)
def test_what_others_may_see_escapes(line):
    assert "y" in defined(f"def f(x):\n y = x\n {line}\n return x")[1].escaped


@pytest.mark.parametrize("line", ["locals()", "eval('x')", "exec('')", "vars()"])
def test_what_cannot_be_followed_is_refused(line):
    with pytest.raises(flow.Unfollowed):
        defined(f"def f(x):\n {line}\n return x")
