"""A BERT of transformers, with random weights, swapped by a callback under Trainer.

pip install 'tridrop[hf]'
python examples/trainer.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from tridrop.swapping.trainer import SwapCallback

torch.set_num_threads(1)  # on small tensors more threads only wait, long on a busy machine
torch.manual_seed(0)
model = BertForMaskedLM(
    BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=32,
    )
)  # fmt: skip

# Sequences that count upwards from a random start, with a quarter of the numbers hidden.
numbers = (torch.randint(2, 64, (256, 1)) + torch.arange(16)) % 62 + 2
hidden = torch.rand(numbers.shape) < 0.25
data = [
    {"input_ids": x.masked_fill(h, 1), "labels": x.masked_fill(~h, -100)}
    for x, h in zip(numbers, hidden, strict=True)
]

swapped = SwapCallback()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=36, per_device_train_batch_size=32, learning_rate=3e-3,
        logging_steps=12, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[swapped])
    trainer.train()

print(swapped.report)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses:", *(f"{float(loss):.3f}" for loss in losses))
assert float(losses[-1]) < float(losses[0])
