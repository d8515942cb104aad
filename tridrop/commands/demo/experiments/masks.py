"""Draws the masks of different kinds of dropout: which activations are dropped."""

from __future__ import annotations

from collections.abc import Callable
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


def _heads(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Six heads of six features each."""
    return tridrop.head_dropout(x.unflatten(2, (6, 6)), p, dim=2, seed=seed).flatten(2)


def _patches(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The kept tokens, with zeros in place of the others."""
    _, kept = tridrop.patch_dropout(x, p, return_indices=True, seed=seed)
    if kept is None:
        return x
    left = torch.zeros(x.shape[:2], device=x.device).scatter(1, kept + 1, 1.0)
    left[:, 0] = 1.0  # the class token
    return x * left[:, :, None]


def _calls(one: Callable[[Tensor, float, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The same for several calls, each with its own seed: [calls, rows, columns]."""

    def each(x: Tensor, p: float, seed: Tensor) -> Tensor:
        return torch.stack([one(row, p, tridrop.fold_in(seed, i)) for i, row in enumerate(x)])

    return each


def _layers(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Each row stands for a layer."""
    left = tridrop.layer_drop(range(len(x)), p, seed=seed)
    return torch.stack([x[i] if i in left else torch.zeros_like(x[i]) for i in range(len(x))])


def _words(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Each row is a word of the vocabulary; all are looked up in order."""
    return tridrop.embedding_dropout(torch.arange(len(x), device=x.device), x, p, seed=seed)


def _weights(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The weights of a layer, read off its results for unit vectors."""
    units = torch.eye(x.shape[1], device=x.device)
    return tridrop.dropconnect_linear(units, x, p=p, seed=seed).T


# Title, shape, the call as text, and a function that makes that call.
STRUCTURED: list[tuple[str, tuple[int, ...], str, Callable[[Tensor, float, Tensor], Tensor]]] = [
    (
        "DropBlock2d: squares",
        IMAGES,
        "drop_block2d(x, p, 3)",
        lambda x, p, seed: tridrop.drop_block2d(x, p, 3, seed=seed),
    ),
    ("HeadDropout: heads, for all time", SEQUENCES, "head_dropout(x, p, dim=2)", _heads),
    ("PatchDropout: a fixed number of tokens", SEQUENCES, "patch_dropout(x, p)", _patches),
    ("LayerDrop: layers", SEQUENCES, "layer_drop(layers, p)", _calls(_layers)),
    ("embedding dropout: words", SEQUENCES, "embedding_dropout(ids, table, p)", _calls(_words)),
    ("DropConnect: weights", SEQUENCES, "dropconnect_linear(x, weight, p=p)", _calls(_weights)),
]
# The labels of rows and columns, if they are not samples, time and features.
AXES = {
    "LayerDrop: layers": ("4 calls", "layers run down"),
    "embedding dropout: words": ("4 calls", "features (words run down)"),
    "DropConnect: weights": ("4 calls", "inputs (outputs run down)"),
}
KEPT, DROPPED = "#0072B2", "#F2E3C6"


def ticks(settings: Settings) -> int:
    """One per kind."""
    return len(KINDS) + len(STRUCTURED)


def measure(settings: Settings, device: torch.device, progress: Bar) -> dict[str, Any]:
    """The shapes, rates and bits of the masks; ``keep`` has a 1 per kept element, in C order."""
    found = []

    def note(title: str, rule: str, keep: Tensor, **more: Any) -> None:
        found.append(
            {
                "kind": title,
                "rule": rule,
                "shape": list(keep.shape),
                "p": settings.p,
                "dropped": int((~keep).sum()) / keep.numel(),
                "keep": "".join(map(str, keep.flatten().int().tolist())),
                **more,
            }
        )
        progress.tick()

    def seed() -> Tensor:
        return tridrop.fold_in(settings.seed, len(found)).to(device)

    for title, shape, noise_shape in KINDS:
        keep = tridrop.keep_mask(seed(), shape, settings.p, noise_shape=noise_shape)
        written = None if noise_shape is None else list(noise_shape)
        note(title, f"noise_shape {noise_shape or 'none'}", keep, noise_shape=written)
    for title, shape, rule, function in STRUCTURED:
        note(title, rule, function(torch.ones(shape, device=device), settings.p, seed()) != 0)
    return {"masks": found}


def findings(result: dict[str, Any]) -> list[str]:
    """What was dropped, for each kind."""
    return [
        f"{one['kind']}: {one['rule']} of {one['shape']}, "
        f"{100 * one['dropped']:.0f} % dropped, p = {one['p']}."
        for one in result["masks"]
    ]


def draw(result: dict[str, Any]) -> Figure:
    """One panel per kind, one row per sample or call, and in it one tile per channel."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.5, 12.0), layout="constrained")
    for axes, one in zip(figure.subplots(4, 3).flat, result["masks"], strict=True):
        _panel(axes, one)
    handles = [Patch(color=KEPT, label="kept"), Patch(color=DROPPED, label="dropped")]
    figure.legend(handles=handles, ncols=2, frameon=False, loc="outside lower center")
    return figure


def _panel(axes: Axes, one: dict[str, Any]) -> None:
    from matplotlib.colors import ListedColormap

    keep = torch.tensor([int(bit) for bit in one["keep"]]).view(one["shape"])
    axes.imshow(_tiles(keep).numpy(), cmap=ListedColormap(["white", DROPPED, KEPT]), vmin=0, vmax=2)
    axes.set_title(f"{one['kind']}\n{one['rule']}", fontsize=10)
    usual = "channels" if keep.dim() == 4 else "features (time runs down)"
    rows, columns = AXES.get(one["kind"], (f"{keep.shape[0]} samples", usual))
    axes.set_ylabel(rows, fontsize=9)
    axes.set_xlabel(columns, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _tiles(keep: Tensor) -> Tensor:
    """A picture with 0 between tiles, 1 for dropped and 2 for kept elements.

    ``keep`` is [samples, channels, rows, columns] or [samples, time, features].
    """
    keep = keep[:, None] if keep.dim() == 3 else keep
    picture = torch.nn.functional.pad(keep + 1, (0, 1, 0, 1))
    return picture.transpose(1, 2).flatten(2).flatten(0, 1)
