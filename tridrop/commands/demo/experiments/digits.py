"""The data and the network of the experiments: scikit-learn's handwritten digits and a small CNN.

The digits are the test part of the UCI data set "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998): 1,797 scans from forms that 13 people filled in, reduced to 8 x 8 counts
from 0 to 16.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tridrop

from ..options import DemoError

CLASSES = 10


class Images(NamedTuple):
    """Images [n, 1, 8, 8] with values from 0 to 1, and their digits [n]."""

    x: Tensor
    y: Tensor

    def take(self, chosen: Tensor) -> Images:
        """The images at an index, or where a mask is True."""
        return Images(self.x[chosen], self.y[chosen])


def load(device: torch.device) -> Images:
    """All 1,797 digits. Without scikit-learn it raises a DemoError that says what to install."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise DemoError(
            f"the digits come with scikit-learn, which cannot be imported ({error}): "
            "pip install 'tridrop[demo]'"
        ) from error
    found = datasets.load_digits()
    x = torch.tensor(found.images, dtype=torch.float32, device=device)
    return Images(x[:, None] / 16, torch.tensor(found.target, dtype=torch.int64, device=device))


def split(data: Images, seed: int, train: int, valid: int) -> tuple[Images, Images, Images]:
    """A random split: ``train`` training images, ``valid`` for validation, the rest for tests."""
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    parts = order.to(data.y.device).split([train, valid, len(order) - train - valid])
    first, second, third = (data.take(part) for part in parts)
    return first, second, third


def network(p: float, seed: int, device: torch.device) -> nn.Sequential:
    """Two convolutions and two linear layers, with dropout of whole channels and of single units.

    The initial weights depend on ``seed`` and not on p. Sites are numbered, so that under
    tridrop.rng the masks depend only on its seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            tridrop.nn.Dropout2d(p),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 128),
            nn.ReLU(),
            tridrop.nn.Dropout(p),
            nn.Linear(128, CLASSES),
        )
    tridrop.nn.number_sites(model)
    return model.to(device)
