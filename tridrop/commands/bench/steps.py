"""Times training steps of whole models: the cost of dropout, and tridrop against eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import tridrop

from ..inspection import choose
from ..saved import kept_by, storage_bytes
from . import models
from .gate import PASSED, first_line
from .machine import Machine
from .models import Architecture, Size
from .providers import COMPILED, EAGER, TRIDROP
from .records import digits
from .timing import quantiles

BOTH = f"{TRIDROP}+{COMPILED}"
MEMORY = f"{TRIDROP}+memory"
PROVIDERS = (EAGER, COMPILED, TRIDROP, MEMORY, BOTH)
_SWAPPED = (TRIDROP, MEMORY, BOTH)
BATCHES = 4
WARM_UP = 3
# By how much loss and gradient at p = 0 may differ from eager's, due to another order of roundings.
AGREEMENT = {"bf16": 0.02, "fp32": 1e-3}
SEED = 0


@dataclass(frozen=True)
class StepOptions:
    """What is timed. :meth:`of` checks the given options and adds the defaults."""

    device: str
    dtype: str
    names: Sequence[str]
    providers: Sequence[str]
    sizes: Mapping[str, Size]
    p: float
    rounds: int
    calls: int
    """steps per turn"""

    @staticmethod
    def of(
        device: str,
        names: Sequence[str] | None = None,
        *,
        dtypes: Sequence[str] | None = None,
        providers: Sequence[str] | None = None,
        size: str | None = None,
        batch: int | None = None,
        p: float = 0.1,
        rounds: int | None = None,
        quick: bool = False,
    ) -> StepOptions:
        """The options of a device; None stands for its defaults.

        Args:
            device: "cuda" or "cpu".
            names: some of gpt2, bert, vit.
            dtypes: one of bf16 (autocast, with fp32 weights) and fp32.
            providers: some of eager, torch.compile, tridrop, tridrop+memory (swap with
                memory=True), and tridrop+torch.compile.
            size: "full" (that of the published models) or "tiny".
            batch: sequences or images per step.
            p: all rates of the model; 0 is timed as well.
            rounds: the number of rounds.
            quick: tiny models, few rounds.

        Raises:
            ValueError: a name is unknown, or a value is not allowed.
            ImportError: transformers is not installed.
        """
        cuda = device == "cuda"
        wanted = choose("model", names, tuple(models.ARCHITECTURES))
        kinds = choose("dtype", dtypes or ["bf16" if cuda else "fp32"], tuple(AGREEMENT))
        if len(kinds) != 1:
            raise ValueError(f"dtypes {', '.join(kinds)}: give only one for steps")
        (scale,) = choose("size", [size or ("full" if cuda and not quick else "tiny")], SCALES)
        if not 0 < p < 1:
            raise ValueError(f"p = {p}: give one between 0 and 1; p = 0 is timed as well")
        for name, given in (("rounds", rounds), ("batch", batch)):
            if given is not None and given < 1:
                raise ValueError(f"{name} = {given}: give 1 or more")
        sizes: dict[str, Size] = {
            name: getattr(models.ARCHITECTURES[name], scale) for name in wanted
        }
        if batch is not None:
            sizes = {name: replace(found, batch=batch) for name, found in sizes.items()}
        named = choose("provider", providers, PROVIDERS)
        models.check()
        return StepOptions(
            device, kinds[0], wanted, named, sizes, p, rounds or (5 if quick else 15),
            5 if cuda else 1,
        )  # fmt: skip


SCALES = ("full", "tiny")


@dataclass(frozen=True)
class StepRecord:
    """One row of the results; docs/performance.md explains the fields."""

    model: str
    provider: str
    p: float
    dtype: str
    device: str
    layers: int
    width: int
    length: int
    batch: int
    parameters: int
    check: str = ""
    sites: str = ""
    rounds: int = 0
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    speedup_over_eager: float | None = None
    speedup_over_compile: float | None = None
    dropout_cost: float | None = None
    why_not: str = ""


class Trainee:
    """A model with a provider and a rate, its optimizer and its data."""

    def __init__(self, options: StepOptions, name: str, provider: str, p: float) -> None:
        architecture: Architecture = models.ARCHITECTURES[name]
        self.provider, self.p, size = provider, p, options.sizes[name]
        torch.manual_seed(SEED)
        self.model = architecture.build(size, p).to(options.device).train()
        self.parameters = sum(t.numel() for t in self.model.parameters())
        self.sites: dict[str, int] = {}
        if provider in _SWAPPED:
            self.sites = tridrop.swap(self.model, memory=provider == MEMORY).counts()
        self.call: Callable[..., Any] = self.model
        if provider in (COMPILED, BOTH):
            self.call = torch.compile(self.model, dynamic=False)
        cuda = options.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=cuda)
        torch.manual_seed(SEED)
        self.data = [architecture.data(size, options.device) for _ in range(BATCHES)]
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if options.dtype == "bf16":
            self._autocast = lambda: torch.autocast(options.device, torch.bfloat16)
        self._turn = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss that the model computes."""
        with self._autocast():
            found: Tensor = self.call(**batch).loss
        return found

    def step(self) -> Tensor:
        """Forward, backward, AdamW."""
        self._turn += 1
        loss = self.loss(self.data[self._turn % len(self.data)])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss_and_gradient(self) -> tuple[float, float]:
        """The loss on the first batch, and the norm of its gradient."""
        loss = self.loss(self.data[0])
        loss.backward()
        norms = [t.grad.norm() for t in self.model.parameters() if t.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(torch.stack(norms).norm())

    def saved_bytes(self) -> int:
        """The bytes of all storages, except parameters, that a forward keeps for backward."""
        _, kept = kept_by(lambda: self.loss(self.data[0]))
        return storage_bytes(kept, without=self.model.parameters())


def run(
    options: StepOptions,
    on_start: Callable[[int], None] | None = None,
    on_row: Callable[[str], None] | None = None,
    on_records: Callable[[Sequence[StepRecord]], None] | None = None,
) -> list[StepRecord]:
    """Time the models; the arguments are those of :func:`tridrop.commands.bench.run`."""
    machine = Machine(options.device)
    if on_start is not None:
        on_start(len(options.names))
    found: list[StepRecord] = []
    for name in options.names:
        if on_row is not None:
            on_row(f"a step of {models.ARCHITECTURES[name].title}")
        found.extend(_ModelRun(machine, options, name).records())
        if on_records is not None:
            on_records(found)
        torch.compiler.reset()
        if machine.cuda:
            torch.cuda.empty_cache()
    return found


class _ModelRun:
    """The measurement of one model, whose trainees take turns."""

    def __init__(self, machine: Machine, options: StepOptions, name: str) -> None:
        self.machine, self.options, self.name = machine, options, name
        self.found: dict[tuple[str, float], StepRecord] = {}
        self.trainees: list[Trainee] = []
        self.expected: tuple[float, float] | None = None

    def records(self) -> list[StepRecord]:
        """Check and warm up every trainee, then time them in rounds."""
        self._expect()
        for provider in self.options.providers:
            checked = PASSED
            for p in (0.0, self.options.p):
                checked = self._enter(provider, p, checked)
        samples: dict[tuple[str, float], list[float]] = {}
        for i in range(self.options.rounds if self.trainees else 0):
            turn = i % len(self.trainees)
            for trainee in (*self.trainees[turn:], *self.trainees[:turn]):
                seconds = self.machine.wall_seconds([trainee.step] * self.options.calls)
                samples.setdefault((trainee.provider, trainee.p), []).append(seconds)
        for trainee in self.trainees:
            if not math.isfinite(float(trainee.step())):
                self._update(trainee, check="failed: its loss is no longer finite")
        medians = {who: quantiles(seconds)[0] for who, seconds in samples.items()}
        return [self._finished(who, samples.get(who, []), medians) for who in self.found]

    def _expect(self) -> None:
        """Loss and gradient of the model without dropout, in eager PyTorch."""
        self.expected = Trainee(self.options, self.name, EAGER, 0.0).loss_and_gradient()

    def _enter(self, provider: str, p: float, checked: str) -> str:
        """Make a trainee, or a record of why it cannot run; return the provider's check."""
        options, size = self.options, self.options.sizes[self.name]
        record = StepRecord(
            self.name, provider, p, options.dtype, self.machine.name, size.layers, size.width,
            size.length, size.batch, 0,
        )  # fmt: skip
        try:
            # A compiler or a swap can raise anything.
            trainee = Trainee(options, self.name, provider, p)
            if p == 0:
                checked = self._check(trainee)
            for _ in range(WARM_UP):
                trainee.step()
            self.found[provider, p] = replace(
                record,
                parameters=trainee.parameters,
                check=checked,
                sites=", ".join(f"{n} {name}" for name, n in trainee.sites.items()),
                saved_bytes=trainee.saved_bytes(),
                peak_bytes=self.machine.peak_bytes(trainee.step),
            )
            self.trainees.append(trainee)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            self.found[provider, p] = replace(record, check=checked, why_not=reason)
            if self.machine.cuda:
                torch.cuda.empty_cache()
        return checked

    def _check(self, trainee: Trainee) -> str:
        """ "passed" if loss and gradient at p = 0 are eager's and the swap fused something."""
        assert self.expected is not None
        if trainee.provider in _SWAPPED and not trainee.sites.get("fused"):
            return "failed: tridrop.swap fused nothing"
        allowed = AGREEMENT[self.options.dtype]
        for name, found, expected in zip(
            ("loss", "norm of the gradient"),
            trainee.loss_and_gradient(),
            self.expected,
            strict=True,
        ):
            # A NaN agrees with nothing.
            if not abs(found - expected) <= allowed * abs(expected):
                return f"failed: {name} at p = 0 is {found:.6g}, eager's is {expected:.6g}"
        return PASSED

    def _update(self, trainee: Trainee, **changes: Any) -> None:
        key = (trainee.provider, trainee.p)
        self.found[key] = replace(self.found[key], **changes)

    def _finished(
        self,
        who: tuple[str, float],
        samples: Sequence[float],
        medians: Mapping[tuple[str, float], float],
    ) -> StepRecord:
        record, (provider, p) = self.found[who], who
        if not samples:
            return record
        median, low, high = quantiles(samples)
        free = medians.get((provider, 0.0))

        def speedup(other: str) -> float | None:
            base = medians.get((other, p))
            if base is None or provider == other or record.check != PASSED:
                return None
            return digits(base / median)

        return replace(
            record,
            rounds=len(samples),
            median_ms=digits(median * 1e3),
            q20_ms=digits(low * 1e3),
            q80_ms=digits(high * 1e3),
            speedup_over_eager=speedup(EAGER),
            speedup_over_compile=speedup(COMPILED),
            dropout_cost=digits(median / free - 1) if free and p else None,
        )
