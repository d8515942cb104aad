"""One training of a small network, with its curves."""

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
    """Losses in nats an image and accuracies, with dropout off, after the steps ``steps``.

    ``best`` holds the weights after ``best_step``, where the validation loss was lowest.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def note(self, step: int, model: nn.Module, train: Images, valid: Images) -> None:
        """Measure once more."""
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
    """One pass with dropout off: [n, classes]."""
    logits: Tensor = model.eval()(x)
    return logits


def scores(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean cross-entropy in nats, and the share that the largest logit has right."""
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
    """Train ``model`` in place. Order and masks follow from ``seed``; the order not from the masks.

    Adam without weight decay, so that dropout is the only regulariser; a fixed learning rate.

    Args:
        model: its dropout sites are numbered.
        train: what it learns, in batches drawn with replacement.
        valid: what is only measured.
        seed: of the order of the data and of the masks.
        steps: how many batches.
        every: steps between two measurements.
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
