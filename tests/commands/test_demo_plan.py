"""tridrop demo: the number of steps follows their speed, by a clock that the tests set."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_helpers import TINY, parse, settled  # noqa: F401
from rich.console import Console

import tridrop.commands.demo
from tridrop.commands.demo import options, plan, report, text, train

pytestmark = pytest.mark.usefixtures("settled")


# ------------------------------------------------------------------- the plan, by numbers alone


class Machine:
    """Takes steps and evaluations of given seconds by a plan, as train() does."""

    def __init__(self, steps: int, eval_every: int, seconds: float | None = None) -> None:
        self.now, self.steps = 0.0, []
        self.plan = plan.Plan(steps, eval_every, seconds, clock=lambda: self.now)

    def go(self, step: Callable[[float], float], evaluation: Callable[[float], float]) -> None:
        def evaluate(n: int) -> None:
            took = evaluation(self.now)
            self.now += took
            self.plan.evaluated(n, took)
            self.steps.append(n)

        evaluate(0)
        n = 0
        while n < self.plan.steps:
            n += 1
            took = step(self.now)
            self.now += took
            self.plan.stepped(n, took)
            if self.plan.due(n):
                evaluate(n)


def at(*pace: tuple[float, float]) -> Callable[[float], float]:
    """Seconds by the time: the second of the last pair whose first has come."""
    return lambda now: [value for since, value in pace if now >= since][-1]


def test_a_machine_that_is_fast_enough_takes_all_steps() -> None:
    machine = Machine(1000, 40, 260.0)
    asked = machine.plan
    machine.go(at((0, 0.2)), at((0, 2.0)))
    assert machine.steps == list(range(0, 1001, 40))
    assert (asked.changes, asked.why()) == ([], None)


def test_a_slow_machine_takes_fewer_and_uses_its_time() -> None:
    machine = Machine(1000, 40, 260.0)
    asked = machine.plan
    machine.go(at((0, 1.0)), at((0, 5.0)))
    assert 230 < machine.now <= 260
    assert len(machine.steps) > plan.EVALUATIONS
    assert machine.steps[-1] == asked.steps < 260
    first = asked.changes[0]
    assert (first.step, first.step_seconds) == (10, 1.0)


@pytest.mark.parametrize("since", [1, 30, 100, 200, 240, 250])
def test_a_load_that_comes_later_is_seen(since: float) -> None:
    """Five times as slow from then on: the first ten steps could not have said it."""
    machine = Machine(1000, 40, 260.0)
    asked = machine.plan
    machine.go(at((0, 0.25), (since, 1.25)), at((0, 2.0), (since, 10.0)))
    assert machine.steps[-1] == asked.steps < 1000
    assert machine.now <= 260 + 10  # an evaluation more, where the slowness was not yet known
    assert asked.changes


def test_a_load_that_ends_gives_the_steps_back() -> None:
    machine = Machine(400, 40, 260.0)
    asked = machine.plan
    machine.go(at((0, 2.0), (60, 0.25)), at((0, 5.0), (60, 1.0)))
    assert asked.changes[0].steps < 150
    assert machine.steps[-1] == asked.steps == 400
    assert machine.now <= 260
    why = asked.why()
    assert why is not None
    assert "400 for 400" in why  # all were taken, by a plan that had changed


def test_the_time_that_is_up_ends_all_runs_at_the_same_step() -> None:
    machine = Machine(1000, 1000, 100.0)
    asked = machine.plan
    machine.go(at((0, 0.05), (10, 0.5), (90, 8.0)), at((0, 1.0)))
    last = asked.changes[-1]
    assert last.steps == last.step == machine.steps[-1]
    assert "all runs end here" in asked.news()
    asked.took = 104.2
    why = asked.why()
    assert why is not None
    for words in ("Training took 104 s", "at most 100", f"the time was up at step {last.step}"):
        assert words in why
    assert "--steps 1000 takes all" in why


def test_a_few_steps_are_taken_however_slow_they_are() -> None:
    machine = Machine(240, 40, 40.0)
    machine.go(at((0, 60.0)), at((0, 60.0)))
    assert machine.steps == [0, plan.LEAST]
    machine = Machine(7, 4, 40.0)
    machine.go(at((0, 60.0)), at((0, 60.0)))
    assert machine.steps == [0, 4, 7]
    assert machine.plan.why() is None


def test_evaluations_take_at_most_half_of_the_time() -> None:
    machine = Machine(1000, 40, 260.0)
    machine.go(at((0, 0.5)), at((0, 50.0)))
    assert machine.now <= 260
    assert (len(machine.steps) - 1) * 50 <= 150


def test_steps_that_were_given_are_taken() -> None:
    machine = Machine(50, 20)
    asked = machine.plan
    machine.go(at((0, 1e6)), at((0, 1e6)))
    assert machine.steps == [0, 20, 40, 50]
    assert (asked.changes, asked.why()) == ([], None)


def test_news_say_what_has_changed() -> None:
    now = 0.0
    asked = plan.Plan(1000, 40, 260.0, clock=lambda: now)
    asked.evaluated(0, 1.0)
    told = []
    for step in range(1, 31):
        now = 5 + 0.5 * step
        if asked.stepped(step, 0.5 if step < 20 else 0.2):
            told.append(asked.news())
    before = asked.changes[0].steps
    assert told == [
        "After step 10 a step of all runs takes 0.5 s, so that all 1,000 would take 8.4 minutes, "
        f"without evaluations: {before} are planned",
        "After step 30 a step of all runs takes 0.2 s, so that there is time for more: "
        f"1,000 instead of {before}",
    ]


# ----------------------------------------------------------------------- the command and its runs


class Clock:
    """Time goes by as runs take steps; ``load`` is how slow the machine then is."""

    def __init__(self, load: Callable[[float], float]) -> None:
        self.now, self._load = 0.0, load

    def __call__(self) -> float:
        return self.now

    def planned(self, changed: plan.Plan) -> None: ...

    def stepped(self, run: train.Run, step: int, loss: float) -> None:
        self.now += self._load(self.now) / 5

    def evaluated(self, record: train.Record) -> None:
        self.now += 3 * self._load(self.now)


def trained(load: Callable[[float], float]) -> tuple[plan.Plan, list[train.Run], train.Record]:
    asked = options.resolve(parse(*TINY, "--eval-every=40"))
    clock = Clock(load)
    asked_plan = plan.Plan(60, 20, 40.0, clock)
    tokens, valid = text.split(text.reference_text(), 200, 100)
    runs = train.make_runs(asked, torch.device("cpu"), asked_plan)
    record = train.Record()
    train.train(runs, tokens, valid, asked, asked_plan, record, clock)
    return asked_plan, runs, record


def test_all_runs_take_the_same_steps_at_the_same_rates() -> None:
    asked, runs, record = trained(at((0, 0.1), (5, 2.0)))
    assert record.steps[-1] == asked.steps < 60
    assert {len(run.seconds) for run in runs} == {asked.steps}
    assert len({run.schedule.get_last_lr()[0] for run in runs}) == 1
    assert asked.took <= 40 + 6
    for run in runs:
        assert len(record.valid(run.name)) == len(record.steps)


def test_the_same_times_give_the_same_curves() -> None:
    curves = []
    for _ in range(2):
        _, runs, record = trained(at((0, 0.1), (5, 2.0)))
        curves.append([(record.steps, record.train(run.name)) for run in runs])
    assert curves[0] == curves[1]


def test_the_command_says_and_saves_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "QUICK_SECONDS", 0.0)
    assert tridrop.commands.demo.run(parse(*TINY, "--quick", "--out", tmp_path)) == 0
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert found["options"]["steps"] == 240
    assert found["steps_planned"] == found["steps_done"] == plan.LEAST
    (change,) = found["steps_changes"]
    assert (change["step"], change["steps"]) == (plan.LEAST, plan.LEAST)
    assert found["training_seconds"] >= change["elapsed"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"all runs end here, after step {plan.LEAST}" in said
    assert f"{plan.LEAST} for 240" in said
    assert "--steps 240 takes all" in said
    assert found["steps_scaled"] in said


def test_time_limits_are_those_of_the_options() -> None:
    assert options.resolve(parse("--steps=5")).seconds is None
    assert options.resolve(parse()).seconds == options.SECONDS < 300
    assert options.resolve(parse("--quick")).seconds == options.QUICK_SECONDS < 60


# -------------------------------------------------------------------------------------- the sizes


def test_a_size_sets_what_was_not_given() -> None:
    small, medium = (options.resolve(parse("--size", size)) for size in options.SIZES)
    assert small == options.resolve(parse())
    assert (medium.size, medium.dim, medium.heads, medium.context) == ("medium", 256, 8, 256)
    assert medium.batch * medium.context == small.batch * small.context
    assert medium.dim // medium.heads == small.dim // small.heads
    assert options.resolve(parse("--size=medium", "--dim=64")).dim == 64
    quick = options.resolve(parse("--size=medium", "--quick"))
    assert (quick.context, quick.train_bytes) == (256, options.QUICK["train_bytes"])


def test_the_table_and_the_results_name_the_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--size=medium", "--steps=2", "--out", tmp_path]
    assert tridrop.commands.demo.run(parse(*arguments)) == 0
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert found["options"]["size"] == "medium"
    assert "size medium:" in capsys.readouterr().out


def test_help_tells_the_values_of_a_size() -> None:
    parser = argparse.ArgumentParser()
    tridrop.commands.demo.add_arguments(parser)
    said = " ".join(parser.format_help().split())
    assert "bytes that the model sees at a time (default: 128, medium 256)" in said
    assert "validation part, from the end of the text (default: 16384, quick 4096)" in said


def test_an_experiment_takes_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert tridrop.commands.demo.run(parse("--experiment=masks", "--size=medium")) == 2
    assert "does not take --size" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_fits_into_80_columns(tmp_path: Path, device: str) -> None:
    """Also with negative gaps, large models and the column of a GPU's peak."""
    assert tridrop.commands.demo.run(parse(*TINY, "--steps=2", "--out", tmp_path)) == 0
    result: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    result["device"]["type"] = device
    for run in result["runs"].values():
        run |= {"gap_final": -0.25, "saved_bytes": 1234 << 20, "peak_bytes": 2345 << 20}
        run |= {"train_final": 5.5, "train_best": 5.25, "peak_ratio": 1.0}
    shown = io.StringIO()
    Console(file=shown, width=80).print(report.table(result))
    words = shown.getvalue()
    assert "…" not in words
    for word in ("eager, second masks", "5.50 (5.25)", "-0.25", "1234.0"):
        assert word in words
    assert ("2345.0" in words) == (device == "cuda")
