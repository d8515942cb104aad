"""A LightningModule whose encoder is swapped by a callback.

pip install 'tridrop[lightning]'
python examples/lightning_module.py
"""

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tridrop.swapping.lightning import SwapCallback


class Order(lightning.LightningModule):
    """Classifies rows of numbers as rising or falling."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.places = nn.Parameter(torch.randn(12, 32) / 4)
        self.head = nn.Linear(32, 2)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        logits = self.head(self.encoder(self.lift(x[..., None]) + self.places).mean(1))
        loss = nn.functional.cross_entropy(logits, y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


torch.set_num_threads(1)  # on small tensors more threads only wait, long on a busy machine
torch.manual_seed(0)
rising = torch.rand(512, 12).sort(1).values
y = torch.randint(2, (512,))
x = torch.where(y[:, None] == 1, rising, rising.flip(1))
swapped = SwapCallback()
trainer = lightning.Trainer(
    max_epochs=4, accelerator="cpu", callbacks=[swapped], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
model = Order()
trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
print(swapped.reports["encoder"])
print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
assert model.losses[-1] < model.losses[0] / 2
