"""Compile the kernels for GPUs that are not here and read the machine code.

Run as a program it prints a list of JSON records. It compiles through the package's own launchers:
what is inspected is what a launch would run, for the same sizes, strides and settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter

import torch

from tridrop.backends.triton import elementwise, norm_launch, softmax_launch
from tridrop.backends.triton.compile import capture
from tridrop.commands.inspection import ARCHS
from tridrop.commands.inspection.machine_code import parse
from tridrop.spec.attention import SoftmaxOptions
from tridrop.spec.elementwise import NormOptions, Options
from tridrop.spec.operands import (
    Elementwise,
    ElementwiseBackward,
    Norm,
    NormBackward,
    Softmax,
    SoftmaxBackward,
)


def inspect(name: str, target: str, launcher: str, kernel: str, *args) -> dict:
    """The record of one kernel compiled for one target."""
    modules = {"norm": norm_launch, "softmax": softmax_launch}
    module = modules.get(kernel.split("_")[0], elementwise)
    found = capture(target, lambda: getattr(module, launcher)(*args))
    assert {c.kernel for c in found} <= {kernel, "sum_kernel"}
    compiled = found[0]
    code = parse(compiled.text)
    elements = compiled.tile / compiled.threads
    record = {"name": name, "target": target, "shared": compiled.shared_bytes}
    ops = Counter(i.op for i in code.body)
    # Bytes of the stack, or of vector registers; scalar ones spill to lanes of vector registers.
    spills = code.spill_bytes + sum(n for op, n in ops.items() if op.startswith(("LDL", "STL")))
    record |= {"spills": spills, "registers": code.registers}
    if code.amd:
        return record
    return record | {
        "per_element": len(code.body) / elements,
        "loads": sorted(op for op in ops if op.startswith("LDG")),
        "stores": sorted(op for op in ops if op.startswith("STG")),
        "elements_a_thread": elements,
        "philox_products": sum(n for op, n in ops.items() if op.startswith("IMAD.WIDE.U32"))
        + ops["IMAD.HI.U32"],
    }


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(dtype: torch.dtype) -> dict[str, tuple]:
    """name -> launcher, kernel and the launcher's arguments."""
    x, vector = empty(8192, 1024, dtype=dtype), empty(1024, dtype=dtype)
    wide, wide_vector = empty(8192, 2048, dtype=dtype), empty(2048, dtype=dtype)
    seed = empty(2, dtype=torch.int64)
    drop, plain = {"p": 0.1}, {}

    def forward(options, x=x, bias=None, gain=None, residual=None):
        needed = seed if options.p or options.drop_path else None
        operands = Elementwise(x, bias, gain, residual, needed)
        return "forward", "forward_kernel", operands, options

    def backward(options, x=None, bias=None, gain=None, sums=(False, False), grad=x):
        needed = seed if options.p or options.drop_path else None
        dtypes = (dtype, *(dtype if s else None for s in sums))
        operands = ElementwiseBackward(grad, x, bias, gain, needed)
        return "backward", "backward_kernel", operands, options, dtypes

    tokens, gates = empty(8, 1024, 1024, dtype=dtype), empty(8, 1024, dtype=dtype)
    odd = {n: empty(8190, n, dtype=dtype) for n in (768, 1000, 1001)}
    return {
        "add": forward(Options(**plain), residual=x),
        "dropout_add": forward(Options(**drop), residual=x),
        "dropout_add backward": backward(Options(**drop)),
        "dropout_add 768": forward(Options(**drop), odd[768], residual=odd[768]),
        "dropout_add 1000": forward(Options(**drop), odd[1000], residual=odd[1000]),
        "dropout_add 1001": forward(Options(**drop), odd[1001], residual=odd[1001]),
        "everything": forward(Options("gelu", **drop, drop_path=0.1), x, vector, vector, x),
        "everything backward": backward(
            Options("gelu", **drop, drop_path=0.1), x, vector, vector, (True, True)
        ),
        "gate": forward(Options(**drop), tokens, None, gates, tokens),
        "gate backward": backward(
            Options(**drop), tokens, None, gates, (False, True), grad=tokens
        ),
        "bias backward": backward(Options(**drop), bias=vector, sums=(True, False)),
        "swiglu": forward(Options("swiglu", **drop), wide, wide_vector),
        "swiglu backward": backward(
            Options("swiglu", **drop), wide, wide_vector, sums=(True, False)
        ),
        "keep_mask": (
            "keep_mask", "keep_mask_kernel", seed, (8192, 1024), None, Options(**drop), "elements",
        ),
    }  # fmt: skip


