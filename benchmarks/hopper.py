"""Check and time the changes made for Hopper, each against the setting that it replaced.

    python benchmarks/hopper.py --out DIR          on a GPU; takes about two minutes
    python benchmarks/hopper.py --list             list the steps and their settings

The machine code tells what a step should gain (docs/performance.md); only a GPU tells whether it
does. First the masks and values of each setting are compared with those of the present one. Then,
for each step, rate, width and length, the settings run in turn in every round, through the public
op. The sequences have 16,384 tokens in total, with 2048 features. Rows are written to hopper.json
after each group, and the exit status is 1 if a setting fails its check.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tune import Problem, timed
from tune_cases import FAMILIES, Family, Settings, Size, attention, norm

from tridrop.backends.triton import norm_launch
from tridrop.backends.triton.attention_launch import Tile

Row = dict[str, Any]
TOKENS, FEATURES = 16384, 2048
LENGTHS, WIDTHS, RATES = (4096, 16384), (64, 128), (0.0, 0.1)
# Operations in matrix products per score and column of the head.
PRODUCTS = {"forward": 4, "dquery": 6, "dkey": 8}


@dataclass(frozen=True)
class Step:
    """Settings of one kernel by name, from that before the step to the present one."""

    name: str
    way: str
    settings: dict[str, Any]
    widths: Sequence[int] = WIDTHS

    def family(self, p: float) -> Family:
        if self.way == "norm":
            call = partial(norm, way="backward", p=p)
            base = replace(FAMILIES["norm_backward"], module=norm_launch, setting="backward_stages")
            return replace(base, problem=call)
        base = FAMILIES[f"attention_{self.way}"]
        return replace(base, problem=partial(attention, way=self.way, p=p))

    def sizes(self) -> Iterator[Size]:
        if self.way == "norm":
            yield (8192, 4096)
            return
        for width in self.widths:
            for length in LENGTHS:
                yield (TOKENS // length, FEATURES // width, length, 0, width)


STEPS = (
    Step("loads and masks ahead", "forward", {
        "two stages": Tile(128, 128, 8, 2),
        "three stages": Tile(128, 128, 8, 3),
        "two stages, mask ahead": Tile(128, 128, 8, 2, ahead=True),
        "three stages, mask ahead": Tile(128, 128, 8, 3, ahead=True),
    }),
    Step("loads ahead", "dquery", {
        "two stages": Tile(128, 64, 8, 2),
        "three stages": Tile(128, 64, 8, 3),
    }),
    Step("products that are not waited for singly", "dkey", {
        "no loop": Tile(64, 64, 4, 2),
        "loop": Tile(64, 64, 4, 2, loop=True),
    }, (64,)),
    Step("rows ahead", "norm", {"one stage": 1, "two stages": 2}),
)  # fmt: skip


def group(step: Step, size: Size, p: float, rounds: int, device: str = "cuda") -> list[Row]:
    """The rows of a step's settings at one size and rate."""
    family = step.family(p)
    tried: list[Settings] = [{family.setting: value} for value in step.settings.values()]
    problem = Problem(family, size, torch.bfloat16, device)
    reasons = [problem.why_not(settings) for settings in tried]
    right = [s for s, reason in zip(tried, reasons, strict=True) if reason is None]
    times = iter(timed(problem, right, rounds) if right else [])
    rows = []
    for name, reason in zip(step.settings, reasons, strict=True):
        row: Row = {"step": step.name, "way": step.way, "setting": name, "size": list(size), "p": p}
        row |= {"check": reason or "passed"}
        if reason is None:
            found = sorted(next(times))
            row |= {"median_ms": statistics.median(found), "best_ms": found[0]}
            if step.way in PRODUCTS:
                batch, heads, tokens, _, width = size
                work = PRODUCTS[step.way] * batch * heads * tokens**2 * width
                row["tflops"] = round(work / row["median_ms"] / 1e9, 1)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=10, help="(default %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for step in STEPS:
            print(f"{step.name} ({step.way}): {'; '.join(step.settings)}")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print(
            "hopper.py: this needs a Hopper GPU, since its settings are for Hopper", file=sys.stderr
        )
        return 2
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        for size in step.sizes():
            for p in RATES:
                found = group(step, size, p, options.rounds)
                rows += found
                about = {"device": torch.cuda.get_device_name(), "rounds": options.rounds}
                text = json.dumps({"about": about, "records": rows}, indent=1)
                (options.out / "hopper.json").write_text(text)
                for row in found:
                    time = f"{row['median_ms']:.3f} ms" if "median_ms" in row else row["check"]
                    rate = f", {row['tflops']} TFLOP/s" if "tflops" in row else ""
                    print(f"{step.name}, {step.way} {size} p={p}, {row['setting']}: {time}{rate}")
    return int(any(row["check"] != "passed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
