"""Compile the attention kernels for GPUs that are not here and read their loops.

Run as a program it prints a list of JSON records, one a kernel. As in machine_code.py, the
launchers of the package choose what is compiled. With arguments, only those targets are compiled;
the last argument "table" prints a table instead, the one in docs/design.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import machine_code
import torch
from triton.runtime import driver

from tridrop.backends.triton import attention_launch as launch
from tridrop.spec_attention import AttentionInputs, AttentionOptions

KERNELS = [name for name in vars(launch) if name.endswith("_kernel")]


class Recorder:
    """Takes a kernel's place in the launcher: compiles what would have been launched."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.compiled = None
        kernel.device_caches.clear()

    def __getitem__(self, grid):
        def compile_only(*args, **kwargs):
            self.compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            blocks = kwargs.get("BLOCKS")
            if blocks is not None:
                self.scores = blocks.M * blocks.N / (32 * kwargs["num_warps"])

        return compile_only


def compile_with(target: str, call: Callable[[], object]) -> dict[str, Recorder]:
    """The kernels that ``call`` would launch, compiled for ``target``."""
    driver.set_active(machine_code.Driver(machine_code.TARGETS[target]))
    recorders = {name: Recorder(getattr(launch, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        setattr(launch, name, recorder)
    try:
        call()
    finally:
        for name, recorder in recorders.items():
            setattr(launch, name, recorder.kernel)
    return {name: r for name, r in recorders.items() if r.compiled and "delta" not in name}


def loops_of(cubin: bytes) -> tuple[list[str], list[list[str]], int]:
    """All opcodes, those of each loop that is longer than a wait, in order, and the registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(machine_code.CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);"
    code = [(int(at, 16), op, rest) for at, op, rest in re.findall(pattern, text)]
    loops = []
    for at, op, rest in code:
        to = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if to and int(to.group(1), 16) < at:
            first = int(to.group(1), 16)
            body = [o for a, o, _ in code if first <= a <= at and o != "NOP"]
            if len(body) > 30:
                loops.append(body)
    ops = [op for _, op, _ in code if op != "NOP"]
    return ops, loops, int(re.search(r"REG:(\d+)", text).group(1))


def count(ops: list[str], *prefixes: str) -> int:
    return sum(op.startswith(prefixes) for op in ops)


def record(target: str, name: str, recorder: Recorder, **about) -> dict:
    compiled = recorder.compiled
    kernel = name.removeprefix("attention_").removesuffix("_kernel")
    base = {"target": target, "kernel": kernel, **about, "shared": compiled.metadata.shared}
    if "cubin" not in compiled.asm:
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        return base | {"spills": sum(map(int, spills)), "spill_counts": len(spills)}
    ops, loops, registers = loops_of(compiled.asm["cubin"])
    return base | {
        "registers": registers,
        "spills": count(ops, "LDL", "STL"),
        # The first loop is the one without bounds, or a causal backward's with them.
        "loops": [
            {
                "instructions": len(body) / recorder.scores,
                "stores_shared": count(body, "STS"),
                "spills": count(body, "LDL", "STL"),
            }
            for body in loops
        ],
    }


def call_of(p: float, head_dim: int, causal: bool, backward: bool) -> Callable[[], object]:
    """A call of a launcher: 4 x 16 heads of 4096 tokens in bf16."""
    shape = (4, 16, 4096, head_dim)
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
    options = AttentionOptions(
        p=p, scale=head_dim**-0.5, upper=0 if causal else None, max_query=4096, max_key=4096
    )
    seed = torch.zeros(2, dtype=torch.int64) if p else None
    inputs = AttentionInputs(query, key, value, seed=seed)
    if not backward:
        return lambda: launch.attention_forward(inputs, options)
    needs = (True, True, True, False, False)
    lse = torch.empty(shape[:-1])
    return lambda: launch.attention_backward(query, None, query, lse, inputs, options, needs)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    arguments = sys.argv[1:]
    table = arguments[-1:] == ["table"]
    records = []
    for target in (arguments[:-1] if table else arguments) or ["sm_80", "sm_90", "sm_100"]:
        for head_dim in (64, 128):
            for causal in (False, True):
                for p in (0.0, 0.1):
                    for backward in (False, True):
                        call = call_of(p, head_dim, causal, backward)
                        about = {"p": p, "head_dim": head_dim, "causal": causal}
                        for name, recorder in compile_with(target, call).items():
                            records.append(record(target, name, recorder, **about))
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
