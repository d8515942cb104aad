"""benchmarks/hopper.py: its settings are the launchers', and each gives the same results."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import DEVICE

import tridrop

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import hopper  # noqa: E402
from gpu_plan import pieces  # noqa: E402

from tridrop.backends.triton import attention_launch, gpu, norm_launch  # noqa: E402
from tridrop.backends.triton.compile import SHARED  # noqa: E402

HOPPER = gpu.Gpu(90, SHARED["sm_90"])


def test_the_last_setting_is_the_launchers_own(monkeypatch):
    monkeypatch.setattr(gpu, "of", lambda device: HOPPER)
    for step in hopper.STEPS:
        *before, present = step.settings.values()
        assert present not in before
        if step.way == "norm":
            options = tridrop.spec.elementwise.NormOptions(norm="layer_norm")
            plan = norm_launch.launch.plan(
                (8192, 4096), options, norm_launch.launch.norm_backward_tile, whole_rows=True
            )
            assert present == norm_launch.backward_stages(plan, options, torch.device("meta"))
        else:
            for width in step.widths:
                choose = getattr(attention_launch, f"{step.way}_tile")
                assert choose(width, 2, HOPPER) == present


@pytest.mark.parametrize("step", hopper.STEPS, ids=lambda step: step.way)
@pytest.mark.parametrize("p", hopper.RATES)
def test_every_setting_is_checked_and_timed(monkeypatch, step, p):
    """In the interpreter, with small tiles and in fp32, which it multiplies right."""
    if DEVICE == "cpu":
        small = {
            name: value if isinstance(value, int) else value._replace(queries=16, keys=32)
            for name, value in step.settings.items()
        }
        step = replace(step, settings=small)
    monkeypatch.setattr(hopper.torch, "bfloat16", torch.float32)
    monkeypatch.setattr(
        hopper, "timed", lambda problem, tried, rounds: [[2.0, 1.0, 3.0]] * len(tried)
    )
    size = (24, 100) if step.way == "norm" else (1, 2, 40, 0, 16)
    with tridrop.backend("triton"):
        rows = hopper.group(step, size, p, 3, DEVICE)
    assert [row["setting"] for row in rows] == list(step.settings)
    for row in rows:
        assert row["check"] == "passed"
        assert (row["median_ms"], row["best_ms"]) == (2.0, 1.0)
        assert ("tflops" in row) == (step.way != "norm")
    json.dumps(rows)


def test_a_setting_that_is_wrong_is_not_timed(monkeypatch):
    step = hopper.STEPS[1]
    monkeypatch.setattr(hopper.Problem, "why_not", lambda self, settings: "3 decisions differ")
    monkeypatch.setattr(hopper.torch, "bfloat16", torch.float32)
    with tridrop.backend("triton"):
        rows = hopper.group(step, (1, 2, 40, 0, 16), 0.1, 3, DEVICE)
    assert {row["check"] for row in rows} == {"3 decisions differ"}
    assert not any("median_ms" in row for row in rows)


def test_without_a_hopper_gpu_it_says_so_and_the_piece_is_skipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    (piece,) = (p for p in pieces.all_pieces(Path("out"), Path("triton")) if p.name == "hopper")
    assert any(pattern in error for pattern in piece.refusals)
    assert piece.part == pieces.MORE
    assert list(tmp_path.iterdir()) == []


def test_the_steps_are_listed(capsys):
    assert hopper.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(hopper.STEPS)
