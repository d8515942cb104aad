"""Trains a small network, and records its curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tridrop

from .digits import Images

BATCH = 50
LEARNING_RATE = 1e-3


@dataclass
class Curves:
    """Losses in nats per image, and accuracies, with dropout off, after each of ``steps``.

    ``best`` has the weights after ``best_step``, at which the validation loss was lowest.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def note(self, step: int, model: nn.Module, train: Images, valid: Images) -> None:
        """Measure after a step, and add the results."""
        loss, accuracy = scores(logits_of(model, valid.x), valid.y)
        if not self.valid_loss or loss < min(self.valid_loss):
            self.best_step = step
            self.best = {name: value.clone() for name, value in model.state_dict().items()}
        self.valid_loss.append(loss)
        self.valid_accuracy.append(accuracy)
        loss, accuracy = scores(logits_of(model, train.x), train.y)
        self.train_loss.append(loss)
        self.train_accuracy.append(accuracy)
        self.steps.append(step)


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The logits [n, classes] of one forward with dropout off."""
    logits: Tensor = model.eval()(x)
    return logits


def scores(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean cross-entropy in nats, and the accuracy."""
    right = (logits.argmax(1) == y).double().mean()
    return float(F.cross_entropy(logits, y)), float(right)


def train(
    model: nn.Module,
    train: Images,
    valid: Images,
    *,
    seed: int,
    steps: int,
    every: int,
    tick: Callable[[], None],
) -> Curves:
    """Train ``model`` in place. The seed determines batches and masks, independently of each other.

    It uses Adam without weight decay, so that dropout is the only regulariser, and a fixed learning
    rate.

    Args:
        model: a model whose dropout sites are numbered.
        train: the training images; batches are drawn with replacement.
        valid: the validation images, which are only measured.
        seed: the seed of the batches and of the masks.
        steps: the number of batches.
        every: the number of steps between two measurements.
        tick: called after each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    curves = Curves()
    curves.note(0, model, train, valid)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(train.y), (BATCH,), generator=order).to(train.y.device)
        with tridrop.rng(tridrop.fold_in(seed, step).to(train.x.device)):
            loss = F.cross_entropy(model.train()(train.x[chosen]), train.y[chosen])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()
        if step % every == 0 or step == steps:
            curves.note(step, model, train, valid)
    return curves
