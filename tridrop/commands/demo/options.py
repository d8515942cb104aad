"""The options of the demo: their defaults, and every check on their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# With these sizes, on two CPU cores, the default run takes less than five minutes and shows where
# the validation loss without dropout begins to rise; the quick run takes less than one minute.
DEFAULTS: dict[str, Any] = {
    "steps": 1000,
    "layers": 2,
    "dim": 128,
    "heads": 4,
    "context": 128,
    "batch": 8,
    "p": 0.1,
    "attention_p": None,  # p
    "lr": 2e-3,
    "seed": 0,
    "train_bytes": 6_144,
    "valid_bytes": 16_384,
    "eval_every": 40,
}
# What each --size changes. A medium step has as many tokens as a small one; its attention is twice
# as large per head and has twice the heads, which is where eager dropout costs most.
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "medium": {"dim": 256, "heads": 8, "context": 256, "batch": 4},
}
MODELS = ("block", "gpt2", "bert")
EXPERIMENTS = ("overfit", "uncertainty", "masks", "lora")
# Without --steps, the number of steps follows their speed, so that the last evaluation ends within
# this many seconds: five minutes and one, less what imports, results and drawings take on a busy
# machine.
SECONDS, QUICK_SECONDS = 240.0, 40.0
QUICK: dict[str, Any] = {
    "steps": 240,
    "train_bytes": 2_048,
    "valid_bytes": 4_096,
}


class DemoError(Exception):
    """The demo cannot run with these options; the message says what to change."""


@dataclass(frozen=True)
class Options:
    """All options of a run, checked."""

    model: str
    text: Path | None
    device: str
    backend: str
    steps: int
    layers: int
    dim: int
    heads: int
    context: int
    batch: int
    p: float
    attention_p: float
    lr: float
    seed: int
    train_bytes: int
    valid_bytes: int
    eval_every: int
    out: Path
    quick: bool
    memory: bool
    size: str
    seconds: float | None = None  # until the last evaluation; None if steps were given

    def __post_init__(self) -> None:
        """Raises DemoError if options do not fit each other."""
        if self.dim % self.heads:
            raise DemoError(f"--heads {self.heads} does not divide --dim {self.dim}")
        for name, size in (
            ("--train-bytes", self.train_bytes),
            ("--valid-bytes", self.valid_bytes),
        ):
            if size <= self.context:
                raise DemoError(
                    f"{name} {size} must be larger than --context {self.context}, to hold a window "
                    "and the byte after it"
                )

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def resolve(args: argparse.Namespace) -> Options:
    """The options of ``args``: the given values, else those of --quick and --size, or the defaults.

    Raises DemoError if they do not fit each other.
    """
    values = DEFAULTS | SIZES[args.size] | (QUICK if args.quick else {})
    for name in DEFAULTS:
        given = getattr(args, name)
        if given is not None:
            values[name] = given
    if values["attention_p"] is None:
        values["attention_p"] = values["p"]
    scaled = args.steps is None
    return Options(
        seconds=(QUICK_SECONDS if args.quick else SECONDS) if scaled else None,
        model=args.model,
        text=args.text,
        device=args.device,
        backend=args.backend,
        out=args.out,
        quick=args.quick,
        memory=args.memory,
        size=args.size,
        **values,
    )


def _checked(
    kind: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """A type for argparse: ``kind(text)``, or an error that names what is ``wanted``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_count = _checked(int, lambda n: n > 0, "a positive integer")
_seed = _checked(int, lambda n: 0 <= n < 1 << 63, "an integer in [0, 2^63)")
_rate = _checked(float, lambda x: 0 <= x < 1, "a probability in [0, 1)")
_positive = _checked(float, lambda x: x > 0 and math.isfinite(x), "a positive number")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to ``parser``."""

    def add(name: str, kind: Callable[[str], Any], text: str) -> None:
        # The parser's own default stays None, so that --quick overrides only options not given.
        key = name.replace("-", "_")
        default = "that of --p" if DEFAULTS[key] is None else DEFAULTS[key]
        others = {"quick": QUICK, **SIZES}
        also = "".join(f", {of} {values[key]}" for of, values in others.items() if key in values)
        parser.add_argument(
            f"--{name}", type=kind, metavar="N", help=f"{text} (default: {default}{also})"
        )

    parser.add_argument(
        "--model",
        default=MODELS[0],
        choices=MODELS,
        help="block: tridrop.nn.TransformerBlock against plain PyTorch; gpt2, bert: small random "
        "models of transformers, before and after tridrop.swap, which need tridrop[hf] "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--experiment",
        choices=EXPERIMENTS,
        help="run an experiment instead of training on text: overfit and uncertainty train small "
        "CNNs on scikit-learn's handwritten digits, masks draws which activations are dropped, "
        "lora adapts a small Llama with PEFT. Of the other options experiments take --quick, "
        "--out, --device, --backend, --seed, --steps and --p, with their own defaults "
        "(docs/experiments.md)",
    )
    parser.add_argument("--quick", action="store_true", help="a small run of less than a minute")
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        default=next(iter(SIZES)),
        help="small: width 128, 64 bytes at a time; medium: width 256, 256 bytes at a time, where "
        "tridrop gains more on a CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="tridrop's model keeps no input of a linear layer that backward can make again "
        "(docs/memory.md)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="train on this file (default: the texts of Python's help())",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-results"),
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="a torch device (default: auto, which is cuda if there is a GPU)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "triton", "cpu", "reference"),
        help="tridrop's backend (default: %(default)s)",
    )
    add(
        "steps",
        _count,
        "training steps of each run; if not given, fewer where they would take too long",
    )
    add("eval-every", _count, "steps between two evaluations; fewer if there are fewer steps")
    add("train-bytes", _count, "size of the training part, from the start of the text")
    add("valid-bytes", _count, "size of the validation part, from the end of the text")
    add("p", _rate, "dropout of the embeddings and of both branches of a block")
    add("attention-p", _rate, "dropout of the attention probabilities")
    add("layers", _count, "transformer blocks")
    add("dim", _count, "width of the residual stream")
    add("heads", _count, "attention heads")
    add("context", _count, "bytes that the model sees at a time")
    add("batch", _count, "windows per step")
    add("lr", _positive, "learning rate of AdamW")
    add("seed", _seed, "seed of the weights, of the order of the data and of the masks")
