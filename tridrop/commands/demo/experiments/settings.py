"""The options that an experiment takes from the command line, and its defaults."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..options import DEFAULTS, MODELS, SIZES, DemoError


@dataclass(frozen=True)
class Settings:
    """All settings of an experiment.

    ``repeats`` networks (or pairs) are trained, with consecutive seeds from ``seed`` on. ``train``
    and ``valid`` are numbers of images (the rest are test images), or of bytes of the text.
    """

    experiment: str
    out: Path
    device: str
    backend: str
    quick: bool
    seed: int = 0
    p: float = 0.5
    steps: int = 800
    every: int = 20
    repeats: int = 5
    train: int = 200
    valid: int = 400
    samples: int = 50
    rotated: int = 100

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values, without the folder."""
        return {k: v for k, v in asdict(self).items() if k != "out"}


# The options of the demo that each experiment takes.
_TAKEN = {
    "overfit": ("seed", "p", "steps"),
    "uncertainty": ("seed", "p", "steps"),
    "masks": ("seed", "p"),
    "lora": ("seed", "p", "steps"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "overfit": {},
    "uncertainty": {"repeats": 10},  # each digit is left out once
    "masks": {"p": 0.4},
    "lora": {"p": 0.05, "steps": 160, "every": 16, "train": 65_536, "valid": 4_096},
}
# Enough to run every line of code; the findings mean nothing.
_QUICK: dict[str, Any] = {
    "steps": 60, "repeats": 2, "train": 100, "valid": 200, "samples": 8, "rotated": 20,
}  # fmt: skip


def resolve(args: argparse.Namespace) -> Settings:
    """The settings of ``args``: the given values, else those of --quick, else the defaults.

    Raises DemoError for an option that an experiment does not take.
    """
    taken = _TAKEN[args.experiment]
    foreign = [f"--{k.replace('_', '-')}" for k in DEFAULTS if getattr(args, k) is not None]
    foreign = [name for name in foreign if name[2:] not in taken]
    foreign += ["--text"] * (args.text is not None) + ["--model"] * (args.model != MODELS[0])
    foreign += ["--memory"] * args.memory + ["--size"] * (args.size != next(iter(SIZES)))
    if foreign:
        raise DemoError(
            f"--experiment {args.experiment} does not take {', '.join(foreign)}; it takes "
            "--quick, --out, --device, --backend, " + ", ".join(f"--{name}" for name in taken)
        )
    given = {name: getattr(args, name) for name in taken if getattr(args, name) is not None}
    values = _DEFAULTS[args.experiment] | (_QUICK if args.quick else {}) | given
    return Settings(
        experiment=args.experiment,
        out=args.out,
        device=args.device,
        backend=args.backend,
        quick=args.quick,
        **values,
    )
