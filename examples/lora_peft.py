"""LoRA by PEFT on a small Llama with random weights, before and after the swap.

pip install 'tridrop[hf,peft]'
python examples/lora_peft.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tridrop

torch.set_num_threads(1)  # on small tensors more threads only wait, long on a busy machine
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, use_cache=False,
    )
)  # fmt: skip
config = LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config).train()
batch = {"input_ids": (torch.randint(64, (8, 1)) + torch.arange(16)) % 64}
batch["labels"] = batch["input_ids"]

report = tridrop.swap(model)
print(report)
cost = report.verify(**batch).cost  # runs the model with and without the swap
print(
    f"kept for backward: {cost.before.saved_bytes:,} bytes before, {cost.after.saved_bytes:,} after"
)
assert cost.after.saved_bytes < cost.before.saved_bytes

optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-2)
losses = []
for _ in range(40):
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.2

# Adapters can be merged as before, and the state_dict is PEFT's.
names = set(model.state_dict())
tridrop.unswap(model)
assert set(model.state_dict()) == names
