"""Trains the runs in turns, step by step, from the same weights and on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from tridrop.swapping import Report

from ..saved import kept_by, storage_bytes
from . import architectures
from .model import loss_of
from .options import Options
from .place import one_thread
from .plan import Plan

WARM_UP = 20  # steps over which the learning rate rises


class Diverged(RuntimeError):
    """A loss is no longer finite; the message says at which step."""


class Watcher(Protocol):
    """Gets notified of the progress."""

    def planned(self, plan: Plan) -> None:
        """The number of steps has changed with their speed."""

    def stepped(self, run: Run, step: int, loss: float) -> None:
        """``run`` has done step number ``step``."""

    def evaluated(self, record: Record) -> None:
        """All runs have been evaluated."""


class Run:
    """One training: a model, its optimiser, and its own state of torch's generators.

    With its own state, a run draws the same random numbers as if it were trained alone.
    """

    def __init__(
        self,
        name: str,
        label: str,
        model: nn.Module,
        options: Options,
        plan: Plan,
        seed: int,
        swapped: Report | None = None,
    ) -> None:
        self.name = name
        self.label = label
        self.model = model
        self.swapped = swapped  # what tridrop.swap did to the model
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            # No weight decay: dropout is the only regulariser.
            model.parameters(),
            lr=options.lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, plan.steps)
        )
        self.seconds: list[float] = []
        self.saved_bytes = 0
        self.peak_bytes: int | None = None
        with _generators_restored(self.device):
            torch.manual_seed(seed)
            self._generators = _generators(self.device)

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        with _generators_restored(self.device):
            _set_generators(self.device, self._generators)
            yield
            self._generators = _generators(self.device)

    def step(self, tokens: Tensor) -> float:
        """Train on examples [batch, 2, context]; return the loss with dropout before the step."""
        with self._own_generators():
            self.model.train()
            _wait(self.device)
            start = time.perf_counter()
            loss = loss_of(self.model, tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            _wait(self.device)
            self.seconds.append(time.perf_counter() - start)
            self.schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, examples: Tensor, batch: int) -> float:
        """The mean loss over examples [n, 2, context], without dropout."""
        self.model.eval()
        total = sum(float(loss_of(self.model, part)) * len(part) for part in examples.split(batch))
        return total / len(examples)

    def faster_threads(self, tokens: Tensor) -> int:
        """1, or torch's number of threads, whichever is faster for a forward and backward.

        torch's threads wait for each other: if other programs use the cores, one thread is many
        times as fast. Weights and generators do not change.
        """
        threads, generators = torch.get_num_threads(), self._generators
        times: dict[int, list[float]] = {1: [], threads: []}
        for count in (1, threads) * 3:
            if times[threads] and min(times[threads]) > 3 * min(times[1]):
                break  # threads that wait for each other, which takes long
            torch.set_num_threads(count)
            start = time.perf_counter()
            with self._own_generators():
                loss_of(self.model.train(), tokens).backward()
            times[count].append(time.perf_counter() - start)
        torch.set_num_threads(threads)
        self.model.zero_grad(set_to_none=True)
        self._generators = generators
        return min(times, key=lambda count: min(times[count]))

    def measure(self, tokens: Tensor) -> None:
        """Set ``saved_bytes`` and ``peak_bytes`` from one step's forward and backward.

        Weights and generators do not change. This also triggers everything that is compiled at the
        first call, so that no timed step does.
        """
        generators = self._generators
        with self._own_generators():
            self.model.train()
            self.saved_bytes = saved_for_backward(self.model, tokens)
            if self.swapped is not None:
                self.swapped.verify(tokens[:, 0])
        self._generators = generators
        if self.device.type != "cuda":
            return
        with self._own_generators():
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            loss_of(self.model, tokens).backward()
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
            self.model.zero_grad(set_to_none=True)
        self._generators = generators


def saved_for_backward(model: nn.Module, tokens: Tensor) -> int:
    """The bytes that one step saves for backward. Each storage counts once, parameters do not."""
    _, kept = kept_by(lambda: loss_of(model, tokens).backward())
    model.zero_grad(set_to_none=True)
    return storage_bytes(kept, without=model.parameters())


EAGER = ("eager", "eager_2", "eager_3")


def make_runs(options: Options, device: torch.device, plan: Plan) -> list[Run]:
    """The runs, all with the weights of the first.

    The other two eager runs differ from the first only in the seeds of their masks. They are the
    control: differences between the three are noise, in losses and in times.
    """
    with _generators_restored(device):
        torch.manual_seed(options.seed)
        start, _ = architectures.build(options, fused=False, drops=False)
    runs = []
    for i, (name, label, fused) in enumerate(
        (
            ("none", "no dropout", False),
            ("eager", "eager dropout", False),
            ("eager_2", "eager, second masks", False),
            ("eager_3", "eager, third masks", False),
            ("tridrop", "tridrop, memory" if options.memory else "tridrop", True),
        )
    ):
        with _generators_restored(device):
            model, swapped = architectures.build(options, fused=fused, drops=name != "none")
        model.load_state_dict(start.state_dict())
        seed = options.seed + i
        runs.append(Run(name, label, model.to(device), options, plan, seed, swapped))
    return runs


def learning_rate(step: int, steps: int) -> float:
    """The factor on --lr: it rises at first, then falls along a cosine to a tenth."""
    warm_up = min(1.0, (step + 1) / WARM_UP)
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))


class Record:
    """The losses measured so far. It has only whole evaluations, even after an interrupt."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._losses: list[dict[str, tuple[float, float]]] = []

    def add(self, step: int, losses: dict[str, tuple[float, float]]) -> None:
        """Add the (training, validation) losses of every run after ``step`` steps."""
        self._losses.append(losses)
        self.steps.append(step)

    def train(self, name: str) -> list[float]:
        """The training losses of a run, one per entry of ``steps``."""
        return [losses[name][0] for _, losses in zip(self.steps, self._losses, strict=False)]

    def valid(self, name: str) -> list[float]:
        """The validation losses of a run, one per entry of ``steps``."""
        return [losses[name][1] for _, losses in zip(self.steps, self._losses, strict=False)]


