"""Compile the attention kernels for GPUs that are not here and read their loops.

Run as a program it prints a list of JSON records, one a kernel. As in machine_code.py, the
launchers of the package choose what is compiled. With arguments, only those targets are compiled,
and of one followed by ":forward" only that kernel; the last argument "table" prints a table
instead, the one in docs/design.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch

from tridrop.backends.triton import attention_launch as launch
from tridrop.backends.triton.compile import Compiled, capture
from tridrop.commands.inspection.machine_code import count, parse
from tridrop.spec.attention import AttentionInputs, AttentionOptions
from tridrop.spec.operands import AttentionBackward


def record(compiled: Compiled, **about) -> dict:
    code = parse(compiled.text)
    kernel = compiled.kernel.removeprefix("attention_").removesuffix("_kernel")
    base = {"target": compiled.arch, "kernel": kernel, **about, "shared": compiled.shared_bytes}
    if code.amd:
        return base | {"spills": code.spill_bytes // 4}
    scores = compiled.tile / compiled.threads
    return base | {
        "registers": code.registers,
        "spills": count(code.body, "LDL", "STL"),
        # The first loop is the one without bounds, or a causal backward's with them.
        "loops": [
            {
                "instructions": len(body) / scores,
                "stores_shared": count(body, "STS"),
                "spills": count(body, "LDL", "STL"),
            }
            for body in code.loops
        ],
    }


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(p: float, head_dim: int, causal: bool, backward: bool) -> Callable[[], object]:
    """A call of a launcher: 4 x 16 heads of 4096 tokens in bf16."""
    shape = (4, 16, 4096, head_dim)
    query, key, value = (empty(*shape, dtype=torch.bfloat16) for _ in range(3))
    options = AttentionOptions(
        p=p, scale=head_dim**-0.5, upper=0 if causal else None, max_query=4096, max_key=4096
    )
    seed = empty(2, dtype=torch.int64) if p else None
    inputs = AttentionInputs(query, key, value, seed=seed)
    if not backward:
        return lambda: launch.attention_forward(inputs, options)
    needs = (True, True, True, False, False)
    lse = empty(*shape[:-1], dtype=torch.float32)
    return lambda: launch.attention_backward(
        AttentionBackward(query, None, query, lse, *inputs), options, needs
    )


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    arguments = sys.argv[1:]
    table = arguments[-1:] == ["table"]
    records = []
    for wanted in (arguments[:-1] if table else arguments) or ["sm_80", "sm_90", "sm_100"]:
        target, _, only = wanted.partition(":")
        for head_dim in (64, 128):
            for causal in (False, True):
                for p in (0.0, 0.1):
                    for backward in (False,) if only == "forward" else (False, True):
                        call = call_of(p, head_dim, causal, backward)
                        about = {"p": p, "head_dim": head_dim, "causal": causal}
                        records += [
                            record(compiled, **about)
                            for compiled in capture(target, call)
                            if "delta" not in compiled.kernel
                        ]
    if not table:
        print(json.dumps(records))
        return
    for r in records:
        loops = " / ".join(f"{loop['instructions']:.1f}" for loop in r.get("loops", []))
        print(
            f"| {r['target']} | {r['kernel']} | {r['head_dim']} | "
            f"{'causal' if r['causal'] else 'full'} | {r['p']} | {loops} | "
            f"{r.get('registers', '')} | {r['spills']} | {r['shared']} |"
        )


if __name__ == "__main__":
    main()
