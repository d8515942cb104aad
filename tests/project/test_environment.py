"""The model libraries that the tests run with, as run.py installs them."""

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from apart import printed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    """run.py, which is a program and no package, as a module."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timm_makes_models_without_the_operators_of_torchvision():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


def test_transformers_makes_models():
    import transformers

    # run.py says which version it has put before that of the environment.
    wanted = os.environ.get("TRIDROP_TEST_TRANSFORMERS", transformers.__version__)
    assert transformers.__version__ == wanted
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.long))[0].shape == (1, 4, 16)


@pytest.mark.parametrize("name", ["accelerate", "peft", "liger_kernel.transformers"])
def test_what_builds_on_transformers_is_importable(name):
    __import__(name)


def test_packages_without_their_requirements_find_them_installed(run):
    for package in run.BARE:
        if package == "keras-hub" and sys.version_info < (3, 11):
            continue  # it has no version for this Python
        for line in importlib.metadata.requires(package) or []:
            name = re.match(r"[\w.-]+", line)[0]
            if "extra ==" not in line and name not in run.NOT_NEEDED.get(package, ()):
                importlib.metadata.version(name)  # raises if it is missing


def test_keras_hub_makes_models():
    """In a process of its own: KERAS_BACKEND is read when keras is imported."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("the test extra has Keras from Python 3.11 on")
    program = """
import keras_hub
sizes = dict(vocabulary_size=9, num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4)
print(keras_hub.models.GPT2Backbone(**sizes, max_sequence_length=4).count_params() > 0)
"""
    assert printed("-c", program, KERAS_BACKEND="torch") == "True\n"


def test_every_model_library_is_pinned_and_the_oldest_is_older(run):
    names = ("transformers", "accelerate", "peft", "liger-kernel", *run.BARE)
    pins = {name: run.pinned(name) for name in names}
    newest = pins["transformers"].partition(";")[0].partition("==")[2]
    assert tuple(map(int, run.oldest_transformers().split("."))) < tuple(
        map(int, newest.split("."))
    )
