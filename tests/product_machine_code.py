"""Compile the products with a dropped matrix for GPUs that are not here, and read their code.

Run as a program it prints a list of JSON records, one a kernel.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial

import torch

from tridrop.backends.triton import product_launch as launch
from tridrop.backends.triton.compile import Compiled, capture
from tridrop.commands.inspection.machine_code import count, parse
from tridrop.spec.operands import Product, ProductBackward
from tridrop.spec.product import ProductOptions

RANKS = [(8,), (64,), (256,), (16, 16, 16)]


def record(compiled: Compiled, **about) -> dict:
    body = parse(compiled.text).body
    ops = Counter(i.op.split(".")[0] for i in body)
    return about | {
        "target": compiled.arch,
        "kernel": compiled.kernel,
        "spills": count(body, "LDL", "STL"),
        "products": ops["HMMA"] + ops["HGMMA"],
        "shared": compiled.shared_bytes,
        "tile": compiled.tile,
        "wide_loads": sum(n for op, n in Counter(i.op for i in body).items() if "128" in op),
    }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    records = []
    for target in ("sm_80", "sm_90"):
        for ranks in RANKS:
            for p in (0.0, 0.05):
                options = ProductOptions(p=p, ranks=ranks)
                x, weight, grad = (
                    torch.empty(shape, dtype=torch.bfloat16, device="meta")
                    for shape in ((8192, 4096), (sum(ranks), 4096), (8192, sum(ranks)))
                )
                seeds = torch.empty(len(ranks), 2, dtype=torch.int64, device="meta") if p else None
                operands = (x, weight, seeds)
                given = ProductBackward(grad, *operands)
                for call in (
                    partial(launch.product_forward, Product(*operands), options),
                    partial(launch.product_backward, given, options, (True, True)),
                ):
                    records += [
                        record(c, ranks=ranks, p=p)
                        for c in capture(target, call)
                        if c.kernel != "sum_kernel"  # the last stage, of no product
                    ]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
