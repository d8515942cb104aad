"""A GPT block written by hand with the fused ops, in a model that learns to copy.

python examples/gpt_block.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tridrop

WIDTH, HEADS, P, WORDS, LENGTH = 64, 4, 0.1, 16, 16


class Block(nn.Module):
    """Pre-norm attention and MLP. Every dropout is part of the kernel around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        on = self.training
        parts = self.attend(self.first(x)).chunk(3, -1)
        query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        # Dropout acts on the probabilities inside attention. Torch keeps these for backward, this
        # op does not.
        seen = tridrop.scaled_dot_product_attention(
            query, key, value, dropout_p=P if on else 0.0, is_causal=True
        ).transpose(1, 2).flatten(2)  # fmt: skip
        # x + dropout(seen @ W + b): one kernel after the product, with the linear layer's bias.
        x = tridrop.dropout_add(
            F.linear(seen, self.project.weight), x, P, on, bias=self.project.bias
        )
        wide = F.linear(self.second(x), self.widen.weight)
        wide = tridrop.activation_dropout(wide, P, on, activation="gelu_tanh", bias=self.widen.bias)
        return tridrop.dropout_add(
            F.linear(wide, self.narrow.weight), x, P, on, bias=self.narrow.bias
        )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places.weight[: words.shape[1]]
        x = tridrop.dropout(x, P, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch() -> Tensor:
    """Eight random words, then the same eight again: the second half can be predicted."""
    half = torch.randint(WORDS, (64, LENGTH // 2))
    return torch.cat([half, half], 1)


torch.set_num_threads(1)  # on small tensors more threads only wait, long on a busy machine
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(151):
    words = batch()
    logits = model(words[:, :-1])[:, LENGTH // 2 - 1 :]
    loss = F.cross_entropy(logits.flatten(0, 1), words[:, LENGTH // 2 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss.item():.3f} (chance: {torch.tensor(WORDS).log():.3f})")
assert loss.item() < 1.0

# The same seed gives the same masks, whatever was drawn before.
with tridrop.rng(7):
    once = model(words)
with tridrop.rng(7):
    assert torch.equal(model(words), once)
