"""Which activations fall: the masks of the kinds of dropout, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tridrop

from .progress import Bar
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = (4, 6, 8, 8)  # samples, channels, rows, columns
SEQUENCES = (4, 8, 36)  # samples, time steps, features
# Title, shape, noise_shape.
KINDS: list[tuple[str, tuple[int, ...], tuple[int | None, ...] | None]] = [
    ("dropout: elements", IMAGES, None),
    ("spatial (Dropout2d): channels", IMAGES, (None, None, 1, 1)),
    ("DropPath: samples", IMAGES, (None, 1, 1, 1)),
    ("dropout: elements", SEQUENCES, None),
    ("variational: features, for all time", SEQUENCES, (None, 1, None)),
    ("token dropout: time steps", SEQUENCES, (None, None, 1)),
]
KEPT, DROPPED = "#0072B2", "#F2E3C6"


def ticks(settings: Settings) -> int:
    """One a kind."""
    return len(KINDS)


def measure(settings: Settings, device: torch.device, progress: Bar) -> dict[str, Any]:
    """The masks' shapes, rates and bits: ``keep`` has a 1 for each element kept, in C order."""
    found = []
    for i, (title, shape, noise_shape) in enumerate(KINDS):
        seed = tridrop.fold_in(settings.seed, i).to(device)
        keep = tridrop.keep_mask(seed, shape, settings.p, noise_shape=noise_shape)
        found.append(
            {
                "kind": title,
                "shape": list(shape),
                "noise_shape": None if noise_shape is None else list(noise_shape),
                "p": settings.p,
                "dropped": int((~keep).sum()) / keep.numel(),
                "keep": "".join(map(str, keep.flatten().int().tolist())),
            }
        )
        progress.tick()
    return {"masks": found}


def findings(result: dict[str, Any]) -> list[str]:
    """What fell of each kind."""
    return [
        f"{one['kind']}: noise_shape {one['noise_shape']} of {one['shape']}, "
        f"{100 * one['dropped']:.0f} % fell, p = {one['p']}."
        for one in result["masks"]
    ]


def draw(result: dict[str, Any]) -> Figure:
    """A panel a kind: a row a sample, and in it a tile a channel, or time downwards."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    for axes, one in zip(figure.subplots(2, 3).flat, result["masks"], strict=True):
        _panel(axes, one)
    handles = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="dropped")]
    figure.legend(handles=handles, ncols=2, frameon=False, loc="outside lower center")
    return figure


def _panel(axes: Axes, one: dict[str, Any]) -> None:
    from matplotlib.colors import ListedColormap

    keep = torch.tensor([int(bit) for bit in one["keep"]]).view(one["shape"])
    axes.imshow(_tiles(keep).numpy(), cmap=ListedColormap(["white", DROPPED, KEPT]), vmin=0, vmax=2)
    shape = "none" if one["noise_shape"] is None else tuple(one["noise_shape"])
    axes.set_title(f"{one['kind']}\nnoise_shape {shape}", fontsize=10)
    axes.set_ylabel(f"{keep.shape[0]} samples", fontsize=9)
    axes.set_xlabel("channels" if keep.dim() == 4 else "features (time runs down)", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _tiles(keep: Tensor) -> Tensor:
    """0 between the tiles, 1 where an element was dropped, 2 where it was kept: a picture.

    [samples, channels, rows, columns] or [samples, time, features]
    """
    keep = keep[:, None] if keep.dim() == 3 else keep
    picture = torch.nn.functional.pad(keep + 1, (0, 1, 0, 1))
    return picture.transpose(1, 2).flatten(2).flatten(0, 1)
