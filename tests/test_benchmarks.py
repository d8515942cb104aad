"""The benchmarks, as far as they go without a GPU: what they compute from times."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "attention.py"


@pytest.fixture
def attention():
    specification = importlib.util.spec_from_file_location("attention_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_rows_hold_rates_costs_and_reasons(attention, monkeypatch):
    def measure(call, tensors):
        call(*tensors)  # on the CPU: what is timed must run
        p = call.__defaults__[0]
        return {"forward_ms": 1 + p, "backward_ms": 2 + 4 * p, "peak_MiB": 1.0}

    monkeypatch.setattr(attention, "measure", measure)
    tensors = [torch.randn(1, 1, 8, 16) for _ in range(3)]

    def unable(*_):
        raise RuntimeError("no kernel for this\nand a long story")

    calls = {
        (name, p): (tensors, lambda q, k, v, p=p, call=call: call(q, k, v, p, True))
        for name, call in (("tridrop", attention._tridrop), ("eager", attention._eager))
        for p in (0.0, 0.5)
    }
    calls["other", 0.0] = (tensors, unable)
    rows = list(attention.rows(calls, {"dim": 16}, flops=3e9))
    assert [r["why_not"] for r in rows if "why_not" in r] == ["no kernel for this"]
    dropped = {r["provider"]: r for r in rows if r["p"] == 0.5}
    assert set(dropped) == {"tridrop", "eager"}
    for row in dropped.values():
        assert row["forward_dropout_cost"] == pytest.approx(0.5)
        assert row["backward_dropout_cost"] == pytest.approx(1.0)
        assert row["forward_TFLOPs"] == pytest.approx(2.0)
        assert row["backward_TFLOPs"] == pytest.approx(3e9 * 2.5 / 4 / 1e9)


def test_eager_and_tridrop_compute_the_same_attention(attention):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 9, 16) for _ in range(3)]
    for causal in (False, True):
        found = attention._tridrop(*tensors, 0.0, causal)
        torch.testing.assert_close(found, attention._eager(*tensors, 0.0, causal))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_without_a_gpu_it_says_so(attention, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        attention.main()
