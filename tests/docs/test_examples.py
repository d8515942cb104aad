"""The examples run, offline, as they stand: scripts as programs, notebooks cell by cell."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tridrop
from tridrop.commands import info

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEEDS = {
    "trainer.py": ("transformers", "accelerate"),
    "gpt_block.py": (),
    "lora_peft.py": ("transformers", "peft"),
    "lightning_module.py": ("pytorch_lightning",),
}
# torchvision cannot be imported with the CPU build of torch unless its operators are declared.
RUN = "import sys, runpy, torchvision_ops; runpy.run_path(sys.argv[1], run_name='__main__')"


def environment(tmp_path):
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return given | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # tests run side by side
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(tmp_path),
    }


def test_every_example_is_known_and_documented():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names == {*NEEDS, "doubt.ipynb", "kernel.ipynb"}
    page = (ROOT / "docs" / "examples.md").read_text()
    assert all(f"../examples/{name}" in page for name in names)


@pytest.mark.parametrize("name", NEEDS)
def test_a_script_runs(name, tmp_path):
    for library in NEEDS[name]:
        pytest.importorskip(library)
    command = [sys.executable, "-c", RUN, str(EXAMPLES / name)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "loss" in run.stdout


@pytest.mark.parametrize("name", ["doubt.ipynb", "kernel.ipynb"])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    text = (EXAMPLES / name).read_text()
    assert all(not cell.get("outputs") for cell in json.loads(text)["cells"])
    given = environment(tmp_path)
    del given["MPLBACKEND"]  # that of notebooks, which keeps the figures
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.reads(text, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=110, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises what a cell raises
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert not [out for out in outputs if out.get("name") == "stderr"], "a warning"
    if name == "doubt.ipynb":  # a bar, though there is no ipywidgets
        assert importlib.util.find_spec("ipywidgets") is None
        assert any("100%" in out.get("text", "") for out in outputs)


def test_what_a_notebook_shows():
    import torch

    shown = tridrop.swap(torch.nn.TransformerEncoderLayer(8, 2, 16))._repr_html_()
    assert shown.startswith("<pre")
    assert "linear + activation + dropout" in shown
    assert "\x1b" not in shown
    found = info.collect()
    assert "backend reference: available" in found._repr_html_()
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(dict(found)))
    assert "<script" not in info.Info({"platform": "<script>"})._repr_html_()
