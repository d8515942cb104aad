"""How many steps a training takes: what was asked for, or what the time allows at the speed seen.

The number is one for all runs, and changes only between two steps of all of them, so that their
curves have the same steps and the same learning rates.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

LOOK = 10  # steps between two looks at the speed, which is the mean over as many
LEAST = LOOK  # steps that are taken even if they take too long
EVALUATIONS = 6  # the least number of evaluations, if they take no more than half of the time
# The plan changes if its steps would take more of the time left than the first, or, where there are
# more to take, less than the second: a speed that wavers does not change it.
TIGHT, SLACK = 1.1, 0.75


@dataclass(frozen=True)
class Change:
    """A look at the speed that changed the number of steps.

    ``steps`` is the new number: ``step`` itself, if time was left for an evaluation only.
    """

    step: int  # after which step of all runs
    elapsed: float  # seconds since the beginning
    step_seconds: float  # what a step of all runs took of late
    steps: int


class Plan:
    """The numbers of steps, in all and between evaluations.

    Args:
        steps: the steps asked for.
        eval_every: the steps between two evaluations; fewer if there are fewer steps.
        seconds: what all may take, counted from here to the last evaluation. The number of steps
            then follows their speed, up to ``steps``; None takes ``steps`` however long they take.
        clock: counts seconds.
    """

    def __init__(
        self,
        steps: int,
        eval_every: int,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.began = clock()
        self.asked = self.steps = steps
        self.eval_every = self._eval_asked = eval_every
        self.seconds = seconds
        self.changes: list[Change] = []
        self.took = 0.0  # the seconds since the beginning, up to the last evaluation
        self._recent: deque[float] = deque(maxlen=LOOK)  # the seconds of the last steps
        self._evaluated: list[int] = []  # the numbers of steps before each evaluation
        self._first = 0.0  # the seconds of the evaluation before the first step
        self._in_steps: list[float] = []  # what each evaluation took, in steps of that time

    def evaluated(self, step: int, seconds: float) -> None:
        """An evaluation after ``step`` steps took that long."""
        self._evaluated.append(step)
        self.took = self.clock() - self.began
        if step:
            self._in_steps.append(seconds / self._pace())
        else:
            self._first = seconds

    def due(self, step: int) -> bool:
        """Whether there is to be an evaluation after that step."""
        return step >= self._evaluated[-1] + self.eval_every or step == self.steps

    def stepped(self, step: int, seconds: float) -> bool:
        """A step of all runs took that long; return whether the plan has changed.

        The time left is looked at after each step, and the training ends while there is just time
        for an evaluation; the number of steps is planned anew after each LOOK of them.
        """
        self._recent.append(seconds)
        if self.seconds is None or step < LEAST or step == self.steps:
            return False
        one, elapsed = self._pace(), self.clock() - self.began
        left = self.seconds - elapsed
        if step == LEAST:
            self._in_steps.append(self._first / one)
        evaluation = one * statistics.median(self._in_steps)
        if left < one + evaluation:
            return self._change(step, elapsed, one, step)
        if step % LOOK:
            return False
        would = (self.steps - step) * one
        would += evaluation * max(1, (self.steps - step) // self.eval_every)
        if would <= TIGHT * left and (self.steps == self.asked or would >= SLACK * left):
            return False
        self.eval_every = self._eval_asked
        more = int(left / (one + evaluation / self.eval_every))
        since = step - self._evaluated[-1]
        there = -(-(more + since) // self.eval_every)
        affordable = max(1, int(left / (2 * evaluation))) if evaluation else there
        wanted = min(max(1, EVALUATIONS + 1 - len(self._evaluated), there), affordable)
        if wanted != there:  # closer together, or farther apart
            more = int((left - wanted * evaluation) / one)
            self.eval_every = max(1, -(-(more + since) // wanted))
        return self._change(step, elapsed, one, min(self.asked, step + max(1, more)))

    def _pace(self) -> float:
        """The seconds of a step of all runs, of late."""
        return max(statistics.fmean(self._recent), 1e-9)

    def _change(self, step: int, elapsed: float, one: float, steps: int) -> bool:
        if steps == self.steps:
            return False
        self.steps = steps
        self.changes.append(Change(step, round(elapsed, 3), round(one, 6), steps))
        return True

    def news(self) -> str:
        """The last change, in a sentence."""
        last = self.changes[-1]
        if last.steps == last.step:
            return f"Time is left for one evaluation: all runs end here, after step {last.step:,}"
        before = self.changes[-2].steps if len(self.changes) > 1 else self.asked
        takes = f"After step {last.step:,} a step of all runs takes {last.step_seconds:.2g} s"
        if last.steps > before:
            return f"{takes}, so that there is time for more: {last.steps:,} instead of {before:,}"
        minutes = (last.elapsed + (before - last.step) * last.step_seconds) / 60
        return (
            f"{takes}, so that all {before:,} would take {minutes:.1f} minutes, without "
            f"evaluations: {last.steps:,} are planned"
        )

    def why(self) -> str | None:
        """What changed the number of steps, in a sentence; None if nothing did."""
        if not self.changes or self.seconds is None:
            return None
        looks = [
            f"the time was up at step {c.step:,}"
            if c.steps == c.step
            else f"after step {c.step:,}, at {c.step_seconds:.2g} s a step of all runs, "
            f"{c.steps:,} were planned"
            for c in self.changes
        ]
        if len(looks) > 4:
            looks[2:-1] = [f"{len(looks) - 3} more changes"]
        return (
            f"Training took {self.took:.0f} s, and is to take at most {self.seconds:.0f}, so that "
            f"the number of steps follows their speed: {self.steps:,} for {self.asked:,} "
            f"({'; '.join(looks)}). --steps {self.asked} takes all"
        )

    def as_json(self) -> list[dict[str, Any]]:
        """The changes as JSON values."""
        return [asdict(change) for change in self.changes]
