"""tridrop.nn.LoRALinear, and the benchmark of LoRA layers."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tridrop
from tridrop.nn import LoRALinear

SEED = 11


def layer(p=0.3, **options) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(12, 8), r=3, alpha=6, p=p, **options)
    nn.init.normal_(made.lora_B)
    if made.lora_bias is not None:
        nn.init.normal_(made.lora_bias)
    return made


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"bias": True, "rslora": True}], ids=["plain", "bias"])
def test_the_formula(p, options):
    made = layer(p, **options)
    tridrop.nn.number_sites(made)
    x = torch.randn(2, 5, 12, requires_grad=True)
    with tridrop.rng(SEED):
        found = made(x)
    keep = tridrop.keep_mask(tridrop.fold_in(SEED, made.site), x.shape, p)
    dropped = torch.where(keep, x * 2**32 / (2**32 - round(p * 2**32)), 0.0)
    branch = F.linear(F.linear(dropped, made.lora_A), made.lora_B, made.lora_bias)
    expected = made.base(x) + 6 / (math.sqrt(3) if options else 3) * branch
    torch.testing.assert_close(found, expected)
    trained = [x, *(w for w in made.parameters() if w.requires_grad)]
    assert len(trained) == (4 if options else 3)
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, trained, weights),
        torch.autograd.grad(expected, trained, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_it_begins_as_its_base_with_pefts_initial_values():
    peft = pytest.importorskip("peft")
    base = nn.Linear(12, 8)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    torch.manual_seed(1)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    torch.manual_seed(1)
    nn.Linear(12, 3, bias=False), nn.Linear(3, 8, bias=False)  # PEFT's first values, overwritten
    ours = LoRALinear(base, r=3, alpha=6, p=0.2)
    torch.testing.assert_close(ours.lora_A, theirs.lora_A["default"].weight, rtol=0, atol=0)
    assert not ours.lora_B.any()
    assert ours.scaling == theirs.scaling["default"] == 2
    x = torch.randn(4, 12)
    assert torch.equal(ours(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merging(dtype):
    made = layer(bias=True).eval()
    made.base.to(dtype)
    assert made.lora_A.dtype == torch.float32
    x, before = torch.randn(4, 12).to(dtype), made.base.weight.clone()
    expected = made(x)
    assert expected.dtype == dtype
    assert made.merge() is made.merge()
    assert made.merged
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(made(x), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(made.train()(x), made.base(x))
    made.unmerge()
    torch.testing.assert_close(made.base.weight, before, rtol=tolerance, atol=tolerance)
    assert "merged" not in repr(made)


def test_any_module_can_be_the_base():
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    made = LoRALinear(base, 2, in_features=6, out_features=6)
    made(torch.randn(3, 6)).sum().backward()
    assert all(w.grad is None for w in base.parameters())
    with pytest.raises(TypeError, match="Sequential has no floating-point weight"):
        made.merge()


def test_bad_input():
    with pytest.raises(ValueError, match="rank is an integer of 1 or more"):
        LoRALinear(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="has no attribute in_features: give in_features="):
        LoRALinear(nn.Tanh())
    with pytest.raises(TypeError, match=r"give the torch\.nn\.Module to adapt"):
        LoRALinear(torch.ones(2, 2))
    with pytest.raises(ValueError, match="p"):
        LoRALinear(nn.Linear(2, 2), p=1.5)
    made = LoRALinear(nn.Linear(2, 2, bias=False), 1, bias=True)
    with pytest.raises(ValueError, match="give the base layer a bias of zeros"):
        made.merge()


def test_the_benchmark_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import lora

    given = ["--device=cpu", "--size=tiny", "--ranks=2,4", "--rounds=2", "--providers=peft,tridrop"]
    lora.main([*given, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "lora.json").read_text())
    assert found["circumstances"]["versions"].keys() >= {"torch", "peft", "transformers", "tridrop"}
    assert [(r["rank"], r["provider"], r["p"]) for r in found["rows"]] == [
        (rank, provider, p)
        for rank in (2, 4)
        for provider in ("peft", "tridrop")
        for p in (0.0, 0.05)
    ]
    kept = {(r["provider"], r["p"]): r["saved_bytes"] for r in found["rows"] if r["rank"] == 4}
    assert kept["tridrop", 0.05] < kept["peft", 0.05]
    # Beside what p = 0 keeps, 16 bytes for each of seven seeds.
    assert kept["tridrop", 0.05] <= kept["tridrop", 0.0] + 7 * 16
    lines = (tmp_path / "lora.csv").read_text().splitlines()
    assert len(lines) == 9
    with pytest.raises(SystemExit):
        lora.arguments(["--providers", "unsloth"])
    sys.modules.pop("lora")
