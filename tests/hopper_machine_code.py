"""Compile attention for Hopper with the features that it has, and read what its products hide.

Run as a program it prints a list of JSON records, one a kernel; with the argument "table" a line
for each, as in docs/performance.md. As in attention_machine_code.py, the launchers of the package
choose what is compiled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import triton

from tridrop.backends.triton import attention_launch as launch
from tridrop.backends.triton.compile import SHARED, Compiled, capture
from tridrop.commands.inspection.machine_code import count, exposed, parse, pending_loads
from tridrop.spec.attention import AttentionInputs, AttentionOptions
from tridrop.spec.operands import AttentionBackward

BATCH, HEADS, TOKENS = 4, 16, 4096
WIDTHS = (64, 128)
FEATURES = {
    "plain": {},
    "causal": {"upper": 0},
    "window": {"lower": -256, "upper": 0},
    "grouped heads": {"group": 4},
    "grouped heads, causal": {"group": 4, "upper": 0},
    "bool mask": {"mask": torch.bool},
    "bool mask, causal": {"mask": torch.bool, "upper": 0},
    "bf16 mask": {"mask": torch.bfloat16},
    "fp32 mask": {"mask": torch.float32},
    "key mask": {"key_mask": True},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 30.0},
    "packed": {"packed": True},
    "shard inside a tile": {"origin": (0, 0, 0, 5)},
}
ARCHS = ("sm_90", "sm_80")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(feature: str, width: int, p: float, backward: bool) -> Callable[[], object]:
    """A call of a launcher in bf16: 4 x 16 heads of 4096 tokens."""
    given = dict(FEATURES[feature])
    group, mask = given.pop("group", 1), given.pop("mask", None)
    more = {}
    if given.pop("key_mask", False):
        more["key_mask"] = empty(BATCH, TOKENS, dtype=torch.bool)
    if given.pop("sinks", False):
        more["sinks"] = empty(HEADS)
    if mask is not None:
        more["mask"] = empty(1, HEADS, TOKENS, TOKENS, dtype=mask)
    batch, tokens = BATCH, TOKENS
    if given.pop("packed", False):
        batch, tokens = 1, BATCH * TOKENS
        starts = empty(BATCH + 1, dtype=torch.int32)
        more |= {"cu_query": starts, "cu_key": starts}
    query = empty(batch, HEADS, tokens, width)
    key = empty(batch, HEADS // group, tokens, width)
    options = AttentionOptions(
        p=p, scale=width**-0.5, max_query=TOKENS, max_key=TOKENS, **given
    )  # fmt: skip
    seed = empty(2, dtype=torch.int64) if p else None
    inputs = AttentionInputs(query, key, key, seed=seed, **more)
    if not backward:
        return lambda: launch.attention_forward(inputs, options)
    lse = empty(*query.shape[:-1], dtype=torch.float32)
    needs = (True, True, True, False, False)
    return lambda: launch.attention_backward(
        AttentionBackward(query, None, query, lse, *inputs), options, needs
    )


def record(compiled: Compiled, **about) -> dict:
    code = parse(compiled.text)
    products = exposed(code.main)
    return about | {
        "arch": compiled.arch,
        "kernel": compiled.kernel.removeprefix("attention_").removesuffix("_kernel"),
        "tile": [compiled.constants["BLOCKS"].M, compiled.constants["BLOCKS"].N],
        "scores": compiled.tile // compiled.threads,
        "instructions": len(code.main),
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "spilled_in_the_loop": count(code.main, "LDL", "STL"),
        "shared": compiled.shared_bytes,
        "limit": SHARED[compiled.arch],
        "products": products and products._asdict(),
        "loads_pending": pending_loads(code.main),
    }


def records(features: Sequence[str]) -> Iterator[dict]:
    for arch in ARCHS:
        for feature in features:
            for width in WIDTHS:
                # sm_80 is looked at for spills in forward alone, which its own test covers besides
                for backward in (False, True) if arch == "sm_90" else (False,):
                    about = {"feature": feature, "width": width, "p": 0.1}
                    for compiled in capture(arch, call_of(feature, width, 0.1, backward)):
                        if "delta" not in compiled.kernel:
                            yield record(compiled, **about)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    names = [name for name in sys.argv[1:] if name != "table"]
    found = list(records(names or tuple(FEATURES)))
    if "table" not in sys.argv[1:]:
        print(json.dumps(found))
        return
    print(f"Triton {triton.__version__}")
    for r in found:
        products = r["products"] or {"instructions": "", "philox": "", "groups": ""}
        print(
            f"| {r['arch']} {r['kernel']} | {r['feature']} | {r['width']} | "
            f"{r['tile'][0]} x {r['tile'][1]} | {r['instructions'] / r['scores']:.1f} | "
            f"{products['instructions']} | {products['philox']} | {products['groups']} | "
            f"{r['loads_pending']} | {r['registers']} | {r['spill_bytes']} | "
            f"{r['spilled_in_the_loop']} | {r['shared']} |"
        )


if __name__ == "__main__":
    main()
