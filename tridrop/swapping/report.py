"""What :func:`tridrop.swap` found and did, as data, as a table, as code and in numbers."""

from __future__ import annotations

import io
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from .measure import Measurement, changed, cost_of
from .rewrite import Levels
from .wording import Plans, is_swapped

_BESIDES = 76  # columns of the table for all but the code


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
            tridrop's and nothing is fused; empty where it was left. "call" is what another module
            hands on uncomputed, such as its last linear layer; "return" says that this one hands
            its value on to its caller. :meth:`Report.became` puts both into words.
        reason: why it was left; of a LoRA adapter's dropout with a mask of tridrop's and no more,
            why it was not fused.
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
    """The result of :func:`tridrop.swap`. Printed, it is a table of all sites, alike ones together.

    It does not keep the model alive; :meth:`measure` and :meth:`source` need it.

    Attributes:
        sites: everything that drops, in the order of ``model.modules()`` and of the code.
        levels: what the swap was allowed to do.
        dry_run: whether nothing was changed.
        measurement: the last result of :meth:`measure`.

    >>> import tridrop
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> report = tridrop.swap(layer)
    >>> report.counts()["left"]
    0
    """

    sites: list[Site]
    levels: Levels
    dry_run: bool = False
    model: InitVar[nn.Module | None] = None
    measurement: Measurement | None = None
    _model: weakref.ref[nn.Module] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    _words: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        handed = any({"call", "return"} & set(site.parts) for site in self.sites)
        plans = Plans(model if handed else None, self.levels)
        self._words = [
            _words(plans.became(s.module, s.line, s.code, s.parts), s.reason) for s in self.sites
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a weak reference cannot be pickled

    def counts(self) -> dict[str, int]:
        """How many sites were fused, swapped and left."""
        found = Counter(site.status for site in self.sites)
        return {status: found[status] for status in ("fused", "swapped", "left")}

    def became(self) -> list[str]:
        """What became of each site, in words: "linear + dropout, added by GPT2Block"."""
        return list(self._words)

    def measure(self, *args: Any, **kwargs: Any) -> Measurement:
        """Count what one training forward of the model costs before and after the swap.

        The model runs twice on the given inputs: with every module's own class and attention
        function, and swapped. After :func:`tridrop.unswap`, and for a dry run, it is swapped for
        the time. Afterwards everything is as it was: classes, numbers of sites, modes, buffers,
        gradients, the random generators of torch, NumPy and Python. No backward is run.

        A model in training mode runs as it is; one in eval mode is put into training mode. Hooks
        run. What the forward does to its inputs, such as filling a cache, it does twice.

        Returns:
            The figures, which the report then prints below its table and has in ``measurement``.

        Raises:
            ValueError: the model no longer exists.
            RuntimeError: its modules were given other classes after the swap, by fully_shard for
                instance. Measure before that.

        >>> import torch, tridrop
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> found = tridrop.swap(model).measure(torch.ones(2, 5, 8))
        >>> found.before.dropouts, found.after.dropouts
        (4, 4)
        >>> found.after.operators < found.before.operators
        True
        >>> found.after.saved_bytes < found.before.saved_bytes
        True
        """
        from .core import swap, unswap  # which imports this module

        model = self._alive()
        with changed(model, unswap):
            before = cost_of(model, args, kwargs)
        if is_swapped(model, self.levels):
            after = cost_of(model, args, kwargs)
        else:
            with changed(model, lambda m: swap(m, **asdict(self.levels))):
                after = cost_of(model, args, kwargs)
        self.measurement = Measurement(before, after)
        return self.measurement

    def source(self, name: str) -> str:
        """The methods of a module that were rewritten, as Python, without comments.

        ``_tridrop`` in it is the module tridrop.swapping.lazy. A method ``_tridrop_forward`` is the
        form of forward for callers that take over what it returns.

        Args:
            name: of a module in the model, as in :attr:`Site.module`.

        Raises:
            ValueError: there is no such module, nothing in it was rewritten, or the model no longer
                exists.

        >>> import tridrop
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.dropout = nn.Dropout(0.1)
        ...     def forward(self, x, y):
        ...         return x + self.dropout(y)
        >>> print(tridrop.swap(Block()).source(""))  # doctest: +SKIP
        def forward(self, x, y):
            return _tridrop.value(_tridrop.add(x, _tridrop.dropout(self, 0, self.dropout, y)))
        """
        return Plans(self._alive(), self.levels).source(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, of plain types, for JSON."""
        words = self.became()
        return {
            "dry_run": self.dry_run,
            "levels": asdict(self.levels),
            "counts": self.counts(),
            "sites": [
                {**asdict(site), "parts": list(site.parts), "status": site.status, "became": text}
                for site, text in zip(self.sites, words, strict=True)
            ],
            "measurement": None if self.measurement is None else self.measurement.to_dict(),
        }

    def _alive(self) -> nn.Module:
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError("the model of this report no longer exists")
        return model

    def _groups(self) -> Iterator[tuple[Site, str, int]]:
        """Sites that look alike: the first, what became of it, and how many there are."""
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for site, text in zip(self.sites, self.became(), strict=True):
            group = groups.setdefault((site.kind, site.code, site.p, text), [site, text, 0])
            group[2] += 1
        for site, text, count in groups.values():
            yield site, text, count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.sites:
            yield "Nothing in this model drops: it is unchanged."
        else:
            table = Table(title="tridrop.swap" + (" (dry run)" if self.dry_run else ""))
            for column in ("sites", "in", "code", "p", "became"):
                justify: Literal["right", "left"] = "right" if column == "sites" else "left"
                table.add_column(column, justify=justify, no_wrap=column == "code")
            width = max(16, options.max_width - _BESIDES)
            for site, text, count in self._groups():
                cells = (str(count), site.kind, _cut(site.code, width), _rate(site.p), text)
                style = "yellow" if site.status == "left" else None
                table.add_row(*(Text(cell) for cell in cells), style=style)
            yield table
            counts = self.counts()
            yield ", ".join(f"{n} {status}" for status, n in counts.items())
            if counts["left"] == len(self.sites):
                yield "Nothing matched: the model is unchanged."
        if self.measurement is not None:
            footer = Table(box=None, padding=(0, 3, 0, 0))
            for column in ("one training forward", "before", "after", "ratio"):
                justify = "left" if column == "one training forward" else "right"
                footer.add_column(column, justify=justify)
            for row in self.measurement.rows():
                footer.add_row(*row)
            yield footer

    def __str__(self) -> str:
        console = Console(width=120, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _words(became: str, reason: str) -> str:
    """What became of a site, and why no more."""
    if not became:
        return f"left: {reason}"
    return f"{became} ({reason})" if reason else became


def _cut(code: str, width: int) -> str:
    """Code in one line."""
    line = " ".join(code.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _rate(p: float | None) -> str:
    return "" if p is None else f"{p:g}"
