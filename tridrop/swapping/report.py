"""What :func:`tridrop.swap` found and did, as data and as a table."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from .rewrite import Levels


@dataclass(frozen=True)
class Site:
    """One place in a model where something is dropped.

    Attributes:
        module: the name in the model of the module in whose code it stands, or that drops itself.
        kind: that module's class.
        code: the call, or the module's text.
        line: of the call in the class's file.
        p: the probability of dropping, where it can be told from the module.
        parts: the ops that became one, in the order of computation; of one alone, its mask is
            tridrop's and nothing is fused; empty where it was left.
        reason: why it was left.
        stream: its number under :func:`tridrop.rng`: its mask is that of fold_in(seed, stream).
    """

    module: str
    kind: str
    code: str
    line: int | None
    p: float | None
    parts: tuple[str, ...]
    reason: str
    stream: int | None

    @property
    def status(self) -> str:
        """ "fused", "swapped" (its mask alone) or "left"."""
        return "left" if not self.parts else "fused" if len(self.parts) > 1 else "swapped"


@dataclass
class Report:
    """The result of :func:`tridrop.swap`."""

    sites: list[Site]
    levels: Levels
    dry_run: bool = False

    def counts(self) -> dict[str, int]:
        """How many sites were fused, swapped and left."""
        found = Counter(site.status for site in self.sites)
        return {status: found[status] for status in ("fused", "swapped", "left")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, of plain types, for JSON."""
        sites = [{**asdict(site), "status": site.status} for site in self.sites]
        return {"dry_run": self.dry_run, "levels": asdict(self.levels), "counts": self.counts(),
                "sites": sites}  # fmt: skip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.sites:
            yield "Nothing in this model drops: it is unchanged."
            return
        table = Table(title="tridrop.swap" + (" (dry run)" if self.dry_run else ""))
        for column in ("sites", "in", "code", "p", "became"):
            table.add_column(column, justify="right" if column == "sites" else "left")
        groups = Counter(
            (s.kind, s.code, s.p, " + ".join(s.parts) or f"left: {s.reason}") for s in self.sites
        )
        for (kind, code, p, became), count in groups.items():
            table.add_row(str(count), kind, code, "" if p is None else f"{p:g}", became)
        yield table
        counts = self.counts()
        yield ", ".join(f"{n} {status}" for status, n in counts.items())

    def __str__(self) -> str:
        console = Console(width=120, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()
