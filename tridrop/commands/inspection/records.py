"""The record of a kernel: what its machine code takes per element, and which limit it meets."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import devices
from .machine_code import Code, exposed, parse, pending_loads, philox_rounds, units, widths
from .rows import BATCH, FUSED, HEADS, NAIVE, NONE, TABLE, TOKENS, Row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 10


def compile_row(name: str, arch: str, dtype: str, method: str) -> list[dict[str, Any]]:
    """The records of the kernels that a row launches.

    Call it in a separate process: it compiles for a GPU that this machine need not have.
    """
    from ...backends import triton
    from ...backends.triton import compile as compiler

    row = TABLE[name]
    found = compiler.capture(arch, lambda: row.call(triton, DTYPES[dtype], method))
    # If a launcher sums several partial sums, these kernels are alike: keep the first.
    sums = [kernel for kernel in found if kernel.kernel == "sum_kernel"][:1]
    found = [kernel for kernel in found if kernel.kernel != "sum_kernel"] + sums
    return [_record(row, kernel, dtype, method) for kernel in found if _is_new(row, kernel, method)]


def _is_new(row: Row, kernel: Any, method: str) -> bool:
    """Whether to keep a record: kernels without masks are kept once, without dropout."""
    if kernel.kernel == "attention_delta_kernel":
        return method == NONE and row.direction == "backward"
    if kernel.kernel == "sum_kernel":
        return method == NONE and row.op == "dropout_add_layer_norm"
    return True


def _record(row: Row, kernel: Any, dtype: str, method: str) -> dict[str, Any]:
    code = parse(kernel.text)
    size = torch.finfo(DTYPES[dtype]).bits // 8
    elements = row.elements
    if kernel.kernel == "attention_delta_kernel":
        elements = BATCH * HEADS * TOKENS * kernel.constants["VALUES"]
    if kernel.kernel == "sum_kernel":
        elements = math.prod(kernel.numbers)  # partial sums
    held = kernel.tile / kernel.threads
    done = held * _turns(row, kernel, code, held * size)
    used = {name: n / done for name, n in units(code.main, code.amd).items()}
    bytes_ = kernel.tensor_bytes / elements
    flops = 0.0 if size == 4 else row.flops.get(kernel.kernel, 0.0)
    calls = {NONE: 0.0, FUSED: row.calls, NAIVE: 1.0}[method]
    limits = []
    for device in devices.of(kernel.arch):
        times = device.times(used, bytes_, flops)
        met = max(times, key=lambda name: times[name])
        shown = {name: _digits(time) for name, time in times.items() if time}
        limits.append({"device": device.name, "limit": met, "ps": shown})
    products = exposed(code.main)
    return {
        "op": row.op,
        "variant": row.variant,
        "direction": row.direction,
        "kernel": kernel.kernel,
        "arch": kernel.arch,
        "dtype": dtype,
        "p_positive": method != NONE,
        "method": method,
        "instructions_per_element": round(len(code.main) / done, 2),
        "counted": "loop" if code.loops else "program",
        "elements_per_thread": int(held),
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "programs": devices.programs(
            kernel.arch, code.registers, kernel.shared_bytes, kernel.threads
        ),
        "products": products and products._asdict(),
        "loads_pending": pending_loads(code.main),
        "loads": widths(code.body, "load", code.amd),
        "stores": widths(code.body, "store", code.amd),
        "philox_rounds": round(philox_rounds(code) / done, 3),
        "philox_called": ROUNDS * calls,
        "bytes_per_element": _digits(bytes_),
        "units": {name: _digits(n) for name, n in used.items() if n},
        "limits": limits,
    }


def _turns(row: Row, kernel: Any, code: Code, tile_bytes: float) -> int:
    """How many tiles the counted code computes, since compilers unroll loops over row blocks.

    This follows from what the code stores: each iteration of the source writes ``row.written``
    tiles.
    """
    if not {"STRIP", "LOOPS"} & set(kernel.constants):
        return 1
    stored = sum(int(w) // 8 * n for w, n in widths(code.main, "store", code.amd).items())
    return max(1, round(stored / (tile_bytes * row.written)))


def _digits(x: float) -> float:
    return float(f"{x:.3g}")
