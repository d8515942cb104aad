"""The shared memory of attention's kernels on GPUs that are not here, for all it is asked for.

Run as a program it prints a list of JSON records, one a kernel and call:

    python tests/attention_shared.py [ARCHS [DTYPES [WIDTHS [KINDS [PRECISIONS]]]]] [-- ARCHS ...]

Names are separated by commas, all of them are meant where none is given, and "--" begins another
list of calls; a call that several lists ask for is compiled once. Shared memory is laid out behind
the stage "ttgir", before LLVM, which would take most of the time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product, zip_longest
from pathlib import Path

import torch
from triton._C.libtriton import ir, nvidia, passes
from triton.compiler.compiler import make_backend

from tridrop.backends.triton import attention_launch as launch
from tridrop.backends.triton.compile import SHARED, TARGETS, Compiled, capture
from tridrop.spec.attention import AttentionInputs, AttentionOptions
from tridrop.spec.operands import AttentionBackward

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (16, 32, 64, 128, 256)
LENGTH = 4096


def empty(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shared_bytes(compiled: Compiled) -> int:
    """What a program of the kernel takes; ``compiled`` until "ttgir"."""
    target = TARGETS[compiled.arch]
    context = ir.context()
    ir.load_dialects(context)
    make_backend(target).load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttgir")
        path.write_text(compiled.text)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    if target.backend == "cuda":
        # The version of PTX: the layout does not ask for it.
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, 80)
    else:
        from triton._C.libtriton import amd

        amd.passes.ttgpuir.add_allocate_shared_memory(manager)
    manager.run(module, "shared memory")
    return int(module.get_int_attr("ttg.shared"))


OPTIONS = AttentionOptions(p=0.1, scale=0.125, max_query=LENGTH, max_key=LENGTH)
# What the rows of tridrop.commands.check.attention_cases have: masks, bounds, softcap and sinks.
KINDS = {
    "plain": {},
    "bool mask": {"mask": empty(2, 1, 1, LENGTH)},
    "own bool mask": {"mask": empty(2, 4, LENGTH, LENGTH)},
    "float mask": {"mask": torch.float32},
    "float mask of the dtype": {"mask": None},
    "shared float mask": {"mask": torch.float32, "shape": (2, 1, 1, LENGTH)},
    "causal": {"options": replace(OPTIONS, upper=0)},
    "window": {"options": replace(OPTIONS, lower=-7, upper=3)},
    "key mask, sinks, softcap": {
        "key_mask": empty(2, LENGTH),
        "sinks": empty(4, dtype=torch.float32),
        "options": replace(OPTIONS, softcap=1.5),
    },
    "without dropout": {"options": replace(OPTIONS, p=0.0)},
    "shard": {"options": replace(OPTIONS, origin=(0, 0, 0, 5))},
}


def records(arch: str, dtype: str, width: int, kind: str, precision: str) -> Iterator[dict]:
    torch.set_float32_matmul_precision(precision)
    given, own = dict(KINDS[kind]), DTYPES[dtype]
    query, key = empty(2, 4, LENGTH, width, dtype=own), empty(2, 2, LENGTH, width, dtype=own)
    options, mask = given.get("options", OPTIONS), given.get("mask")
    if "mask" in given and not isinstance(mask, torch.Tensor):
        mask = empty(*given.get("shape", (2, 4, LENGTH, LENGTH)), dtype=mask or own)
    seed = empty(2, dtype=torch.int64) if options.p else None
    inputs = AttentionInputs(
        query, key, key, mask, given.get("key_mask"), given.get("sinks"), seed=seed
    )
    lse = empty(*query.shape[:-1], dtype=torch.float32)
    learned = mask is not None and mask.dtype != torch.bool
    needs = (True, True, True, learned, "sinks" in given)

    def call() -> None:
        launch.attention_forward(inputs, options)
        launch.attention_backward(
            AttentionBackward(query, None, query, lse, *inputs), options, needs
        )

    for compiled in capture(arch, call, "ttgir"):
        yield {
            "arch": arch, "dtype": dtype, "width": width, "kind": kind, "precision": precision,
            "kernel": compiled.kernel, "shared": shared_bytes(compiled), "limit": SHARED[arch],
        }  # fmt: skip


def groups(arguments: list[str]) -> Iterator[list[str]]:
    """The lists between the "--"."""
    while "--" in arguments:
        at = arguments.index("--")
        yield arguments[:at]
        arguments = arguments[at + 1 :]
    yield arguments


def calls_of(given: list[str]) -> Iterator[tuple[str, ...]]:
    """Every arch, dtype, width, kind and precision of one list."""
    every = (("sm_86", "sm_89"), DTYPES, map(str, WIDTHS), KINDS, ("highest",))
    return product(
        *(
            text.split(",") if text else list(default)
            for text, default in zip_longest(given, every, fillvalue="")
        )
    )


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    calls = dict.fromkeys(call for given in groups(sys.argv[1:]) for call in calls_of(given))
    found = [
        record
        for arch, dtype, width, kind, precision in calls
        for record in records(arch, dtype, int(width), kind, precision)
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