def windows_of(tokens: Tensor, context: int, limit: int | None = None) -> Tensor:
    """Windows [n, context + 1] that cover the text end to end; or ``limit`` of them, evenly."""
    windows = tokens.unfold(0, context + 1, context)
    if limit is not None and limit < len(windows):
        windows = windows[torch.linspace(0, len(windows) - 1, limit).long()]
    return windows


def batches(tokens: Tensor, options: Options) -> Iterator[Tensor]:
    """An endless sequence of random examples [batch, 2, context], which the seed determines."""
    generator = torch.Generator().manual_seed(options.seed)
    windows = tokens.unfold(0, options.context + 1, 1)
    while True:
        chosen = windows[torch.randint(len(windows), (options.batch,), generator=generator)]
        yield architectures.examples(options, chosen, generator)


def train(
    runs: list[Run],
    train_tokens: Tensor,
    valid_tokens: Tensor,
    options: Options,
    plan: Plan,
    record: Record,
    watcher: Watcher,
) -> None:
    """Train all runs by the plan, and add the measurements to ``record``.

    If the plan limits the seconds, the number of steps follows their speed, and torch gets the
    number of threads that is faster.

    The record grows by whole evaluations, so that it is consistent after an interrupt at any time.

    Raises Diverged if a loss is no longer finite.
    """
    clock, device = plan.clock, runs[0].device
    fixed = torch.Generator().manual_seed(options.seed)
    windows = windows_of(valid_tokens, options.context)
    valid = architectures.examples(options, windows, fixed).to(device)
    windows = windows_of(train_tokens, options.context, limit=len(valid))
    seen = architectures.examples(options, windows, fixed).to(device)
    data = batches(train_tokens, options)
    first = next(data).to(device)
    # What is measured first depends on no threads, and on a busy machine one is many times as fast.
    with nullcontext() if plan.seconds is None else one_thread():
        for run in runs:
            run.measure(first)

    def evaluate(step: int) -> None:
        start = clock()
        found = {
            run.name: (run.evaluate(seen, options.batch), run.evaluate(valid, options.batch))
            for run in runs
        }
        if not all(math.isfinite(loss) for losses in found.values() for loss in losses):
            raise Diverged(f"a loss is no longer finite at step {step}: lower --lr")
        record.add(step, found)
        watcher.evaluated(record)
        plan.evaluated(step, clock() - start)

    if plan.seconds is not None:
        torch.set_num_threads(runs[0].faster_threads(first))
    step = 0
    evaluate(0)
    while step < plan.steps:
        start = clock()
        step += 1
        tokens = first if step == 1 else next(data).to(device)
        # In turns, other load on the machine affects all runs equally, and none is always first.
        turn = step % len(runs)
        for run in runs[turn:] + runs[:turn]:
            watcher.stepped(run, step, run.step(tokens))
        if plan.stepped(step, clock() - start):
            watcher.planned(plan)
        if plan.due(step):
            evaluate(step)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's generators: the CPU's and, on CUDA, the device's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    states = _generators(device)
    try:
        yield
    finally:
        _set_generators(device, states)
