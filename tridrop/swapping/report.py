"""What :func:`tridrop.swap` found and did, as data, as a table, as code and in numbers."""

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

# Other libraries give a model back, and so `model = tridrop.swap(model)` is written by habit.
_NO_MODEL = (
    "tridrop.swap changes the model in place and returns a report, which this is. Write\n"
    "    report = tridrop.swap(model)\n"
    "    out = model(x)"
)
_BESIDES = 76  # columns of the table for all but the code


@dataclass(frozen=True)
class Site:
    """One place in a model where something is dropped, or where random numbers are drawn.

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
            why it was not fused; "unknown: ..." of a module that no text shows to be called.
        stream: its number under :func:`tridrop.rng`: its mask is that of fold_in(seed, stream).
        condition: of a call that stands in a branch of its forward, the condition on what that is
            given or computes ("alibi is not None"); whether it holds :meth:`Report.verify` tells.
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
        """ "fused", "swapped" (its mask alone) or "left"."""
        return "left" if not self.parts else "fused" if len(self.parts) > 1 else "swapped"


@dataclass
class Report:
    """The result of :func:`tridrop.swap`. Printed, it is a table of all sites, alike ones together.

    It does not keep the model alive; :meth:`verify` and :meth:`source` need it.

    Attributes:
        sites: everything that drops, in the order of ``model.modules()`` and of the code.
        levels: what the swap was allowed to do.
        dry_run: whether nothing was changed.
        remade: with ``memory``, the calls that give a tensor which backward makes again ("norm",
            "activation", "product" of a gate) and those that keep none of one ("linear"), by kind.
            Layers of attention do too, and are not among them.
        certain: whether reading saw all there is: modules of torch's that do not drop, and nothing
            else. Where no site was found and this is False, only :meth:`verify` can tell.
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
        if hasattr(nn.Module, name) and not name.startswith("__"):
            raise AttributeError(f"no {name}: {_NO_MODEL}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def counts(self) -> dict[str, int]:
        """How many sites were fused, swapped and left."""
        found = Counter(site.status for site in self.sites)
        return {status: found[status] for status in ("fused", "swapped", "left")}

    def changed(self) -> list[str]:
        """The classes that are not what they were when the swap read them, by name.

        Somebody gave them another method, or torch another function that they call; or gave one of
        these another code or other defaults. What runs is what is there now: such a module is
        called as it is, and fused with nothing. Named too are attention modules of transformers
        whose model was given another attention function since, which then runs; and those whose
        function that tridrop's stands for (eager_attention_forward in the model's file, or what
        is registered as "sdpa") was replaced, which does not run as long as "tridrop" is set.
        Another swap reads all again. (Of a report that was unpickled nothing is known.)

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
        """Run the model and hold every random number that it draws against the sites.

        One training forward runs on the given inputs with every module's own class and attention
        function, and one swapped. After :func:`tridrop.unswap`, and for a dry run, the model is
        swapped for the time; so ``tridrop.swap(model, dry_run=True).verify(batch)`` says whether a
        model drops at all, and where. Seen are the operators of torch's dispatcher and tridrop's,
        Python's ``random`` and NumPy's global generator, and generators that modules hold.

        Of each site it says "drops as reported", "does not drop as reported", "draws nothing",
        "never called" or "p read but not used here", and of the draws that belong to no site the
        line of code. It also counts what both forwards cost: launches that drop, operators, and
        bytes saved for backward.

        Afterwards everything is as it was: classes, numbers of sites, modes, buffers, gradients,
        and the random generators of torch (of the CPU and of accelerators), NumPy and Python. No
        backward is run. A model in training mode runs as it is; one in eval mode is put into
        training mode. Hooks run. What the forward does to its inputs, such as filling a cache, it
        does twice. While it runs, ``sys.setprofile`` is taken.

        Returns:
            What was seen, which the report then prints below its table and has in
            ``verification``. Draws of a forward that did not happen, in another branch say, are
            not seen: give inputs like those of training.

        Raises:
            ValueError: the model no longer exists.
            RuntimeError: its modules were given other classes after the swap, by fully_shard for
                instance. Verify before that.

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
        from .verify import verify  # which needs what imports this module

        self.verification = verify(self, self._alive(), args, kwargs)
        return self.verification

    def raise_if_unaccounted(self) -> None:
        """Raise where :meth:`verify` saw what the report does not account for.

        That is a site that does not drop as reported, or a draw that belongs to no site. It is an
        exit for scripts; a site that was never called is no error.

        Raises:
            RuntimeError: there is such, each named with its line of code; or the report has not
                been verified.

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
        """Sites that look alike: the first, what became of it, and how many there are."""
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
                f"Only in a branch: {'; '.join(branches)}. report.verify(batch) tells whether "
                "they run."
            )
        if changed := self.changed():
            yield Text(
                f"Changed since the swap: {', '.join(changed)}. They are called as they are; "
                'only attention stays tridrop\'s where "tridrop" is set.',
                style="yellow",
            )
        if self.verification is not None:
            yield from _verified(self.verification)

    def _nothing(self) -> str:
        """What is to be said where no site was found."""
        seen = self.verification
        if seen.drops() if seen is not None else not self.certain:
            text = "Nothing that drops was found by reading: the model is unchanged. "
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
    """The end of a report that was verified: what does not hold, the counts and the cost."""
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
