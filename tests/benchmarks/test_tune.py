"""benchmarks/tune.py: its checks of candidates, and what it does without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts import DEVICE

import tridrop

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import tune  # noqa: E402
import tune_cases  # noqa: E402

from tridrop.backends.triton import attention_launch, launch, softmax_launch  # noqa: E402

# family -> a small size, and a setting that the family's function does not return for it
SMALL = {
    "elementwise_forward": ((24, 100), launch.Tile(2, 32, 4)),
    "elementwise_backward": ((24, 100), launch.Tile(2, 32, 4)),
    "elementwise_sums": ((24, 100), launch.Tile(2, 64, 4)),
    "gated_sums": ((24, 100), launch.Tile(2, 64, 4)),
    "norm_forward": ((24, 100), launch.Tile(2, 128, 4)),
    "norm_backward": ((24, 100), launch.Tile(2, 128, 4)),
    "softmax_forward": ((1, 2, 9, 100), launch.Tile(2, 128, 4)),
    "softmax_backward": ((1, 2, 9, 100), launch.Tile(2, 128, 4)),
    "attention_forward": ((1, 2, 40, 1, 16), attention_launch.Tile(16, 32, 4, 1)),
    "attention_dquery": ((1, 2, 40, 1, 16), attention_launch.Tile(16, 32, 4, 1)),
    "attention_dkey": ((1, 2, 40, 1, 16), attention_launch.Tile(16, 32, 4, 1)),
}


@pytest.fixture(autouse=True)
def _kernels():
    with tridrop.backend("triton"):
        yield


@pytest.fixture(params=SMALL)
def problem(request):
    family, (size, _) = tune_cases.FAMILIES[request.param], SMALL[request.param]
    return tune.Problem(family, size, torch.float32, DEVICE)


def test_every_family_is_tested_here():
    assert set(SMALL) == set(tune_cases.FAMILIES)


def test_a_candidate_is_held_to_the_present_results(problem):
    setting = {problem.family.setting: SMALL[problem.family.name][1]}
    assert problem.why_not(setting) is None
    problem.expected = tuple(t * 1.001 for t in problem.expected)
    assert "differs by" in problem.why_not(setting)


def test_a_probe_shows_every_decision(problem, monkeypatch):
    size, tile = SMALL[problem.family.name]
    monkeypatch.setattr(tune_cases, "SEED", tune_cases.SEED + 1)
    other = problem.family.problem(size, torch.float32, DEVICE, True)()
    flipped = tune.flips(other, problem.expected_probe)
    # Of two masks with p = 0.1 decisions differ at 0.18 of the places; of attention's a result
    # holds four, so that at 0.55 of them one differs, and dQ depends on all others of a row, too.
    rate = flipped / sum(t.numel() for t in other if bool(t.any()))
    expected = 1 - 0.82**4 if "attention" in problem.family.name else 0.18
    assert rate > expected - 0.05
    assert rate < expected + 0.05 or problem.family.name == "attention_dquery"
    monkeypatch.undo()
    problem.expected_probe = other
    assert problem.why_not({problem.family.setting: tile}) == f"{flipped} decisions differ"


def test_settings_come_back_and_must_be_asked_for():
    own = softmax_launch.tile
    unused = {"tile": launch.Tile(1, 32, 1)}
    with (
        pytest.raises(RuntimeError, match="nothing was tried"),
        tune_cases.replaced(softmax_launch, unused),
    ):
        assert softmax_launch.tile is not own
    assert softmax_launch.tile is own
    both = {"tile": unused["tile"], "REDUCTION_PROGRAMS": 7}
    with pytest.raises(KeyError), tune_cases.replaced(launch, both):
        raise KeyError
    assert (launch.REDUCTION_PROGRAMS, launch.tile.__name__) == (512, "tile")


def test_wrong_results_are_named():
    right = (torch.linspace(-1, 1, 50),)
    assert tune.difference(right, right) is None
    for wrong in (right[0] * 1.01, right[0].double(), right[0] / 0 - right[0] / 0):
        assert "result 0 differs" in tune.difference((wrong,), right)
    assert tune.flips((torch.full((3,), torch.nan),), (torch.ones(3),)) == 3


def test_candidates_in_turn_and_those_that_fail_are_not_timed(monkeypatch):
    family, seen = tune_cases.FAMILIES["elementwise_sums"], []

    def timed(problem, tried, rounds):
        seen.extend(tried)
        return [[4.0 / (1 + i)] * rounds for i in range(len(tried))]

    def why_not(problem, settings):
        return "it is wrong" if settings.get("REDUCTION_PROGRAMS") == 256 else None

    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune.Problem, "why_not", why_not)
    rows = tune.measure(family, (24, 100), "fp32", 3, DEVICE)
    assert rows[0]["present"]
    assert not any(row["present"] for row in rows[1:])
    assert len(seen) == sum(row["why_not"] is None for row in rows) < len(rows)
    assert all(s.get("REDUCTION_PROGRAMS") != 256 for s in seen)
    assert {("ms" in row) for row in rows if row["why_not"]} == {False}
    best = min((r for r in rows if "ms" in r), key=lambda r: r["ms"])
    assert best["gain"] == pytest.approx(len(seen))
    assert best["settings"] in tune.verdict(rows)
    assert rows[0]["settings"] == f"reduction_tile = {launch.reduction_tile(24, 100)}"


def _row(settings, instructions, why_not=None):
    return {"settings": settings, "instructions_per_element": instructions, "why_not": why_not}


def test_the_verdict_names_what_spills_less_and_what_that_costs():
    spills = _row("now", 20.0, "spills 112 bytes")
    more, less = _row("more", 21.0), _row("less", 20.0)
    assert "instead of 20 this does not: more" in tune.verdict([spills, more])
    assert tune.verdict([spills, more, less]).endswith("do not: less")
    assert "no candidate is better" in tune.verdict([spills, _row("other", 1.0, "spills 8 bytes")])
    assert tune.verdict([less, more]).startswith("-> stays")


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--static"])
    assert tune.arguments().out is None
    row = {"family": "f", "size": [1], "dtype": "bf16", "settings": "a", "present": True}
    said = []
    tune.report([[row | {"why_not": None, "registers": 9}]], None, {}, said.append)
    assert any("stays" in line for line in said)
    assert list(tmp_path.iterdir()) == []
    tune.report([[row | {"why_not": None, "registers": 9}]], tmp_path / "a", {}, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def _run(*arguments):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "tune.py"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_gpu_it_says_what_can_be_done():
    run = _run()
    assert run.returncode == 1
    assert "needs a CUDA device" in run.stderr
    assert "--static" in run.stderr


def test_static_figures_are_those_of_each_candidate(tmp_path):
    run = _run("--static", "--family", "norm_forward", "--arch", "sm_90", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("tune-static-*.json")
    rows = json.loads(file.read_text())
    assert file.with_suffix(".csv").exists()
    assert rows[0]["present"]
    assert rows[0]["settings"] == f"norm_forward_tile = {launch.norm_forward_tile(8192, 4096)}"
    held = {row["settings"]: row["elements_per_thread"] for row in rows}
    assert held["norm_forward_tile = Tile(rows=1, cols=4096, num_warps=4)"] == 32
    assert held["norm_forward_tile = Tile(rows=1, cols=4096, num_warps=16)"] == 8
    # Nothing spills with 32 elements a thread or fewer, and fewer take fewer registers.
    assert all(row["why_not"] is None for row in rows)
    registers = [r["registers"] for r in sorted(rows, key=lambda r: r["elements_per_thread"])]
    assert registers[0] < registers[-1]
