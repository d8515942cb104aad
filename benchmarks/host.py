"""Time the host's part of a call: everything except the work on the device.

    python benchmarks/host.py                    CPU tensors, and Triton launches without a GPU
    python benchmarks/host.py --out DIR          write host.csv and host.json there

There are two tables, for tensors of [64, 64] in fp32, where only the host takes time:

- *cpu*: calls on CPU tensors, including their arithmetic, compared with eager PyTorch's.
- *launch*: calls of the Triton backend with a driver that compiles for sm_90 and launches nothing.
  This is what the host does before the kernel starts, except for cuLaunchKernel itself. On a
  machine with a GPU the real driver is used, with CUDA tensors.

Providers take turns in each round, so that a slow moment affects all of them. A figure is the
median over the rounds of the mean time per call; eager is timed in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_plan import stub
from torch import Tensor

import tridrop
from tridrop.base.files import write_csv
from tridrop.commands.bench.machine import Machine

P = 0.1
ROUNDS, CALLS = 25, 100
Op = Callable[..., Tensor]


def _attend(attention: Op, x: Tensor, r: Tensor) -> Tensor:
    query, key = x[None, None], r[None, None]
    return attention(query, key, query, None, P)[0, 0]


# name -> (eager, tridrop): functions of x, a residual, and a norm's weight and bias
OPS: dict[str, tuple[Op, Op]] = {
    "dropout": (
        lambda x, r, w, b: F.dropout(x, P),
        lambda x, r, w, b: tridrop.dropout(x, P),
    ),
    "dropout_add": (
        lambda x, r, w, b: r + F.dropout(x, P),
        lambda x, r, w, b: tridrop.dropout_add(x, r, P),
    ),
    "activation_dropout": (
        lambda x, r, w, b: F.dropout(F.gelu(x + b), P),
        lambda x, r, w, b: tridrop.activation_dropout(x, P, activation="gelu", bias=b),
    ),
    "dropout_add_layer_norm": (
        lambda x, r, w, b: F.layer_norm(r + F.dropout(x, P), w.shape, w, b),
        lambda x, r, w, b: tridrop.dropout_add_layer_norm(x, r, w, b, P),
    ),
    "softmax_dropout": (
        lambda x, r, w, b: F.dropout(torch.softmax(x, -1), P),
        lambda x, r, w, b: tridrop.softmax_dropout(x[None, None], P)[0, 0],
    ),
    "scaled_dot_product_attention": (
        lambda x, r, w, b: _attend(F.scaled_dot_product_attention, x, r),
        lambda x, r, w, b: _attend(tridrop.scaled_dot_product_attention, x, r),
    ),
}


@contextmanager
def launching() -> Iterator[str]:
    """Make calls inside use Triton; yields the device for their tensors."""
    if torch.cuda.is_available():
        with tridrop.backend("triton"):
            yield "cuda"
        return
    with stub.launching(90):
        yield "cpu"


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds per call: medians over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {name: statistics.median(samples) for name, samples in times.items()}


def rows(device: str, table: str) -> Iterator[dict[str, Any]]:
    """One row per op and direction."""
    x, r, grad = (torch.randn(64, 64, device=device) for _ in range(3))
    w, b = torch.ones(64, device=device), torch.zeros(64, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]
    for name, pair in OPS.items():
        calls: dict[str, Callable[[], Any]] = {}
        for provider, op in zip(("eager", "tridrop"), pair, strict=True):
            calls[f"{provider} forward"] = lambda op=op: op(x, r, w, b)
            calls[f"{provider} both"] = lambda op=op: torch.autograd.grad(
                op(*leaves), leaves, grad, allow_unused=True
            )
        found = measure(calls)
        for mode in ("forward", "both"):
            eager, ours = found[f"eager {mode}"], found[f"tridrop {mode}"]
            yield {
                "table": table,
                "op": name,
                "mode": mode,
                "eager_us": round(eager, 1),
                "tridrop_us": round(ours, 1),
                "tridrop_over_eager": round(ours / eager, 2),
            }


def main() -> None:
    """Print the tables, and write them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", choices=("cpu", "launch"), action="append")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    about = Machine("cuda" if torch.cuda.is_available() else "cpu").about()
    for table in options.table or ("cpu", "launch"):
        with launching() if table == "launch" else ExitStack() as device:
            for row in rows(device if table == "launch" else "cpu", table):
                print(*row.values(), sep="\t", flush=True)
                found.append(row)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "host.csv", found)
        written = {"about": about, "rows": found}
        (options.out / "host.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
