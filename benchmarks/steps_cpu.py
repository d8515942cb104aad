"""Time whole steps on a CPU, forward and backward of BERT and GPT-2, against eager with dropout.

    python benchmarks/steps_cpu.py [--rounds 9] [--layers 4] [--width 768] [--tokens 256]

The ways take turns in each round, in an order that rotates from round to round, so that a slow
moment of the machine affects all of them. It prints the median, over the rounds, of each way's
ratio to eager at p = 0.1. Eager at p = 0 is what a step would take if dropout cost nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import tridrop
from tridrop.commands.bench.models import ARCHITECTURES

# The tests' torchvision has no operators and cannot be imported by itself; no model here asks.
sys.modules["torchvision"] = None  # type: ignore[assignment]

EAGER = "eager"
FREE = "eager, p = 0"
WAYS = (EAGER, FREE, "torch.compile", "tridrop", "tridrop, memory=True")
P, WARM_UP = 0.1, 2


class Way:
    """A model and how it is run."""

    def __init__(self, name: str, way: str, args: argparse.Namespace) -> None:
        architecture = ARCHITECTURES[name]
        size = replace(
            architecture.full, layers=args.layers, width=args.width, heads=args.width // 64,
            length=args.tokens, batch=args.batch, vocabulary=args.vocabulary,
        )  # fmt: skip
        torch.manual_seed(0)
        model = architecture.build(size, 0.0 if way == FREE else P).train()
        if way.startswith("tridrop"):
            tridrop.swap(model, memory=way.endswith("memory=True"))
        self.call = torch.compile(model, dynamic=False) if way == "torch.compile" else model
        self.model, self.batch = model, architecture.data(size, "cpu")

    def step(self) -> float:
        """Seconds of a forward and a backward."""
        begun = time.perf_counter()
        self.call(**self.batch).loss.backward()
        taken = time.perf_counter() - begun
        self.model.zero_grad(set_to_none=True)
        return taken


def ratios(name: str, args: argparse.Namespace) -> dict[str, float]:
    """The median ratios of all ways, and eager's median in seconds."""
    ways = {way: Way(name, way, args) for way in args.ways}
    for way in ways.values():
        for _ in range(WARM_UP):
            way.step()
    rounds = []
    order = list(ways)
    for i in range(args.rounds):
        at = i % len(order)
        rounds.append({way: ways[way].step() for way in (*order[at:], *order[:at])})
    found = {way: median(r[way] / r[EAGER] for r in rounds) for way in order}
    return {**found, "eager, seconds": median(r[EAGER] for r in rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, default in (("rounds", 9), ("layers", 4), ("width", 768), ("tokens", 256),
                            ("batch", 2), ("vocabulary", 1024), ("threads", 2)):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--models", nargs="*", default=["bert", "gpt2"], choices=["bert", "gpt2"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.ways = list(dict.fromkeys([EAGER, *args.ways]))  # the others are compared with it
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.models:
        print(name, flush=True)
        found[name] = ratios(name, args)
        for way, ratio in found[name].items():
            print(f"  {way:22} {ratio:.3f}", flush=True)
    if args.json:
        options = {n: v for n, v in vars(args).items() if n != "json"}
        args.json.write_text(json.dumps({"options": options, "ratios": found}, indent=1))


if __name__ == "__main__":
    main()
