"""Check and time the changes made for Hopper, each against the setting that it replaced.

    python benchmarks/hopper.py --out DIR          on a GPU; takes about two minutes
    python benchmarks/hopper.py --specialised      only the forward whose warps divide the work
    python benchmarks/hopper.py --list             list the steps and their settings

The machine code tells what a step should gain (docs/performance.md); only a GPU tells whether it
does. First the masks and values of each setting are compared with those of the present one. Then,
for each step, rate, width and length, the settings run in turn in every round, through the public
op. The sequences have 16,384 tokens in total, with 2048 features. Rows are written to hopper.json
after each group, and the exit status is 1 if a setting fails its check.

The specialised forward is a process's own matter: if its warps waited for each other for ever, the
other steps would still have their times.
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

from tridrop.backends.triton import norm_launch, specialised
from tridrop.backends.triton.attention_settings import Tile
from tridrop.backends.triton.attention_tiles import EDGE, INNER

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
    causal: Sequence[int] = (0,)

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
            for causal in self.causal:
                for length in LENGTHS:
                    yield (TOKENS // length, FEATURES // width, length, causal, width)


STEPS = (
    Step("loads and masks ahead", "forward", {
        "two stages": Tile(128, 128, 8, 2),
        "three stages": Tile(128, 128, 8, 3),
        "two stages, mask ahead": Tile(128, 128, 8, 2, ahead=True),
        "three stages, mask ahead": Tile(128, 128, 8, 3, ahead=True),
    }),
    Step("two programs on a multiprocessor", "forward", {
        "half the queries": Tile(64, 128, 4, 3, ahead=True),
        "one program": Tile(128, 128, 8, 3, ahead=True),
    }, (64,)),
    Step("loads ahead", "dquery", {
        "two stages": Tile(128, 64, 8, 2),
        "three stages": Tile(128, 64, 8, 3),
    }),
    Step("products that are not waited for singly, and loads ahead", "dkey", {
        "singly": Tile(64, 64, 4, 2),
        "two stages": Tile(64, 64, 4, 2, apart=True),
        "three stages": Tile(64, 64, 4, 3, apart=True),
    }, (64,)),
    Step("rows ahead", "norm", {"one stage": 1, "two stages": 2}),
)  # fmt: skip


def _specialised(width: int, causal: int) -> Step:
    bounds = (EDGE if causal else INNER).value
    special = Tile(128, specialised.KEYS, 4, specialised.STAGES[width], special=bounds)
    settings = {"ordinary": Tile(128, 128, 8, 3, ahead=True), "specialised": special}
    name = f"warps that divide the work, D = {width}{', causal' * causal}"
    return Step(name, "forward", settings, (width,), (causal,))


# The last setting is not the launchers' own, unless TRIDROP_WARP_SPECIALIZE=1 is set.
SPECIALISED = tuple(_specialised(width, causal) for width in WIDTHS for causal in (0, 1))


def refused(setting: Any, device: str) -> str | None:
    """Why a setting cannot be compiled here, by rule, or None where it can."""
    special = isinstance(setting, Tile) and setting.special is not None
    return specialised.why_not(torch.device(device)) if special else None


def group(step: Step, size: Size, p: float, rounds: int, device: str = "cuda") -> list[Row]:
    """The rows of a step's settings at one size and rate."""
    family = step.family(p)
    refusals = {name: refused(value, device) for name, value in step.settings.items()}
    names = [name for name, reason in refusals.items() if reason is None]
    tried: list[Settings] = [{family.setting: step.settings[name]} for name in names]
    problem = Problem(family, size, torch.bfloat16, device)
    reasons = [problem.why_not(settings) for settings in tried]
    right = [s for s, reason in zip(tried, reasons, strict=True) if reason is None]
    times = iter(timed(problem, right, rounds) if right else [])
    about: Row = {"step": step.name, "way": step.way, "size": list(size), "p": p}
    rows = [
        about | {"setting": name, "check": f"refused: {reason}"}
        for name, reason in refusals.items()
        if reason is not None
    ]
    for name, reason in zip(names, reasons, strict=True):
        row = about | {"setting": name, "check": reason or "passed"}
        if reason is None:
            found = sorted(next(times))
            row |= {"median_ms": statistics.median(found), "best_ms": found[0]}
            if step.way in PRODUCTS:
                batch, heads, tokens, causal, width = size
                work = PRODUCTS[step.way] * batch * heads * tokens**2 * width / (1 + causal)
                row["tflops"] = round(work / row["median_ms"] / 1e9, 1)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=10, help="(default %(default)s)")
    parser.add_argument("--specialised", action="store_true", help="the specialised forward alone")
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for step in (*STEPS, *SPECIALISED):
            print(f"{step.name} ({step.way}): {'; '.join(step.settings)}")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print(
            "hopper.py: this needs a Hopper GPU, since its settings are for Hopper", file=sys.stderr
        )
        return 2
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for step in SPECIALISED if options.specialised else STEPS:
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
    wrong = [r for r in rows if r["check"] != "passed" and not r["check"].startswith("refused: ")]
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
