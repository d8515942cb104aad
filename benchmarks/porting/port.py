"""What the worked ports share: one small model, as torch's modules with tridrop's dropout.

    hidden = dropout(relu(x @ W1 + b1), P), seed (SEED, 0)
    out    = dropout(hidden @ W2 + b2, P), seed (SEED, 1)

Each port gives the old framework's model the same weights, and holds: evaluations agree; with the
old framework's dropout replaced by a mask of tridrop.masks, so do a training forward, exactly in
which elements are 0, and its gradients. `port_FRAMEWORK.py` are the ports.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch

import tridrop

P, SEED, SHAPES = 0.25, 7, ((8, 16), (16,), (16, 4), (4,))
MASKS = Path(__file__).resolve().parents[2] / "tridrop" / "masks"
draw = np.random.default_rng(0)
WEIGHTS = [draw.standard_normal(shape).astype(np.float32) for shape in SHAPES]
X = draw.standard_normal((5, 8)).astype(np.float32)


class Masks:
    """A file of tridrop.masks, imported as a copy of it would be, for the two sites of a model."""

    def __init__(self, name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_mask", MASKS / f"{name}_mask.py")
        self.file = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.file)
        self.scale = self.file.scale(P)

    def keep(self, site: int, shape):
        """Which elements a site keeps: what goes into ``where(keep, x, 0) * scale``."""
        return self.file.keep_mask(self.file.fold_in(SEED, site), tuple(shape), P)


def ported(training: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output in tridrop, and the gradients of the sum of its squares by the weights."""
    w1, b1, w2, b2 = weights = [torch.tensor(w, requires_grad=True) for w in WEIGHTS]
    hidden = torch.relu(torch.tensor(X) @ w1 + b1)
    hidden = tridrop.dropout(hidden, P, training, seed=tridrop.fold_in(SEED, 0))
    out = tridrop.dropout(hidden @ w2 + b2, P, training, seed=tridrop.fold_in(SEED, 1))
    out.square().sum().backward()
    return out.detach().numpy(), [w.grad.numpy() for w in weights]


def hold(evaluated, trained, gradients) -> None:
    """The old framework's results against tridrop's."""
    np.testing.assert_allclose(evaluated, ported(training=False)[0], rtol=1e-5, atol=1e-5)
    expected, slopes = ported(training=True)
    assert np.array_equal(np.asarray(trained) == 0, expected == 0)
    assert 0 < (expected == 0).mean() < 0.6
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-5)
    for found, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-4)
    print("evaluation, training and gradients agree", flush=True)