NORM_SIZES = (768, 1000, 1024, 4096, 8192)


def norm_cases(dtype: torch.dtype) -> dict[str, tuple]:
    """The norm family, with every operand, at hidden sizes of real models."""
    seed = empty(2, dtype=torch.int64)
    cases: dict[str, tuple] = {}
    for size in NORM_SIZES:
        x, vector = empty(4096, size, dtype=dtype), empty(size, dtype=dtype)
        stats = empty(4096, 2, dtype=torch.float32)
        for kind in ("layer_norm", "rms_norm"):
            shared = {"p": 0.1, "norm": kind, "stream_dtype": dtype, "out_dtype": dtype}
            before, after = NormOptions(**shared), NormOptions(**shared, after=True)
            nb = vector if kind == "layer_norm" else None
            last = dtype if kind == "layer_norm" else None
            every = (dtype, dtype, dtype, dtype, dtype, last)
            cases |= {
                f"{kind} {size}": (
                    "norm_forward",
                    "norm_forward_kernel",
                    Norm(x, vector, vector, x, vector, nb, seed),
                    before,
                ),
                f"{kind} backward {size}": (
                    "norm_backward",
                    "norm_backward_kernel",
                    NormBackward(x, x, x, stats, x, vector, vector, vector, seed),
                    before,
                    every,
                ),
                f"{kind} after {size}": (
                    "norm_forward",
                    "norm_forward_kernel",
                    Norm(x, None, None, x, vector, nb, seed),
                    after,
                ),
                f"{kind} after backward {size}": (
                    "norm_backward",
                    "norm_backward_kernel",
                    NormBackward(x, None, x, stats, weight=vector, seed=seed),
                    after,
                    (dtype, None, None, None, dtype, last),
                ),
            }
    return cases


SOFTMAX_KEYS = (128, 512, 1001, 1024, 4096, 65536)


def softmax_cases(dtype: torch.dtype) -> dict[str, tuple]:
    """The softmax, by itself and with every operand."""
    seed = empty(2, dtype=torch.int64)

    def pair(name, keys, options, mask=None, both=False):
        scores = empty(2, 4, 64, keys, dtype=dtype)
        needed = seed if options.p else None
        kernels = [f"softmax_{way}_kernel" for way in ("forward", "backward")]
        options = dataclasses.replace(options, return_softmax=both)
        lse, second = empty(2, 4, 64, dtype=torch.float32), scores if both else None
        forward = Softmax(scores, mask, needed)
        backward = SoftmaxBackward(scores, second, scores, mask, lse, needed)
        dtypes = (dtype, None if mask is None else mask.dtype)
        return {
            f"softmax {name}": ("softmax_forward", kernels[0], forward, options),
            f"softmax backward {name}": (
                "softmax_backward", kernels[1], backward, options, dtypes,
            ),
        }  # fmt: skip

    drop = SoftmaxOptions(p=0.1)
    cases = pair("1024 without dropout", 1024, SoftmaxOptions())
    for keys in SOFTMAX_KEYS:
        cases |= pair(str(keys), keys, drop)
    for keys in (1000, 16384):
        mask = empty(1, 4, 64, keys, dtype=torch.float32)
        cases |= pair(f"everything {keys}", keys, SoftmaxOptions(p=0.1, upper=0), mask, True)
    return cases


def all_cases(dtype: torch.dtype) -> dict[str, tuple]:
    return cases(dtype) | norm_cases(dtype) | softmax_cases(dtype)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    records = [
        inspect(name, target, *case)
        for target in sys.argv[1:] or ARCHS
        for name, case in all_cases(torch.bfloat16).items()
        # the many sizes of norms and the softmax on two targets or one, one size on the others
        if name.split()[0] not in ("layer_norm", "rms_norm", "softmax")
        or target == "sm_90"
        or (target == "sm_80" and "norm" in name)
        or name.endswith("1024")
    ]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
