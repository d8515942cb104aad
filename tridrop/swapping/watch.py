"""Observes which code of a model draws random numbers while the model runs.

Four observers together see every way to draw. torch's dispatcher reports every operator of torch
and tridrop, and comparing the states of the generators before and after tells whether it drew. A
profile function sees calls, and so Python's ``random`` and NumPy's generators, which never reach
the dispatcher; it also tells which places in the code were reached. Rewritten forwards, whose
values are computed later, report for which place a seed is taken
(:data:`tridrop.swapping.lazy.watcher`). And a property in place of ``nn.Dropout.p`` sees which code
reads a rate without calling the module.
"""

from __future__ import annotations

import ctypes
import dis
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.torch_private import AnyDropout, OpOverload, is_traced
from ..contract.mask import new_seed
from . import lazy
from .generators import Generators, moved
from .locate import Locator
from .measure import Observer, given_to, rates_of


class Draw(NamedTuple):
    """One call that drew random numbers.

    Attributes:
        by: the operator or function: "aten.bernoulli_", "tridrop.forward", "random.random".
        p: the rate, if it can be read off the call.
        module: the name in the model of the innermost module that was running.
        line: where the call is, "file.py:12": the innermost code that is not torch's or tridrop's.
        code: the source of that line.
    """

    by: str
    p: float | None
    module: str
    line: str
    code: str


@dataclass
class Run:
    """What was seen in one forward, by site number in the report; None stands for no site."""

    draws: dict[int | None, Counter[Draw]] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    reads: dict[int, str] = field(default_factory=dict)  # where the rate of a module was read

    def note(self, site: int | None, draw: Draw) -> None:
        self.draws.setdefault(site, Counter())[draw] += 1

    def of(self, site: int | None) -> Counter[Draw]:
        """The draws at a site, with how often each happened."""
        return self.draws.get(site, Counter())

    def rates(self, site: int) -> set[float]:
        """The rates of the draws at a site, as far as they are known."""
        return {round(draw.p, 6) for draw in self.of(site) if draw.p is not None}

    def by_tridrop(self, site: int) -> set[bool]:
        """{True} if only tridrop drew at a site, {False} if only others did, both if both did."""
        return {draw.by.startswith("tridrop.") for draw in self.of(site)}


