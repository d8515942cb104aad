"""The output of commands: progress bars, tables, and one line after Ctrl-C."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells have them


def live() -> Console:
    """A console on which a progress bar can be drawn.

    In a notebook rich draws with ipywidgets, and only warns where these are missing. A bar of one
    line needs nothing but a carriage return, which a notebook's cell understands.
    """
    console = Console()
    if console.is_jupyter and importlib.util.find_spec("ipywidgets") is None:
        return Console(force_jupyter=False, force_terminal=True, width=100)
    return console


def bar() -> Progress:
    """A progress bar on standard error that disappears at the end.

    Where standard error is not a terminal, nothing is drawn.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def table(title: str, caption: str | None = None) -> Table:
    """An empty table in the style of all commands."""
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show(grids: Iterable[Table], plain: Callable[[], Table] | None = None) -> None:
    """Print tables; into a pipe or a file, print one table as tab-separated lines.

    That table is the first of ``grids``, or the one that ``plain`` makes. On a terminal, a table
    that is too wide for it is printed in parts, one below the other.
    """
    if sys.stdout.isatty():
        console = Console(highlight=False)
        for grid in grids:
            for part in parts(grid, console):
                console.print(part)
        return
    print("\n".join(lines(plain() if plain else next(iter(grids)))))


def parts(grid: Table, console: Console) -> list[Table]:
    """The table; or, if its words do not fit into the width, tables of some of its columns each.

    Each has the columns that name the rows, which are those at the left that are not aligned to the
    right, and as many of the others, in their order, as fit in their full widths, but one at least.
    """
    wide = console.options.update(width=10_000, max_width=10_000)
    if Measurement.get(console, wide, grid).minimum <= console.width:
        return [grid]
    columns = grid.columns
    named = next((i for i, c in enumerate(columns) if c.justify == "right"), len(columns))
    names, others = list(range(named)), list(range(named, len(columns)))
    found: list[list[int]] = []
    for i in others:
        wider = [*(found[-1] if found else []), i]
        fits = Measurement.get(console, wide, _some(grid, [*names, *wider])).maximum
        if found and (fits <= console.width):
            found[-1] = wider
        else:
            found.append([i])
    tables = [_some(grid, [*names, *some]) for some in found]
    tables[0].title, tables[-1].caption = grid.title, grid.caption
    return tables


def _some(grid: Table, chosen: Sequence[int]) -> Table:
    """A table of some columns of another, without its title and its caption."""
    some = Table(box=grid.box, padding=grid.padding)
    columns = [grid.columns[i] for i in chosen]
    for column in columns:
        some.add_column(
            column.header, justify=column.justify, no_wrap=column.no_wrap, overflow="fold"
        )
    for row, *cells in zip(grid.rows, *(column.cells for column in columns), strict=True):
        some.add_row(*cells, end_section=row.end_section)
    return some


def lines(grid: Table) -> list[str]:
    """A table as lines with tabs between cells: headings, rows, and the caption after a "#".

    >>> grid = Table("op", "x eager", caption="times as fast")
    >>> grid.add_row("dropout", "[red]0.9[/]")
    >>> print(*lines(grid), sep="\\n")  # doctest: +NORMALIZE_WHITESPACE
    op  x eager
    dropout  0.9
    # times as fast
    """
    columns = [[column.header, *column.cells] for column in grid.columns]
    found = ["\t".join(map(_plain, row)) for row in zip(*columns, strict=True)]
    return [*found, *([f"# {_plain(grid.caption)}"] if grid.caption else [])]


def _plain(cell: object) -> str:
    text = cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
    # Narrow columns have headings with a word split over two lines.
    return re.sub(r"\s+", " ", text.replace("-\n", "")).strip()


def html(content: Any) -> str:
    """The HTML that a notebook shows for anything that rich can print."""
    console = Console(record=True, width=110, file=io.StringIO(), force_jupyter=False)
    console.print(content)
    code = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=code)


def interrupted(command: str, rest: str = "") -> int:
    """Print one line about the interrupt by Ctrl-C, and return the exit status."""
    print(f"{' '.join(('tridrop', command)).rstrip()}: interrupted{rest}", file=sys.stderr)
    return INTERRUPTED


def unread() -> int:
    """Drop what is still to be printed, since whoever read it has stopped, as ``head`` does.

    Returns the exit status. Without this Python would complain at its end.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return UNREAD
