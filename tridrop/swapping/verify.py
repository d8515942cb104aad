"""Compares what a model really draws, before and after a swap, with the sites of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..contract import seeds
from .locate import Locator
from .measure import Cost, Measurement, changed, cost_of
from .watch import Draw, Run, Watch
from .wording import is_swapped

if TYPE_CHECKING:
    from .report import Report, Site

AS_REPORTED = "drops as reported"
OTHERWISE = "does not drop as reported"
SILENT = "draws nothing"
NEVER = "never called"
READ = "p read but not used here"


@dataclass(frozen=True)
class Checked:
    """What was observed at one site.

    Attributes:
        site: the site of the report.
        verdict: "drops as reported"; "does not drop as reported"; "draws nothing", if it was
            called, with a rate of 0 or for a function that drops nothing; "never called"; "p read
            but not used here", for a module that was not called but whose rate was read by other
            code.
        detail: what was observed, in words.
        before, after: how many times it drew, before and after the swap.
    """

    site: Site
    verdict: str
    detail: str
    before: int
    after: int


@dataclass(frozen=True)
class Unreported:
    """Random numbers that were drawn in code for which the report has no site.

    Attributes:
        by: what drew: an operator such as "aten.native_dropout", "random.random" or
            "numpy.RandomState".
        p: the rate, if it can be read off the call.
        module: the name of the innermost module that was running.
        line, code: where the line of code is ("file.py:12"), and its source.
        before, after: how many times it drew, before and after the swap.
    """

    by: str
    p: float | None
    module: str
    line: str
    code: str
    before: int
    after: int

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.by}{where}, {self.line}: {self.code}"


@dataclass(frozen=True)
class Verification:
    """The result of :meth:`Report.verify`.

    Attributes:
        sites: what was observed at each site of the report, in the order of the report.
        unreported: the draws that belong to no site.
        cost: launches, operators and saved bytes of one training forward, before and after the
            swap.
    """

    sites: tuple[Checked, ...]
    unreported: tuple[Unreported, ...]
    cost: Measurement

    def counts(self) -> dict[str, int]:
        """How many sites have each verdict, and how many draws belong to no site."""
        found = Counter(checked.verdict for checked in self.sites)
        verdicts = (AS_REPORTED, OTHERWISE, SILENT, READ, NEVER)
        return {**{v: found[v] for v in verdicts}, "belongs to no site": len(self.unreported)}

    def drops(self) -> bool:
        """Whether the model drew anything at all."""
        return bool(self.unreported) or any(c.before or c.after for c in self.sites)

    def unaccounted(self) -> list[str]:
        """In words, what the report does not account for; empty if it is complete."""
        found = [
            f"{c.site.module or 'the model'}, {c.site.code}: {c.verdict}: {c.detail}"
            for c in self.sites
            if c.verdict == OTHERWISE
        ]
        return found + [f"belongs to no site: {draw}" for draw in self.unreported]

    def to_dict(self) -> dict[str, Any]:
        """The whole result in plain types, for JSON; sites are in the order of the report."""
        return {
            "counts": self.counts(),
            "sites": [
                {"verdict": c.verdict, "detail": c.detail, "before": c.before, "after": c.after}
                for c in self.sites
            ],
            "unreported": [asdict(draw) for draw in self.unreported],
            "cost": self.cost.to_dict(),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.counts().items() if n)
        return "\n".join([counts or "nothing drops", *self.unaccounted(), str(self.cost)])


def verify(
    report: Report, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Verification:
    """Run ``model`` before and after the swap, and compare the draws with a report's sites."""
    from .core import swap, unswap  # here, since core.py imports report.py

    locator = Locator(model, report.sites, report.levels)
    with changed(model, unswap):
        before, first = _seen(locator, model, args, kwargs)
    if is_swapped(model, report.levels):
        after, second = _seen(locator, model, args, kwargs)
    else:
        with changed(model, lambda m: swap(m, **asdict(report.levels))):
            after, second = _seen(locator, model, args, kwargs)
    checked = tuple(_check(i, site, first, second, locator) for i, site in enumerate(report.sites))
    unreported = tuple(_unreported(first.of(None), second.of(None)))
    return Verification(checked, unreported, Measurement(before, after))


def _seen(
    locator: Locator, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Cost, Run]:
    watch = Watch(locator)
    # An rng block around this call must not count these draws, nor warn of them.
    with seeds.rng(0) if seeds.active() else nullcontext():
        return cost_of(model, args, kwargs, watch), watch.run


def _unreported(first: Counter[Draw], second: Counter[Draw]) -> Iterator[Unreported]:
    for draw in dict.fromkeys((*first, *second)):
        yield Unreported(*draw, first[draw], second[draw])


def _check(i: int, site: Site, first: Run, second: Run, locator: Locator) -> Checked:
    before, after = first.of(i).total(), second.of(i).total()
    verdict, detail = _verdict(i, site, first, second, locator)
    return Checked(site, verdict, detail, before, after)


def _verdict(i: int, site: Site, first: Run, second: Run, locator: Locator) -> tuple[str, str]:
    before, after = bool(first.of(i)), bool(second.of(i))
    if not before and not after:
        if i in first.reached or i in second.reached:
            return SILENT, "its rate is 0" if site.p == 0 else "it was called, and dropped nothing"
        read = first.reads.get(i)
        if read:
            return READ, f"at {read}"
        called = "itself: its call in the code of another module is a site of its own"
        return NEVER, called if locator.is_called(i) else "in this forward"
    if before != after and i in (second if before else first).reached:
        when = "before" if before else "after"
        return OTHERWISE, f"it drew only {when} the swap"
    if site.status != "left" and after and second.by_tridrop(i) != {True}:
        return OTHERWISE, f"torch drew there: {_names(second.of(i))}"
    if site.status == "left" and before and after and first.by_tridrop(i) != second.by_tridrop(i):
        return OTHERWISE, f"it was changed: {_names(second.of(i))}"
    rates = first.rates(i) | second.rates(i)
    stated = {round(site.p, 6)} if site.p is not None else set()
    if len(rates | stated) > 1:
        text = " and ".join(f"{p:g}" for p in sorted(rates))
        return OTHERWISE, f"it drew at a rate of {text}, not {site.p:g}" if stated else (
            f"it drew at rates of {text}"
        )
    skipped = "" if before and after else ", in only one of the two runs: it is skipped at random"
    return AS_REPORTED, _names(second.of(i) if after else first.of(i)) + skipped


def _names(draws: Counter[Draw]) -> str:
    names = dict.fromkeys(draw.by for draw in draws)
    rates = dict.fromkeys(f"{draw.p:g}" for draw in draws if draw.p is not None)
    return ", ".join(names) + (f" at {', '.join(rates)}" if rates else "")
