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


# Runs of pytest, each in a process that begins where transformers is imported, which takes longer
# than all else. The plug-in finds some of its classes there, and others are defined under it.
RUNS = """
import json, os, sys
import torchvision_ops
import pytest, transformers

transformers.BertForMaskedLM
statuses = []
for i, options in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        file = os.open(f"{i}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = pytest.main(["-p", "transformers_suite", "-s", "-c", os.devnull,
                              "-p", "no:cacheprovider", "--rootdir", os.getcwd(), *options])
        sys.stdout.flush()
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
OPTIONS = {
    "before": ["test_some.py", "--outcomes", "before.json"],
    "after": ["test_some.py", "--outcomes", "after.json", "--swap", "--rates", "0.1"],
    "nothing": ["test_none.py", "--swap"],
    "kept": ["test_some.py", "--swap", "--keep-eager", "--without", "dropout", "-k", "models"],
}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_some.py").write_text(SUITE)
    (folder / "test_none.py").write_text("def test_nothing():\n    pass\n")
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """name -> (status, what it said)."""
    path = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", RUNS, json.dumps(list(OPTIONS.values()))]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = [(folder / f"{i}.out").read_text() for i in range(len(OPTIONS))]
    return dict(zip(OPTIONS, zip(json.loads(ran.stdout), said, strict=True), strict=True))


def test_every_model_is_swapped_and_what_is_lost_is_named(folder, runs, capsys):
    (status, before), (with_lost, after) = runs["before"], runs["after"]
    assert status == 0, before
    assert with_lost == 1, after
    names = ["BertForMaskedLM", "BertForMaskedLM", "ViTModel", "BertModel"]
    made = [line for line in before.splitlines() if line.startswith("made ")]
    rates = ["0.3", "0.3", "0.0", "0.3"]
    expected = [f"made {name} {rate} False" for name, rate in zip(names, rates, strict=True)]
    assert made == expected
    made = [line for line in after.splitlines() if line.startswith("made ")]
    assert made == [f"made {name} 0.1 True" for name in names]
    drawn = [line for line in before.splitlines() if line.startswith("drawn ")]
    assert drawn == [line for line in after.splitlines() if line.startswith("drawn ")]
    assert len(drawn) == 1
    assert "tridrop: 5 models swapped" in after
    found = json.loads((folder / "after.json").read_text())
    assert found["models"] == 5
    assert found["sites"]["fused"] > 0
    files = [str(folder / name) for name in ("before.json", "after.json")]
    assert transformers_suite.compare(*files) == 1
    lost = "passed -> failed: test_some.py::test_that_does_not_hold"
    assert lost in capsys.readouterr().out


def test_a_run_that_swapped_nothing_fails(runs):
    status, said = runs["nothing"]
    assert status == 1
    assert "none, an error" in said
    assert "tridrop: 3 models swapped" in runs["kept"][1]
