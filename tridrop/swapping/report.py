"""The report of :func:`tridrop.swap`: what it found and did, as data, as a table and as code."""

from __future__ import annotations

import io
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from ..base import terminal
from .present import Holds
from .rewrite import Levels
from .wording import Plans, remade

if TYPE_CHECKING:
    from .verify import Verification

# Similar functions of other libraries return the model, so that users write
# `model = tridrop.swap(model)` by habit.
_NO_MODEL = (
    "tridrop.swap changes the model in place and returns a report, which this is. Write\n"
    "    report = tridrop.swap(model)\n"
    "    out = model(x)"
)
_BESIDES = 76  # characters that the table needs for all columns except "code"


@dataclass(frozen=True)
class Site:
    """One place in a model where something is dropped, or where random numbers are drawn.

    Attributes:
        module: the name in the model of the module whose code contains the site, or which is
            itself the site.
        kind: the name of that module's class.
        code: the source of the call, or the module's repr.
        line: the line of the call in the file of the class.
        p: the probability of dropping, where it can be read off the module.
        parts: the ops that are one op now, in the order of computation. One alone means that the
            site draws tridrop's mask and is fused with nothing; none means that it was left as it
            was. "call" stands for the end of a called module, such as its last linear layer, which
            that module hands over uncomputed; "return" means that this module in turn hands its
            value to its caller. :meth:`Report.became` puts both into words.
        reason: why the site was left. For the dropout of a LoRA adapter that draws tridrop's mask
            but is not fused, why not. "unknown: ..." for a module that no source shows to be
            called.
        stream: the site's number under :func:`tridrop.rng`, where its seed is
            fold_in(seed, stream).
        condition: for a call in a branch of its forward, the condition of that branch on the
            forward's inputs or variables ("alibi is not None"). :meth:`Report.verify` tells whether
            it held.
    """

    module: str
    kind: str
    code: str
    line: int | None
    p: float | None
    parts: tuple[str, ...]
    reason: str
    stream: int | None
    condition: str = ""

    @property
    def status(self) -> str:
        """ "fused", "swapped" (tridrop's mask, fused with nothing) or "left"."""
        return "left" if not self.parts else "fused" if len(self.parts) > 1 else "swapped"