class Watch:
    """Observes one forward of a model."""

    def __init__(self, locator: Locator) -> None:
        self.locator, self.run = locator, Run()
        # The numbers in a seed, since operators may take seeds stacked -> the sites that took it.
        self.seeds: dict[tuple[int, ...], set[int]] = {}
        self.last: tuple[FrameType, int] | None = None  # the last profiled event
        self.python: list[Any] = []
        self.numpy: list[tuple[Any, Callable[[], Any]]] = []
        self.states: list[Any] = []

    @contextmanager
    def __call__(self, generators: Generators) -> Iterator[Observer]:
        self.generators = generators
        self.numpy = [(g, _fingerprint_of(g)) for g in generators.of_numpy]
        self.python = [read.__self__ for read, _ in generators.of_python]
        self.states = [read() for _, read in self.numpy]
        profile = sys.getprofile()
        with ExitStack() as stack:
            stack.enter_context(_rates_watched(self))
            stack.callback(setattr, lazy, "watcher", lazy.watcher)
            lazy.watcher = self.seed
            stack.callback(sys.setprofile, profile)
            sys.setprofile(self.profile)
            yield self.operator

    # ------------------------------------------------------------------ torch's and tridrop's draws

    def seed(self, seed: Tensor, owner: nn.Module, place: int | None) -> None:
        """Called when a place in a rewritten forward takes a seed."""
        site = self.locator.of_place(owner, place)
        if site is not None and not is_traced(seed):
            self.seeds.setdefault(tuple(seed.tolist()), set()).add(site)

    def operator(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        before: list[Tensor],
    ) -> None:
        """Called after an operator has run."""
        name = func.overloadpacket.__name__
        if func.namespace == "tridrop":
            if name != "new_seed":
                self.ours(func, args, kwargs)
            return
        rates = rates_of(func, args, kwargs)
        drew = any(p is None or p > 0 for p in rates)
        if not rates and torch.Tag.nondeterministic_seeded in func.tags:
            drew = True  # for instance from a generator that the caller passed
        if not drew and not moved(before, self.generators.torch_state()):
            return
        frame = sys._getframe(2)
        if _draws_a_seed(frame):
            return
        p = next((p for p in rates if p), None)
        given = given_to(func, args, kwargs).get("p")
        if isinstance(given, float):
            p = 1 - given if name in ("bernoulli_", "bernoulli") else given
        self.note(f"{func.namespace}.{name}", p, frame)

    def ours(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called after an operator of tridrop has run."""
        rates = rates_of(func, args, kwargs)
        given = [x for n, x in given_to(func, args, kwargs).items() if n in ("seed", "seeds")]
        given = [x for x in given if isinstance(x, Tensor) and x.numel()]
        if not given or (rates and all(p == 0 for p in rates)):
            return
        name = f"tridrop.{func.overloadpacket.__name__}"
        keys = [tuple(row) for x in given for row in x.reshape(-1, x.shape[-1]).tolist()]
        sites = sorted(set().union(*(self.seeds.get(key, set()) for key in keys)))
        frame = sys._getframe(3)
        for site in sites:
            # If an op has two rates, the second is that of the drop path.
            path = self.locator.drops_samples(site)
            p = rates[-1] if path and len(rates) > 1 else next((p for p in rates if p), None)
            self.run.note(site, Draw(name, p, *self.locator.where(frame)))
        if not sites:
            self.note(name, next((p for p in rates if p), None), frame)

    def note(self, by: str, p: float | None, frame: FrameType) -> None:
        """Note a draw at the site that the stack of calls is in."""
        p = None if p is None else round(p, 9)
        self.run.note(self.locator.site(frame), Draw(by, p, *self.locator.where(frame)))

    # ----------------------------------------------------------- calls, and what no dispatcher sees

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """An event of sys.setprofile."""
        owner = getattr(arg, "__self__", None) if event == "c_call" else None
        watched = isinstance(owner, random.Random) and any(owner is g for g in self.python)
        if watched and arg.__name__ in ("random", "getrandbits"):
            self.note(f"random.{arg.__name__}", None, frame)
        for i, (generator, read) in enumerate(self.numpy):
            state = read()
            if state != self.states[i]:
                self.states[i] = state
                self.moved(generator, frame.f_back if event == "call" else frame)
        if event.endswith("return"):
            self.last = frame, frame.f_lasti
            return
        self.last = frame, frame.f_lasti
        if event == "call":
            if frame.f_code.co_name == "_call_impl":
                self.locator.entered(frame, self.run.reached)
            if frame.f_back is not None:
                self.locator.reach(frame.f_back, self.run.reached)
        elif event == "c_call":
            self.locator.reach(frame, self.run.reached)

    def moved(self, generator: Any, frame: FrameType | None) -> None:
        """Called when a generator of NumPy has moved since the last profiled event."""
        if frame is None:
            return
        line = None
        if self.last is not None and self.last[0] is frame:
            line = _line_of_call(frame.f_code, self.last[1], frame.f_lasti)
        by = f"numpy.{type(generator).__name__}"
        site = self.locator.site(frame, line)
        self.run.note(site, Draw(by, None, *self.locator.where(frame, line)))


def _fingerprint_of(generator: Any) -> Callable[[], Any]:
    """A function that returns something which changes with every draw from a generator of NumPy."""
    bits = getattr(generator, "bit_generator", None) or generator._bit_generator
    if type(bits).__name__ == "MT19937":
        # The state is 624 words and a position. Two of these suffice to see a change; reading all
        # of them takes 80 microseconds.
        words = ctypes.cast(bits.ctypes.state_address, ctypes.POINTER(ctypes.c_uint32))
        return lambda: (words[0], words[624])
    return lambda: repr(bits.state)


def _line_of_call(code: CodeType, first: int, last: int) -> int | None:
    """The line of the calls between two instructions, if all of them are on one line."""
    line, found = None, set()
    for at in dis.get_instructions(code):
        line = at.starts_line if isinstance(at.starts_line, int) and at.starts_line else line
        if sys.version_info >= (3, 11) and at.positions is not None and at.positions.lineno:
            line = at.positions.lineno
        if first < at.offset < last and at.opname.startswith("CALL"):
            found.add(line)
    return found.pop() if len(found) == 1 else None


def _draws_a_seed(frame: FrameType | None) -> bool:
    """Whether tridrop.new_seed called an operator: the draws are the ops that take the seed."""
    for _ in range(6):
        if frame is None:
            return False
        if frame.f_code is new_seed.__code__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _rates_watched(watch: Watch) -> Iterator[None]:
    """Note where code other than the module reads the ``p`` of a dropout of torch or tridrop."""

    def read(module: nn.Module) -> Any:
        try:
            p = module.__dict__["p"]
        except KeyError:
            raise AttributeError("p") from None
        site = watch.locator.own_site(module)
        frame = sys._getframe(1)
        others = watch.locator.owner(frame) is not module and not watch.locator.is_library(frame)
        if site is not None and others:
            watch.run.reads.setdefault(site, watch.locator.where(frame)[1])
        return p

    def write(module: nn.Module, p: Any) -> None:
        module.__dict__["p"] = p

    # A property of the base class takes precedence over the attributes of all instances.
    AnyDropout.p = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del AnyDropout.p
