"""The plug-in that runs transformers' own tests, on tests of that kind which stand here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import transformers_suite

TESTS = Path(__file__).parents[1]
SUITE = r"""
import random
import torch, transformers

global_rng = random.Random()
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
             vocab_size=9, hidden_dropout_prob=0.3)


def test_models(tmp_path):
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    other = transformers.AutoModel.from_config(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=4, patch_size=2))
    eager = transformers.BertModel._from_config(
        transformers.BertConfig(**SIZES), attn_implementation="eager")
    for made in (model, loaded, other, eager):
        swapped = any("_tridrop_base" in type(m).__dict__ for m in made.modules())
        print("\nmade", type(made).__name__, made.config.hidden_dropout_prob, swapped)


def test_draws():
    print("\ndrawn", global_rng.random(), torch.rand(1).item())


class Own(transformers.PreTrainedModel):
    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob)


def test_that_does_not_hold():
    assert type(Own(transformers.BertConfig(**SIZES)).dropout) is torch.nn.Dropout
"""


def run(folder, *options):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "pytest", "-p", "transformers_suite", "-s", "-c", os.devnull]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_model_is_swapped_and_what_is_lost_is_named(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(SUITE)
    before = run(tmp_path, "--outcomes", "before.json")
    after = run(tmp_path, "--outcomes", "after.json", "--swap", "--rates", "0.1")
    assert before.returncode == 0, before.stdout + before.stderr
    assert after.returncode == 1, after.stdout + after.stderr
    names = ["BertForMaskedLM", "BertForMaskedLM", "ViTModel", "BertModel"]
    made = [line for line in before.stdout.splitlines() if line.startswith("made ")]
    rates = ["0.3", "0.3", "0.0", "0.3"]
    expected = [f"made {name} {rate} False" for name, rate in zip(names, rates, strict=True)]
    assert made == expected
    made = [line for line in after.stdout.splitlines() if line.startswith("made ")]
    assert made == [f"made {name} 0.1 True" for name in names]
    drawn = [line for line in before.stdout.splitlines() if line.startswith("drawn ")]
    assert drawn == [line for line in after.stdout.splitlines() if line.startswith("drawn ")]
    assert len(drawn) == 1
    assert "tridrop: 5 models swapped" in after.stdout
    found = json.loads((tmp_path / "after.json").read_text())
    assert found["models"] == 5
    assert found["sites"]["fused"] > 0
    files = [str(tmp_path / name) for name in ("before.json", "after.json")]
    assert transformers_suite.compare(*files) == 1
    lost = "passed -> failed: test_some.py::test_that_does_not_hold"
    assert lost in capsys.readouterr().out


def test_a_run_that_swapped_nothing_fails(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_nothing():\n    pass\n")
    found = run(tmp_path, "--swap")
    assert found.returncode == 1
    assert "none, an error" in found.stdout
    (tmp_path / "test_some.py").write_text(SUITE)
    kept = run(tmp_path, "--swap", "--keep-eager", "--without", "dropout", "-k", "models")
    assert "tridrop: 3 models swapped" in kept.stdout