@dataclass
class Report:
    """The result of :func:`tridrop.swap`. Printed, it is a table with a row for each group of equal
    sites.

    It does not keep the model alive, which :meth:`verify` and :meth:`source` need.

    Attributes:
        sites: everything that drops, in the order of ``model.modules()`` and of the code.
        levels: what the swap was allowed to do.
        dry_run: whether nothing was changed.
        remade: with ``memory``, how many calls of each sort give a tensor that backward recomputes
            ("norm", "activation", and "product" for a gate), and how many calls of linear layers
            may take such a tensor without keeping it ("linear"). Attention layers do the same and
            are not counted.
        certain: whether the model consists of torch's own modules that do not drop, so that reading
            it leaves no doubt. Where no site was found and this is False, only :meth:`verify` can
            tell whether the model drops.
        verification: the last result of :meth:`verify`.

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
    certain: bool = False
    remade: dict[str, int] = field(default_factory=dict)
    verification: Verification | None = None
    read: InitVar[Mapping[str, Sequence[Holds]]] = MappingProxyType({})
    _model: weakref.ref[nn.Module] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    _words: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _read: dict[str, Sequence[Holds]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self, model: nn.Module | None, read: Mapping[str, Sequence[Holds]]) -> None:
        self._read = dict(read)
        self._model = None if model is None else weakref.ref(model)
        handed = any({"call", "return"} & set(site.parts) for site in self.sites)
        plans = Plans(model if handed else None, self.levels)
        self._words = [
            _words(plans.became(s.module, s.line, s.code, s.parts), s.reason) for s in self.sites
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_read": {}}  # these cannot be pickled

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not a model: raises a TypeError that says what to write."""
        raise TypeError(_NO_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        said = f"{type(self).__name__!r} object has no attribute {name!r}"
        # Libraries look for names with underscores; others are written by people who mean a model.
        raise AttributeError(said if name.startswith("_") else f"{said}: {_NO_MODEL}")

    def counts(self) -> dict[str, int]:
        """How many sites were fused, swapped and left."""
        found = Counter(site.status for site in self.sites)
        return {status: found[status] for status in ("fused", "swapped", "left")}

    def changed(self) -> list[str]:
        """The names of the classes that have changed since the swap read them.

        A method of the class was replaced, or a function of torch that it calls, or the code or the
        defaults of one of these. The present code then runs: such a module is called as it is, and
        nothing is fused with it. The list also names attention modules of transformers whose model
        has been given another attention function, which then runs; and those for which tridrop's
        attention replaces a function (eager_attention_forward in the model's file, or the one
        registered as "sdpa") that was changed, which does not run as long as "tridrop" is set.
        Another swap reads everything again. For an unpickled report the list is empty.

        >>> import tridrop
        >>> report = tridrop.swap(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        >>> report.changed()
        []
        """
        return [name for name, read in self._read.items() if not all(holds() for holds in read)]

    def became(self) -> list[str]:
        """What became of each site, in words: "linear + dropout, added by GPT2Block"."""
        return list(self._words)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run the model and compare every random number that it draws with the reported sites.

        Two training forwards run on the given inputs: one with every module's original class and
        attention function, and one swapped. If the model is not swapped at present, after
        :func:`tridrop.unswap` or a dry run, it is swapped for the second forward only; so
        ``tridrop.swap(model, dry_run=True).verify(batch)`` tells whether a model drops at all, and
        where. It observes the operators of torch and tridrop that torch's dispatcher sees,
        Python's ``random``, NumPy's global generator, and generators that modules hold.

        Each site gets a verdict: "drops as reported", "does not drop as reported", "draws nothing",
        "never called" or "p read but not used here". Draws that belong to no site are listed with
        their line of code. The costs of both forwards are counted as well: launches that drop,
        operators, and bytes saved for backward.

        Afterwards everything is as before: classes, numbers of sites, modes, buffers, gradients,
        and the random generators of torch (on the CPU and on accelerators), NumPy and Python. No
        backward runs. A model in training mode runs in the modes that its modules have; one in eval
        mode is put into training mode. Hooks run. Side effects of the forward on its inputs, such
        as filling a cache, happen twice. ``sys.setprofile`` is in use meanwhile.

        Returns:
            What was observed. The report keeps it in ``verification``, and prints it below its
            table. Branches of the forward that did not run are not observed: pass inputs like those
            of training.

        Raises:
            ValueError: the model no longer exists.
            RuntimeError: its modules were given other classes after the swap, by fully_shard for
                instance. Call verify before that.

        >>> import torch, tridrop
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> found = tridrop.swap(model).verify(torch.ones(2, 5, 8))
        >>> [checked.verdict for checked in found.sites] == 4 * ["drops as reported"]
        True
        >>> found.unreported
        ()
        >>> found.cost.before.dropouts, found.cost.after.dropouts
        (4, 4)
        >>> found.cost.after.saved_bytes < found.cost.before.saved_bytes
        True
        """
        from .verify import verify  # here, since verify.py imports what imports this module

        self.verification = verify(self, self._alive(), args, kwargs)
        return self.verification

    def raise_if_unaccounted(self) -> None:
        """Raise an error if :meth:`verify` saw something that the report does not account for.

        That is a site that does not drop as reported, or a draw that belongs to no site. A site
        that was never called is no error. This is meant for scripts that must stop.

        Raises:
            RuntimeError: there is such a site or draw, and the message names each with its line of
                code; or the report has not been verified.

        >>> import torch, tridrop
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> report = tridrop.swap(model)
        >>> _ = report.verify(torch.ones(1, 2))
        >>> report.raise_if_unaccounted()
        """
        if self.verification is None:
            raise RuntimeError("nothing was verified yet: call report.verify(batch) first")
        found = self.verification.unaccounted()
        if found:
            raise RuntimeError(
                "the report does not account for all that the model draws:\n" + "\n".join(found)
            )

    def source(self, name: str) -> str:
        """The Python source of a module's rewritten methods, without comments.

        In it ``_tridrop`` is the module tridrop.swapping.lazy. A method ``_tridrop_forward`` is the
        form of forward for callers that take over what it returns.

        Args:
            name: the name of a module in the model, as in :attr:`Site.module`.

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
        """The whole report in plain types, for JSON."""
        words = self.became()
        return {
            "dry_run": self.dry_run,
            "levels": asdict(self.levels),
            "counts": self.counts(),
            "sites": [
                {**asdict(site), "parts": list(site.parts), "status": site.status, "became": text}
                for site, text in zip(self.sites, words, strict=True)
            ],
            "certain": self.certain,
            "remade": self.remade,
            "changed": self.changed(),
            "verification": None if self.verification is None else self.verification.to_dict(),
        }

    def _alive(self) -> nn.Module:
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError("the model of this report no longer exists")
        return model

    def _groups(self) -> Iterator[tuple[Site, str, int]]:
        """Groups of equal sites: the first one, what became of it, and how many there are."""
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for site, text in zip(self.sites, self.became(), strict=True):
            group = groups.setdefault((site.kind, site.code, site.p, text), [site, text, 0])
            group[2] += 1
        for site, text, count in groups.values():
            yield site, text, count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.sites:
            yield self._nothing()
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
        if self.remade:
            yield remade(self.remade)
        branches = {f"{s.kind} if {s.condition}": None for s in self.sites if s.condition}
        if branches and self.verification is None:
            yield Text(
                f"Only in a branch: {'; '.join(branches)}. report.verify(batch) tells whether the "
                "branch runs."
            )
        if changed := self.changed():
            yield Text(
                f"Changed since the swap: {', '.join(changed)}. These classes run as they are now, "
                'and nothing is fused with them; only attention set to "tridrop" runs as before.',
                style="yellow",
            )
        if self.verification is not None:
            yield from _verified(self.verification)

    def _nothing(self) -> str:
        """The text of a report in which no site was found."""
        seen = self.verification
        if seen.drops() if seen is not None else not self.certain:
            text = "The source shows nothing that drops: the model is unchanged. "
            if seen is None:
                return text + "Whether it drops is unknown: run report.verify(batch)."
            return text + "Running it drew random numbers, see below."
        return "Nothing in this model drops: it is unchanged."

    def _repr_html_(self) -> str:
        return terminal.html(self)

    def __str__(self) -> str:
        console = Console(width=120, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _verified(seen: Verification) -> Iterator[Any]:
    """The end of a verified report: sites that are not as reported, the counts and the cost."""
    table = Table(title="verified")
    for column in ("seen", "in", "code", "what"):
        table.add_column(column, justify="right" if column == "seen" else "left")
    groups: Counter[tuple[str, str, str, str]] = Counter()
    for c in seen.sites:
        if c.verdict != "drops as reported":
            style = "red" if c.verdict == "does not drop as reported" else ""
            code = _cut(c.site.code, 40)
            groups[c.site.kind, code, f"{c.verdict}: {c.detail}", style] += 1
    for draw in seen.unreported:
        text = f"{draw.by}, which belongs to no site: {draw.line}"
        groups[draw.module, _cut(draw.code, 40), text, "red"] += 1
    for (kind, code, text, style), count in groups.items():
        table.add_row(*(Text(cell) for cell in (str(count), kind, code, text)), style=style)
    if groups:
        yield table
    yield "verified: " + (", ".join(f"{n} {w}" for w, n in seen.counts().items() if n) or "no draw")
    footer = Table(box=None, padding=(0, 3, 0, 0))
    for column in ("one training forward", "before", "after", "ratio"):
        footer.add_column(column, justify="left" if column == "one training forward" else "right")
    for row in seen.cost.rows():
        footer.add_row(*row)
    yield footer


def _words(became: str, reason: str) -> str:
    """What became of a site, and why nothing better became of it."""
    if not became:
        return f"left: {reason}"
    return f"{became} ({reason})" if reason else became


def _cut(code: str, width: int) -> str:
    """Code on one line of at most ``width`` characters."""
    line = " ".join(code.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _rate(p: float | None) -> str:
    return "" if p is None else f"{p:g}"
