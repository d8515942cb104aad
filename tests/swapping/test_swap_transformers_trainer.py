"""SwapCallback in real runs of transformers' Trainer."""

import json
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

import tridrop
from tridrop.swapping.trainer import SwapCallback

LENGTH, CLASSES = 8, 3


class Data(torch.utils.data.Dataset):
    def __init__(self, size: int = 16) -> None:
        g = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 30, (size, LENGTH), generator=g)
        self.labels = self.ids.sum(1) % CLASSES

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        mask = torch.ones(LENGTH, dtype=torch.long)
        mask[LENGTH - i % 3 :] = 0
        # "noise" is no argument of forward: the Trainer reads its signature, and takes it out.
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.labels[i],
                "noise": torch.ones(1)}  # fmt: skip


def bert(p: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, num_labels=CLASSES,
        hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer(folder, model=None, callbacks=(), **options) -> Trainer:
    options = {"max_steps": 4, "save_strategy": "no", **options}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    given = {"model_init": model} if callable(model) and not isinstance(model, nn.Module) else {
        "model": bert() if model is None else model
    }  # fmt: skip
    return Trainer(args=args, train_dataset=Data(), callbacks=list(callbacks), **given)


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_swapped(model: nn.Module) -> bool:
    return any(hasattr(type(module), "_tridrop_base") for module in model.modules())


def assert_same(first, second) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_it_trains_as_a_model_that_was_swapped_by_hand(tmp_path):
    callback = SwapCallback()
    made = trainer(tmp_path, callbacks=[callback])
    assert is_swapped(made.model)
    assert callback.report.counts()["fused"] >= 7
    made.train()
    model = bert()
    tridrop.swap(model)
    by_hand = trainer(tmp_path, model)
    by_hand.train()
    assert losses(made) == losses(by_hand)
    assert len(losses(made)) == 4
    assert_same(weights(made.model), weights(model))
    eager = trainer(tmp_path)
    eager.train()
    assert losses(eager) != losses(made)
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())


def test_without_dropout_the_losses_are_those_of_eager(tmp_path):
    runs = [trainer(tmp_path, bert(0.0)), trainer(tmp_path, bert(0.0), [SwapCallback()])]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = []
    for recomputes in (False, True):  # each seeded when it is made
        run = trainer(tmp_path, callbacks=[SwapCallback()], gradient_checkpointing=recomputes)
        run.train()
        found.append((losses(run), weights(run.model)))
        layers = [m for m in run.model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(layers) == recomputes
    assert_same(*found)


def test_checkpoints_resume_and_load_without_the_swap(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, callbacks=[SwapCallback()], **options)
    made.train()
    again = trainer(tmp_path, callbacks=[SwapCallback()], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(again.model), weights(made.model))
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert not is_swapped(plain)
    assert_same(weights(plain), weights(made.model))
    config = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert "tridrop" not in json.dumps(config)
    ids = Data().ids
    assert_same(plain.eval()(ids).logits, plain(ids).logits)
    torch.testing.assert_close(plain(ids).logits, made.model.eval()(ids).logits)


def test_added_later_it_swaps_when_training_begins(tmp_path):
    made = trainer(tmp_path)
    made.add_callback(SwapCallback())
    assert not is_swapped(made.model)
    made.train()
    assert is_swapped(made.model)
    first = trainer(tmp_path, callbacks=[SwapCallback()])
    first.train()
    assert losses(made) == losses(first)


def test_a_model_of_model_init_is_swapped_when_training_begins(tmp_path):
    made = trainer(tmp_path, lambda: bert(), [SwapCallback()])
    for _ in range(2):
        made.train()
        assert is_swapped(made.model)


def test_restore_leaves_the_model_as_it_was(tmp_path):
    model = bert()
    made = trainer(tmp_path, model, [SwapCallback(restore=True)])
    kinds = [type(module) for module in bert().modules()]
    for _ in range(2):  # and once more
        made.train()
        assert not is_swapped(model)
        assert [type(module) for module in model.modules()] == kinds
        assert model.config._attn_implementation != "tridrop"
    kept = trainer(tmp_path, callbacks=[SwapCallback(restore=True)])
    kept.train()
    swapped = trainer(tmp_path, callbacks=[SwapCallback()])
    swapped.train()
    assert losses(kept) == losses(swapped)


def test_the_switches_are_those_of_swap(tmp_path):
    callback = SwapCallback(dropout=False, attention=False, inside=False, across=False)
    trainer(tmp_path, callbacks=[callback])
    assert callback.report.counts()["fused"] == callback.report.counts()["swapped"] == 0


def test_the_report_is_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="tridrop"):
        made = trainer(tmp_path, callbacks=[SwapCallback(restore=True)], max_steps=1)
        made.train()
        made.train()
    assert sum("BertSelfOutput" in message for message in caplog.messages) == 1


class FSDPModule:
    """Named as the class that fully_shard puts into the bases of a module's class."""


def test_a_model_that_is_sharded_already_is_refused():
    class Sharded(FSDPModule, nn.Sequential):
        pass

    callback, model = SwapCallback(), nn.Sequential(Sharded(nn.Dropout(0.5)))
    state = transformers.TrainerState(is_world_process_zero=True)
    with pytest.raises(RuntimeError, match=r"callbacks=\[SwapCallback\(\)\]"):
        callback.on_train_begin(None, state, None, model=model)
    assert not is_swapped(model)


def test_a_model_swapped_before_it_was_sharded_is_left_to_train(caplog):
    callback, model = SwapCallback(restore=True), nn.Sequential(nn.Sequential(nn.Dropout(0.5)))
    state = transformers.TrainerState(is_world_process_zero=True)
    callback.on_init_end(None, state, None, model=model)
    kind = type(model[0][0])
    model[0][0].__class__ = type("FSDPDropout", (FSDPModule, kind), {})
    callback.on_train_begin(None, state, None, model=nn.Sequential(model))
    callback.on_train_end(None, state, None, model=nn.Sequential(model))
    assert "could not restore" in caplog.text
