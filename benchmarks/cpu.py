"""Time the ops of a transformer block on a CPU against eager PyTorch, forward plus backward.

    python benchmarks/cpu.py                   [8192, 1024] and [64, 64], fp32 and bf16, in training
                                               and in evaluation (minutes)
    python benchmarks/cpu.py --threads 2       with this number of torch's threads
    python benchmarks/cpu.py --compile         torch.compile of the eager op as well
    python benchmarks/cpu.py --out DIR         write cpu.csv and cpu.json there

All providers take turns in each round, so that a slow moment of the machine affects all of them.
Compare the ratios: of the best times, of the medians, and the median of the ratios within each
round, which changes of the clock rate affect least. Gradients are taken with torch.autograd.grad
and not accumulated, like those of tensors inside a model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tridrop
from tridrop.backends.cpu import serving
from tridrop.base.files import write_csv

P, EPS = 0.1, 1e-6
SIZES = {(8192, 1024): 15, (64, 64): 1000}  # shape -> rounds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Op = Callable[..., Tensor]


def _layer_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor, training: bool) -> Tensor:
    return F.layer_norm(r + F.dropout(x, P, training), w.shape, w, b)


def _swiglu(x: Tensor, training: bool) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return F.dropout(F.silu(first) * second, P, training)


def _activation(name: str, eager: Op) -> tuple[Op, Op]:
    return (
        lambda x, r, w, b, t: F.dropout(eager(x), P, t),
        lambda x, r, w, b, t: tridrop.activation_dropout(x, P, t, activation=name),
    )


def _scores(x: Tensor) -> Tensor:
    """x as scores [batch, heads, queries, keys] with as many queries as keys."""
    return x.view(1, -1, x.shape[1], x.shape[1])


def _heads(x: Tensor) -> Tensor:
    """At most 2048 rows of x as [batch, heads, length, 64], in sequences of at most 1024."""
    rows = x[:2048]
    return rows.view(-1, min(1024, len(rows)), x.shape[1] // 64, 64).transpose(1, 2)


def _attention(attend: Op) -> Op:
    def op(x: Tensor, r: Tensor, w: Tensor, b: Tensor, training: bool) -> Tensor:
        query, key = _heads(x), _heads(r)
        out = attend(query, key, query, None, P if training else 0.0)
        return out.transpose(1, 2).reshape(-1, x.shape[1])

    return op


# name -> (eager, tridrop): functions of x, a residual, a norm's weight and bias, and `training`
OPS: dict[str, tuple[Op, Op]] = {
    "dropout_add": (
        lambda x, r, w, b, t: r + F.dropout(x, P, t),
        lambda x, r, w, b, t: tridrop.dropout_add(x, r, P, t),
    ),
    "activation_dropout (gelu)": _activation("gelu", F.gelu),
    "dropout_add_layer_norm": (
        _layer_norm,
        lambda x, r, w, b, t: tridrop.dropout_add_layer_norm(x, r, w, b, P, t),
    ),
    "activation_dropout (gelu_tanh)": _activation("gelu_tanh", partial(F.gelu, approximate="tanh")),
    "activation_dropout (relu)": _activation("relu", F.relu),
    "activation_dropout (silu)": _activation("silu", F.silu),
    "activation_dropout (swiglu)": (  # x with half as many rows, twice as wide
        lambda x, r, w, b, t: _swiglu(x.view(-1, 2 * x.shape[1]), t),
        lambda x, r, w, b, t: tridrop.activation_dropout(
            x.view(-1, 2 * x.shape[1]), P, t, activation="swiglu"
        ),
    ),
    "dropout_add_rms_norm": (
        lambda x, r, w, b, t: F.rms_norm(r + F.dropout(x, P, t), w.shape, w, EPS),
        lambda x, r, w, b, t: tridrop.dropout_add_rms_norm(x, r, w, p=P, training=t, eps=EPS),
    ),
    "softmax_dropout": (
        lambda x, r, w, b, t: F.dropout(torch.softmax(_scores(x), -1), P, t).view_as(x),
        lambda x, r, w, b, t: tridrop.softmax_dropout(_scores(x), P, t).view_as(x),
    ),
    "scaled_dot_product_attention": (
        _attention(F.scaled_dot_product_attention),
        _attention(tridrop.scaled_dot_product_attention),
    ),
}


def both_ways(op: Op, leaves: list[Tensor], grad: Tensor, training: bool) -> Any:
    """Forward and backward."""
    out = op(*leaves, training)
    return torch.autograd.grad(out, leaves, grad[: len(out)], allow_unused=True)


def measure(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """The seconds and the page faults of every call in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return times, faults


def rows(
    shape: tuple[int, int], rounds: int, compiled: bool, training: bool
) -> list[dict[str, Any]]:
    """One row per op, dtype and provider."""
    found = []
    for dtype_name, dtype in DTYPES.items():
        x, r, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
        w, b = torch.ones(shape[1], dtype=dtype), torch.zeros(shape[1], dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, r, w, b)]
        for name, (eager, ours) in OPS.items():
            providers = {"eager": eager, "tridrop": ours}
            if compiled:
                providers["torch.compile"] = torch.compile(eager)
            calls = {
                k: partial(both_ways, op, leaves, grad, training) for k, op in providers.items()
            }
            times, faults = measure(calls, rounds)
            best = {k: min(v) for k, v in times.items()}
            median = {k: statistics.median(v) for k, v in times.items()}
            paired = {
                k: statistics.median(e / t for e, t in zip(times["eager"], v, strict=True))
                for k, v in times.items()
            }
            for provider in times:
                found.append(
                    {
                        "op": name,
                        "shape": "x".join(map(str, shape)),
                        "dtype": dtype_name,
                        "training": training,
                        "provider": provider,
                        "best_ms": round(best[provider] * 1e3, 4),
                        "median_ms": round(median[provider] * 1e3, 4),
                        "eager_over_best": round(best["eager"] / best[provider], 2),
                        "eager_over_median": round(median["eager"] / median[provider], 2),
                        "eager_over_paired": round(paired[provider], 2),
                        "page_faults": int(statistics.median(faults[provider])),
                    }
                )
    return found


def circumstances() -> dict[str, Any]:
    """The machine, versions and settings that the figures belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((n.split(": ")[1] for n in lines if n.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load average at the start": list(os.getloadavg()),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "masks on cpu": serving.report(),
        "capability of torch": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "tridrop": tridrop.__version__,
        "commit": commit,
        "p": P,
    }


def main() -> None:
    """Print the table, and write it to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = circumstances()
    table = [
        row
        for training in (True, False)
        for shape, n in SIZES.items()
        for row in rows(shape, n, options.compile, training)
    ]
    for row in table:
        print(*row.values(), sep="\t")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cpu.json").write_text(
            json.dumps({"circumstances": about, "rows": table}, indent=1) + "\n"
        )
        write_csv(options.out / "cpu.csv", table)


if __name__ == "__main__":
    main()
