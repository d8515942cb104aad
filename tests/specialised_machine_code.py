"""Compile the specialised forward of attention for Hopper, and read what each group of warps does.

Run as a program, with TRIDROP_WARP_SPECIALIZE=1, it prints a list of JSON records, one a kernel;
with the argument "table" a line for each, as in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator

import torch
import triton

from tridrop.backends.triton import attention_launch as launch
from tridrop.backends.triton.compile import SHARED, capture
from tridrop.commands.inspection.machine_code import Body, count, parse, philox_products
from tridrop.spec.attention import AttentionInputs, AttentionOptions

TOKENS, WIDTHS, RATES = 4096, (64, 128), (0.0, 0.1)
FEATURES = ("dense", "dense, odd length", "causal, grouped heads")
EVERY = os.environ.get("TRIDROP_FEATURES") == "all"  # what takes a minute more to compile
if EVERY:
    FEATURES += ("causal", "p on the device")
ARCH = "sm_90"


def call_of(feature: str, width: int, p: float, dtype: torch.dtype):
    """A call of the launcher."""
    tokens = TOKENS + 5 * ("odd" in feature)
    heads = 4 if "grouped" in feature else 16
    query, key = (torch.empty(4, n, tokens, width, dtype=dtype, device="meta") for n in (16, heads))
    options = AttentionOptions(
        p=p, scale=width**-0.5, upper=0 if "causal" in feature else None,
        max_query=tokens, max_key=tokens,
    )  # fmt: skip
    more = {}
    if "device" in feature:
        more["p"] = torch.empty((), dtype=torch.float64, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta") if p else None
    inputs = AttentionInputs(query, key, key, seed=seed, **more)
    return lambda: launch.attention_forward(inputs, options)


def copies(text: str) -> list[list[str]]:
    """For each copy of rows to shared memory, the sizes of its descriptor and of its memory."""
    lines = re.findall(r"async_tma_copy_global_to_local [^\n]*", text)
    pattern = r"tensordesc<(?:tensor<)?(\d+x\d+)x.*?-> !ttg\.memdesc<(\d+x\d+)x"
    return [list(m.groups()) for line in lines if (m := re.search(pattern, line))]


def ranges(text: str) -> list[list[list[int]]]:
    """For each group that computes, the ranges of indices that it makes: [start, end]."""
    found = []
    for part in re.split(r"\n *partition\d+\(", text)[1:]:
        lines = re.findall(r"tt\.make_range \{[^}]*\bend = (\d+)[^}]*\bstart = (\d+)", part)
        found.append(sorted([int(start), int(end)] for end, start in set(lines)))
    return found


def group_of(body: Body) -> dict[str, int]:
    """What a loop of one group of warps does in a turn."""
    products = [i for i in body if i.op.startswith("HGMMA")]
    return {
        "instructions": len(body),
        "products": sum("gsb0" in i.operands for i in products),
        "rows": min((int(i.op.split(".")[1].split("x")[0]) for i in products), default=0),
        "philox": len(philox_products(body)),
        "loads": count(body, "UTMALDG"),
        "spills": count(body, "LDL", "STL"),
    }


def record(feature: str, width: int, p: float, dtype: torch.dtype) -> dict:
    call = call_of(feature, width, p, dtype)
    (compiled,) = capture(ARCH, call)
    (middle,) = capture(ARCH, call, "ttgir")
    code = parse(compiled.text)
    registers = [i.operands.split()[-1] for i in code.body if i.op.startswith("USETMAXREG")]
    # Warps without work wait in a loop around everything, in which they take and give registers.
    groups = [group_of(body) for body in code.loops if not count(body, "USETMAXREG")]
    return {
        "feature": feature,
        "width": width,
        "p": p,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": compiled.threads,
        "bounds": compiled.constants["BLOCKS"].SPECIAL,
        "registers": sorted({int(n, 16) for n in registers}),
        "spill_bytes": code.spill_bytes,
        "shared": compiled.shared_bytes,
        "limit": SHARED[ARCH],
        "groups": [g for g in groups if g["products"] or g["loads"]],
        "copies": copies(middle.text),
        "ranges": ranges(middle.text),
    }


def records() -> Iterator[dict]:
    for feature in FEATURES:
        for width in WIDTHS:
            for p in RATES:
                if p or feature in ("dense", "causal"):
                    yield record(feature, width, p, torch.bfloat16)
    if EVERY:
        yield record("dense", 128, 0.1, torch.float16)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if sys.argv[1:] != ["table"]:
        print(json.dumps(list(records())))
        return
    print(f"Triton {triton.__version__}")
    for r in records():
        groups = "; ".join(
            f"{g['instructions']}: {g['products']} products, {g['philox']} of Philox, "
            f"{g['loads']} loads"
            for g in r["groups"]
        )
        print(
            f"| {r['feature']} | {r['width']} | {r['p']} | {groups} | {r['registers']} | "
            f"{r['spill_bytes']} | {r['shared']} |"
        )


if __name__ == "__main__":
    main()
