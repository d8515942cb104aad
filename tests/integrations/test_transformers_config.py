"""Configurations beside tridrop's attention: output_attentions, and what is saved."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from swap_families import batch, make
from swap_helpers import set_rates
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, Trainer, TrainingArguments

import tridrop
from tridrop.swapping.trainer import SwapCallback

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 32,
}  # fmt: skip
IDS = torch.arange(6)[None]


def bert(attention: str = "eager", **options) -> BertModel:
    return BertModel(BertConfig(**SMALL, attn_implementation=attention, **options))


def choose(model, how: str) -> None:
    if how == "swap":
        assert tridrop.swap(model).counts()["fused"]
    else:
        model.set_attn_implementation("tridrop")
    assert model.config._attn_implementation == "tridrop"


hows = pytest.mark.parametrize("how", ["swap", "set_attn_implementation"])

# Loads what is saved in a folder where tridrop cannot be imported, and prints the attention.
WITHOUT = """
import sys
sys.modules["tridrop"] = None
sys.path.insert(0, {tests!r})
import torchvision_ops, torch, transformers
model = transformers.AutoModel.from_pretrained({folder!r}, attn_implementation="eager")
given = torch.arange(6)[None]
print(model.config.output_attentions, len(model(given).attentions or ()))
"""


def loaded_without_tridrop(folder: Path) -> str:
    text = WITHOUT.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def texts(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*.json"))


@hows
def test_a_model_that_gives_attentions_is_saved_and_loads_without_tridrop(how, tmp_path):
    model = bert(output_attentions=True)
    choose(model, how)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["output_attentions"] is True
    assert "tridrop" not in texts(tmp_path)
    assert "attn_implementation" not in texts(tmp_path)
    assert loaded_without_tridrop(tmp_path) == "True 1"
    again = BertModel.from_pretrained(tmp_path, attn_implementation="tridrop").eval()
    expected = model.eval()(IDS).attentions
    torch.testing.assert_close(again(IDS).attentions, expected)
    tridrop.unswap(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS).attentions, expected)
    model.save_pretrained(tmp_path)


@hows
def test_attentions_can_be_asked_for_in_the_configuration(how):
    model = bert().eval()
    choose(model, how)
    assert model(IDS).attentions is None
    model.config.output_attentions = True
    assert len(model(IDS).attentions) == 1
    if hasattr(model.config, "validate"):  # of releases that look at one when it is saved
        model.config.validate()
    assert copy.deepcopy(model.config).output_attentions
    model.config.output_attentions = False
    assert model(IDS).attentions is None


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "BART"])
def test_attentions_of_the_configuration_are_eagers(name):
    model = make(name)
    set_rates(model, 0.0)
    ours = copy.deepcopy(model)
    tridrop.swap(ours)
    for each in (model, ours):
        each.set_attn_implementation("eager" if each is model else "tridrop")
        each.config.output_attentions = True
    found, expected = (each(**batch(name)) for each in (ours, model))
    keys = [key for key in expected if "attentions" in key]
    assert keys
    for key in keys:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_other_attention_is_refused_as_before():
    config = BertConfig(**SMALL, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="output_attentions"):
        config.output_attentions = True
    if hasattr(config, "validate"):
        config._output_attentions = True
        with pytest.raises(Exception, match="output_attentions"):  # a class of huggingface_hub's
            config.validate()


def test_parts_of_a_configuration_name_no_attention_when_saved(tmp_path):
    vision = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {
        "image_size": 16,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config={**SMALL, "eos_token_id": 1}, vision_config=vision))
    model.set_attn_implementation({"text_config": "tridrop"})
    assert model.config.text_config._attn_implementation == "tridrop"
    model.save_pretrained(tmp_path)
    model.config.text_config.save_pretrained(tmp_path / "text")
    assert "tridrop" not in texts(tmp_path)
    whole = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="tridrop")
    assert "tridrop" not in whole.to_json_string(use_diff=False)


def test_checkpoints_of_a_trainer_load_without_tridrop(tmp_path):
    model = make("BERT")
    model.config.output_attentions = True
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, save_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    one = {name: x[0] for name, x in batch("BERT").items()}
    trainer = Trainer(model, arguments, train_dataset=[one] * 2, callbacks=[SwapCallback()])
    assert trainer.model.config._attn_implementation == "tridrop"
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert "tridrop" not in texts(folder)
    assert loaded_without_tridrop(folder).startswith("True")
