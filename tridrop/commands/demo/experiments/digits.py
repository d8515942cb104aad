"""The data and the network of the experiments: scikit-learn's handwritten digits, and a small CNN.

The digits are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin
and Kaynak 1998): 1,797 scans of forms that 13 people filled in, brought to 8 x 8 counts from 0 to
16.
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
        """Those that an index or a mask chooses."""
        return Images(self.x[chosen], self.y[chosen])


def load(device: torch.device) -> Images:
    """All 1,797 digits. Raises DemoError, saying what to install, without scikit-learn."""
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
    """Training, validation and test images in a random order: ``train``, ``valid``, the rest."""
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    parts = order.to(data.y.device).split([train, valid, len(order) - train - valid])
    first, second, third = (data.take(part) for part in parts)
    return first, second, third


def network(p: float, seed: int, device: torch.device) -> nn.Sequential:
    """Two convolutions and two linear layers; dropout of whole channels, then of single units.

    The weights are those of ``seed``, whatever p is. Sites are numbered: under tridrop.rng the
    masks depend on its seed alone.
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
