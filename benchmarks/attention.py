"""Time attention with dropout beside torch's own, on a GPU.

    python benchmarks/attention.py                 the whole table (minutes)
    python benchmarks/attention.py --quick         two sizes
    python benchmarks/attention.py --out DIR       write attention.csv and attention.json there

Every provider runs in turn in each round, so that a slow moment of the machine meets all of them;
the figure is the median over rounds. Reported are milliseconds, TFLOP/s (4 B H S^2 D for forward,
2.5 times as much for backward, half of either where causal: the count of the FlashAttention papers,
whatever a kernel really does), peak memory, and the cost of dropout: p = 0.1 over p = 0.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tridrop

Call = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
TORCH = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch math": SDPBackend.MATH,
}
ROUNDS = 15


def _tridrop(query: Tensor, key: Tensor, value: Tensor, p: float, causal: bool) -> Tensor:
    out = tridrop.scaled_dot_product_attention(query, key, value, None, p, causal)
    assert isinstance(out, Tensor)
    return out


def _torch(backend: SDPBackend) -> Call:
    def call(query: Tensor, key: Tensor, value: Tensor, p: float, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, None, p, causal)

    return call


def _eager(query: Tensor, key: Tensor, value: Tensor, p: float, causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return F.dropout(torch.softmax(scores, -1), p) @ value


def providers() -> dict[str, Call]:
    found = {"tridrop": _tridrop} | {name: _torch(b) for name, b in TORCH.items()}
    return found | {"compiled eager": torch.compile(_eager)}


def packed(lengths: list[int], heads: int, dim: int, causal: bool) -> dict[str, Any]:
    """tridrop on packed sequences, and on the same ones padded to the longest."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    tokens = [
        torch.randn(1, heads, sum(lengths), dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    padded = [
        torch.randn(len(lengths), heads, max(lengths), dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    there = (
        torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    )
    return {
        "tridrop packed": (
            tokens,
            lambda q, k, v, p: tridrop.scaled_dot_product_attention(
                q, k, v, None, p, causal, cu_seqlens_q=offsets, cu_seqlens_k=offsets,
                max_seqlen_q=max(lengths), max_seqlen_k=max(lengths),
            ),
        ),
        "tridrop padded": (
            padded,
            lambda q, k, v, p: tridrop.scaled_dot_product_attention(
                q, k, v, None, p, causal, key_mask=there
            ),
        ),
    }  # fmt: skip


def milliseconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Any]:
    """Forward and backward once, in milliseconds, and the peak of the memory they add, in MiB."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept: list[Tensor] = []
    forward = milliseconds(lambda: kept.append(call(*leaves)))
    grad = torch.randn_like(kept[0])
    backward = milliseconds(lambda: torch.autograd.grad(kept[0], leaves, grad))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"forward_ms": forward, "backward_ms": backward, "peak_MiB": peak}


def rounds(
    calls: dict[tuple[str, float], tuple[list[Tensor], Callable[..., Tensor]]],
) -> Iterator[tuple[str, float, dict[str, float] | str]]:
    """The medians of every call that runs, and the reason of every one that does not."""
    samples: dict[tuple[str, float], list[dict[str, float]]] = {}
    for who, (tensors, call) in list(calls.items()):
        try:
            for _ in range(3):  # compile and warm up
                measure(call, tensors)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            yield *who, str(error).splitlines()[0][:120]
            del calls[who]
            torch.cuda.empty_cache()
    for _ in range(ROUNDS):
        for who, (tensors, call) in calls.items():
            samples.setdefault(who, []).append(measure(call, tensors))
    for who, found in samples.items():
        yield *who, {name: statistics.median(s[name] for s in found) for name in found[0]}


def table(quick: bool) -> Iterator[dict[str, Any]]:
    lengths = [512, 4096] if quick else [512, 1024, 2048, 4096, 8192, 16384]
    for dim, length, causal in itertools.product([64, 128], lengths, [False, True]):
        batch, heads = max(1, 16384 // length), 2048 // dim
        tensors = [
            torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        ]
        calls: dict[Any, Any] = {}
        for name, call in providers().items():
            for p in (0.0, 0.1):
                calls[name, p] = (
                    tensors,
                    lambda q, k, v, call=call, p=p, causal=causal: call(q, k, v, p, causal),
                )
        about = {"dim": dim, "length": length, "causal": causal, "batch": batch, "heads": heads}
        flops = 4 * batch * heads * length**2 * dim * (0.5 if causal else 1.0)
        yield from rows(calls, about, flops)
        torch._dynamo.reset()
    sizes = torch.randint(256, 4097, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    for dim, causal in itertools.product([64, 128], [False, True]):
        calls = {
            (name, p): (tensors, lambda q, k, v, call=call, p=p: call(q, k, v, p))
            for name, (tensors, call) in packed(sizes, 2048 // dim, dim, causal).items()
            for p in (0.0, 0.1)
        }
        flops = 4 * (2048 // dim) * sum(n**2 for n in sizes) * dim * (0.5 if causal else 1.0)
        about = {"dim": dim, "length": sum(sizes), "causal": causal, "batch": 16}
        yield from rows(calls, about | {"heads": 2048 // dim}, flops)


def rows(calls: Any, about: dict[str, Any], flops: float) -> Iterator[dict[str, Any]]:
    """A row a provider and p; the cost of dropout stands in those of p = 0.1."""
    plain: dict[str, dict[str, float]] = {}
    for name, p, found in rounds(calls):
        row = about | {"provider": name, "p": p}
        if isinstance(found, str):
            yield row | {"why_not": found}
            continue
        row |= found
        row["forward_TFLOPs"] = flops / found["forward_ms"] / 1e9
        row["backward_TFLOPs"] = 2.5 * flops / found["backward_ms"] / 1e9
        if p == 0:
            plain[name] = found
        elif name in plain:
            for way in ("forward", "backward"):
                row[f"{way}_dropout_cost"] = found[f"{way}_ms"] / plain[name][f"{way}_ms"] - 1
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py needs a CUDA device")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.strip(),
    }
    found = []
    for row in table(arguments.quick):
        found.append(where | row)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(*shown.values(), sep="\t", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attention.json").write_text(json.dumps(found, indent=1))
    columns = list(dict.fromkeys(key for row in found for key in row))
    with (arguments.out / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
