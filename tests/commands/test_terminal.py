"""Tables of commands on a narrow terminal: every word can be read."""

from __future__ import annotations

import io

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from tridrop.base import terminal


def wide(count: int = 12) -> Table:
    grid = Table(title="all", caption="the end", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.add_column("case")
    grid.add_column("provider")
    for i in range(count):
        grid.add_column(f"figure{i}", justify="right", no_wrap=True)
    for row in range(3):
        figures = [f"{100 * row + i}.25" for i in range(count)]
        grid.add_row(f"dropout: plain {row}", "torch.compile", *figures, end_section=row == 1)
    return grid


def shown(grid: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in terminal.parts(grid, console):
        console.print(part)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_that_is_too_wide_is_printed_in_parts(width: int) -> None:
    grid = wide()
    words = shown(grid, width)
    assert "…" not in words
    assert max(map(len, words.splitlines())) <= width
    assert words.count("all\n") + words.count("all ") == 1
    assert words.count("the end") == 1
    for i in range(12):
        assert words.count(f"figure{i} ") + words.count(f"figure{i}\n") == 1
        for row in range(3):
            assert f"{100 * row + i}.25" in words
    parts = terminal.parts(grid, Console(width=width))
    assert len(parts) > 1
    assert words.count("dropout: plain 1") == len(parts)
    assert [row.end_section for row in parts[-1].rows] == [False, True, False]


def test_a_table_that_fits_is_the_same() -> None:
    grid = wide(3)
    assert terminal.parts(grid, Console(width=80)) == [grid]


def test_a_column_that_is_too_wide_by_itself_has_a_part_of_its_own() -> None:
    grid = wide(6)
    grid.add_column("limit")
    grid.columns[-1]._cells.extend(["bandwidth 1.2 / issue slots 3.4 / " * 3] * 3)
    words = shown(grid, 80)
    assert "…" not in words
    assert words.count("bandwidth") == 9


def test_tables_of_bench_and_inspect_can_be_read_at_80_columns() -> None:
    from tridrop.commands.bench import op_report

    grid = op_report.table([])
    grid.add_row(
        "scaled_dot_product_attention: causal", "8x12x1024x64", "bf16", "backward",
        "torch.compile", "1234", "1230 - 1250", "0.495", "123", "1024.00", "2048.00", "1234",
        "12", "1.32", "0.95", "+323.7%",
    )  # fmt: skip
    words = shown(grid, 80)
    assert "…" not in words
    for word in ("1230 - 1250", "+323.7%", "2048.00", "torch.compile"):
        assert word in words
