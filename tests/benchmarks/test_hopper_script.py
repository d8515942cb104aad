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

from tridrop.backends.triton import attention_launch, gpu, norm_launch, specialised  # noqa: E402
from tridrop.backends.triton.compile import SHARED  # noqa: E402
from tridrop.spec.attention import AttentionInputs, AttentionOptions  # noqa: E402

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


def test_the_specialised_forward_is_timed_beside_the_ordinary_one(monkeypatch):
    """As the launcher would choose them with the switch on, dense and causal, for each size."""
    monkeypatch.setattr(gpu, "of", lambda device: HOPPER)
    sizes = [size for step in hopper.SPECIALISED for size in step.sizes()]
    asked = {(width, s, causal) for width in (64, 128) for s in (4096, 16384) for causal in (0, 1)}
    assert {(width, s, causal) for *_, s, causal, width in sizes} == asked
    assert set(hopper.RATES) == {0.0, 0.1}
    for step in hopper.SPECIALISED:
        for batch, heads, tokens, causal, width in step.sizes():
            query = torch.empty(batch, heads, tokens, width, dtype=torch.bfloat16, device="meta")
            options = AttentionOptions(
                p=0.1, scale=1.0, upper=0 if causal else None, max_query=tokens, max_key=tokens
            )
            seed = torch.empty(2, dtype=torch.int64, device="meta")
            call = attention_launch.Call(AttentionInputs(query, query, query, seed=seed), options)
            special = specialised.tile(call.tensors, call.shape, call.flags, call.factors.scale)
            ordinary = attention_launch.forward_tile(width, 2, HOPPER)
            assert step.settings == {"ordinary": ordinary, "specialised": special}


def test_what_this_triton_cannot_specialise_is_a_row_without_a_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(specialised, "why_not", lambda device: "Triton 9 was not tried")
    monkeypatch.setattr(hopper, "timed", lambda problem, tried, rounds: [[1.0]] * len(tried))
    monkeypatch.setattr(hopper.Problem, "why_not", lambda self, settings: None)
    monkeypatch.setattr(hopper.Problem, "__init__", lambda self, *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    assert hopper.main(["--out", str(tmp_path), "--specialised"]) == 0
    rows = json.loads((tmp_path / "hopper.json").read_text())["records"]
    assert len(rows) == 2 * 16
    for row in rows:
        special = row["setting"] == "specialised"
        assert row["check"] == ("refused: Triton 9 was not tried" if special else "passed")
        assert ("median_ms" in row) != special
    assert "specialised: refused" in capsys.readouterr().out


@pytest.mark.parametrize("step", [*hopper.STEPS, *hopper.SPECIALISED], ids=lambda step: step.way)
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
    # a multiple of 32 keys: a loop without bounds cannot have fewer
    size = (24, 100) if step.way == "norm" else (1, 2, 64, step.causal[0], 16)
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
    every = pieces.all_pieces(Path("out"), Path("triton"))
    found = [piece for piece in every if "hopper" in piece.name]
    assert [piece.name for piece in found] == ["hopper", "hopper-specialised"]
    assert "--specialised" in found[1].command
    for piece in found:
        assert any(pattern in error for pattern in piece.refusals)
        assert piece.part == pieces.MORE
    assert list(tmp_path.iterdir()) == []


def test_the_steps_are_listed(capsys):
    assert hopper.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(hopper.STEPS) + len(hopper.SPECIALISED)
