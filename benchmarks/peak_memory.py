"""Measure the peak memory of training steps on a CPU: GPT-2 with dropout everywhere.

    python benchmarks/peak_memory.py [--layers 12] [--width 768] [--tokens 1024] [--batch 2]

Each way of training runs in its own process, for two steps of forward, backward and AdamW. The
figure is the largest resident size that the process ever had, minus its size before the first step
(weights and libraries). Freed memory goes back to the system at once, since glibc's threshold for
mapping is set low, so the peak counts only memory that was in use at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

# The tests' torchvision has no operators and cannot be imported by itself; no model here asks.
sys.modules["torchvision"] = None  # type: ignore[assignment]

WAYS = ("eager", "eager, checkpointing", "torch.compile", "tridrop", "tridrop, memory=True")
P = 0.1


def measured(way: str, sizes: dict[str, int], p: float) -> dict[str, float]:
    """Train a model for two steps: the peak beyond the weights in MiB, seconds, the last loss."""
    import torch

    import tridrop
    from tridrop.commands.bench.models import ARCHITECTURES

    architecture = ARCHITECTURES["gpt2"]
    given = {"layers": sizes["layers"], "width": sizes["width"], "heads": sizes["width"] // 64,
             "length": sizes["tokens"], "batch": sizes["batch"],
             "vocabulary": sizes["vocabulary"]}  # fmt: skip
    size = replace(architecture.full, **given)
    torch.manual_seed(0)
    model = architecture.build(size, p).train()
    batch = architecture.data(size, "cpu")
    call = model
    if way.startswith("tridrop"):
        tridrop.swap(model, memory=way.endswith("memory=True"))
    elif way == "torch.compile":
        call = torch.compile(model, dynamic=False)
    elif way.endswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before, begun, loss = resident(), time.perf_counter(), None
    for _ in range(2):
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    weights = sum(t.nbytes for t in model.parameters()) / 2**20
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "weights": weights, "seconds": time.perf_counter() - begun, "loss": float(loss.detach()),
    }  # fmt: skip


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the peaks without gradients and AdamW's moments as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    names = list(found)[::-1]
    sizes = [(found[n]["peak"] - 3 * found[n]["weights"]) / 1024 for n in names]
    axes.bar_label(axes.barh(names, sizes), fmt="%.1f", padding=3)
    axes.set_xlabel("GiB at the peak of a step, beyond weights, gradients and AdamW")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def resident() -> float:
    """The resident size of the process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 12), ("width", 768), ("tokens", 1024), ("batch", 2),
                          ("vocabulary", 50257)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--p", type=float, default=P)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the figures of this run, or of --from")
    parser.add_argument(
        "--from", type=Path, dest="given", help="take the figures of an earlier --json"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {n: getattr(args, n) for n in ("layers", "width", "tokens", "batch", "vocabulary")}
    if args.one:
        print(json.dumps(measured(args.one, sizes, args.p)))
        return
    if args.given:
        plot(json.loads(args.given.read_text())["ways"], args.plot or Path("peak-memory.png"))
        return
    found = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    given = [f"--{name}={value}" for name, value in {**sizes, "p": args.p}.items()]
    print(f"GPT-2, {sizes}, p = {args.p}: MiB beyond the weights, at the peak of two steps")
    for way in args.ways:
        ran = subprocess.run(
            [sys.executable, __file__, f"--one={way}", *given],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            sys.exit(f"{way}: {ran.stderr[-2000:]}")
        found[way] = json.loads(ran.stdout.splitlines()[-1])
        figures = found[way]
        # Every way also needs the gradients and AdamW's two moments.
        rest = figures["peak"] - 3 * figures["weights"]
        print(f"{way:22} {figures['peak']:8.0f}  less gradients and AdamW {rest:8.0f}  "
              f"loss {figures['loss']:.4f}  {figures['seconds']:.0f} s", flush=True)  # fmt: skip
    if args.plot:
        plot(found, args.plot)
    if args.json:
        args.json.write_text(json.dumps({"sizes": sizes, "p": args.p, "ways": found}, indent=1))


if __name__ == "__main__":
    main()
