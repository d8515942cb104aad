"""Reads machine code: NVIDIA's SASS as printed by cuobjdump, and AMD's assembly.

Everything here is a function of text. Counts are static: an instruction counts once, even if a
branch may skip it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...contract.mask import PHILOX_M0, PHILOX_M1

MULTIPLIERS = (PHILOX_M0, PHILOX_M1)
# A loop that only waits for a barrier has a handful of instructions; one that computes has more.
SHORTEST_LOOP = 30

# NVIDIA: by the pipelines in Nsight Compute's profiling guide. IMAD in all its forms, which include
# moves and shifts, goes to the multiplier; logic, shifts, additions, comparisons,
# selections and the packing of bf16 and fp16 to the ALU; exponentials and roots to the special
# function unit.
SASS_UNITS = {
    "multiply": ("IMAD", "IDP"),
    "logic": (
        "LOP3", "PLOP3", "SHF", "IADD3", "IADD", "VIADD", "ISETP", "IMNMX", "VIMNMX", "IABS",
        "LEA", "PRMT", "SEL", "FSEL", "FSETP", "FMNMX", "F2FP", "BMSK", "SGXT",
    ),
    "special": ("MUFU",),
}  # fmt: skip
# AMD: all of these are vector instructions, which share one pipeline ("vector").
AMD_MULTIPLY = ("v_mul_lo_u32", "v_mul_hi_u32", "v_mul_hi_i32", "v_mad_u64_u32", "v_mad_i64_i32")
AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
# HMMA, HGMMA, UTCHMMA, v_mfma
MATRIX = ("MMA", "MFMA")
# Instructions that compute nothing: padding, and waiting for memory.
EMPTY = ("NOP", "s_nop", "s_waitcnt", "s_endpgm", "s_code_end")


class Instruction(NamedTuple):
    op: str
    operands: str


Body = Sequence[Instruction]


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    body: Body
    """all instructions"""
    loops: Sequence[Body]
    """the loops, in order; inner loops come before the loops around them"""
    registers: int
    """vector registers per thread"""
    spill_bytes: int
    """bytes per thread of registers that are spilled to memory"""
    amd: bool = False

    @property
    def main(self) -> Body:
        """The code that an element passes most often: the shortest loop, or all code without loops.

        If a loop exists twice, with and without comparisons of bounds, this is the one without. If
        there are matrix products, it is a loop that contains some.
        """
        loops = [
            body for body in self.loops if any(m in i.op.upper() for i in body for m in MATRIX)
        ]
        return min(loops or self.loops or [self.body], key=len)


def parse(text: str) -> Code:
    """The code in the output of cuobjdump or of AMD's compiler."""
    return _amd(text) if ".amdgcn_target" in text else _sass(text)


def _sass(text: str) -> Code:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);"
    found = [(int(at, 16), op, rest.strip()) for at, op, rest in re.findall(pattern, text)]
    lines = [(at, Instruction(op, rest)) for at, op, rest in found]
    loops: list[Body] = []
    for at, (op, rest) in lines:
        to = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if to and int(to[1], 16) < at:
            between = [i for a, i in lines if int(to[1], 16) <= a <= at]
            # Code behind the end of the program is a wait that jumps back, and no loop.
            if all(i.op != "EXIT" for i in between):
                loops.append(_solid(between))
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    if not lines or registers is None or stack is None:
        raise ValueError("this is not the output of cuobjdump -sass -res-usage")
    # The kernels have no arrays, so that only spilled registers are on the stack.
    body = _solid([i for _, i in lines])
    return Code(body, _long(loops), int(registers[1]), int(stack[1]))


def _amd(text: str) -> Code:
    body: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[Body] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            if label[1].startswith(".Lfunc_end"):
                break
            labels[label[1]] = len(body)
        elif found := re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)", line):
            body.append(Instruction(found[1], found[2].strip()))
            to = labels.get(found[2].strip()) if "branch" in found[1] else None
            if to is not None and all(i.op != "s_endpgm" for i in body[to:]):
                loops.append(_solid(body[to:]))
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    if not body or registers is None or spills is None:
        raise ValueError("this is not the assembly of an AMD kernel")
    # Scalar registers spill to lanes of vector registers, not to memory.
    return Code(_solid(body), _long(loops), int(registers[1]), 4 * int(spills[1]), amd=True)


def _solid(body: Body) -> Body:
    return [i for i in body if not i.op.startswith(EMPTY)]


def _long(loops: Sequence[Body]) -> Sequence[Body]:
    return [body for body in loops if len(body) > SHORTEST_LOOP]


def count(body: Body, *prefixes: str) -> int:
    """How many opcodes begin with one of these prefixes."""
    return sum(i.op.startswith(prefixes) for i in body)


def units(body: Body, amd: bool) -> dict[str, int]:
    """The number of instructions for each unit; "issue" counts those that take an issue slot."""
    if amd:
        # Scalar, memory and matrix instructions are issued in parallel with vector instructions.
        vector = [i for i in body if i.op.startswith("v_") and not i.op.startswith("v_mfma")]
        return {
            "issue": len(vector),
            "multiply": count(vector, *AMD_MULTIPLY),
            "special": count(vector, *AMD_SPECIAL),
        }
    found = dict.fromkeys(SASS_UNITS, 0)
    for instruction in body:
        for name, opcodes in SASS_UNITS.items():
            found[name] += instruction.op.split(".")[0] in opcodes
    return {"issue": len(body), **found}


def widths(body: Body, what: str, amd: bool) -> dict[str, int]:
    """The widths in bits of a thread's "load" or "store" instructions in global memory."""
    if amd:
        pattern = rf"(?:global|buffer|flat)_{what}_(\w+)"
        found = [m[1] for i in body if (m := re.match(pattern, i.op))]
        names = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16}
        bits = [
            next((n for k, n in names.items() if k in f), 16 if "16" in f else 8) for f in found
        ]
    else:
        prefix = ("LDG",) if what == "load" else ("STG",)
        found = [i.op for i in body if i.op.startswith(prefix)]
        bits = [_bits(op) for op in found]
    return {str(n): k for n, k in sorted(Counter(bits).items(), reverse=True)}


def _bits(op: str) -> int:
    for part in op.split(".")[1:]:
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32


def philox_rounds(code: Code) -> float:
    """The number of Philox rounds in the main part. A round has two products with a high word.

    They are recognised by Philox's two multipliers. Rounds that a thread computes for several
    elements at once count once, and so do rounds that the compiler shares between two calls.
    """
    products = set(map(id, _amd_products(code.body) if code.amd else philox_products(code.body)))
    return sum(id(i) in products for i in code.main) / 2


class Exposed(NamedTuple):
    """What a loop computes while no matrix product is running."""

    instructions: int
    philox: int
    """the products of Philox among them"""
    groups: int
    """groups of products that are waited for together; at least one per product in the source"""


def exposed(body: Body) -> Exposed | None:
    """For one iteration of a loop with asynchronous products (HGMMA, sm_90), else None.

    It counts from each wait for all running products to the next product. In the forward of
    attention this is one stretch, from the wait for the scores to the first product of
    probabilities and values.
    """
    groups = sum(i.op.startswith("HGMMA") and "gsb0" in i.operands for i in body)
    if not groups:
        return None
    philox = set(map(id, philox_products(body)))
    idle = False
    found: list[Instruction] = []
    # Twice, since products may be running from the iteration before.
    for _ in range(2):
        found = []
        for i in body:
            if i.op.startswith("HGMMA"):
                idle = False
            if idle:
                found.append(i)
            # `gsb0, 0x1` waits for all but the last group.
            if i.op == "WARPGROUP.DEPBAR.LE" and i.operands.endswith(" 0x0"):
                idle = True
    return Exposed(len(found), sum(id(i) in philox for i in found), groups)


def pending_loads(body: Body) -> int | None:
    """The groups of asynchronous copies that keep running while an iteration waits for its own.

    0 means that it waits for all copies; None, that the loop has no such copies (or is AMD's).
    """
    if not count(body, "LDGDEPBAR"):
        return None
    waits = [int(i.operands.split()[-1], 16) for i in body if i.op == "DEPBAR.LE"]
    return min(waits, default=None)


def philox_products(body: Body) -> list[Instruction]:
    """NVIDIA's products with Philox's two multipliers that have a high word: two in a round."""
    # cuobjdump prints a constant with its sign.
    spelled = {s for m in MULTIPLIERS for s in (f"{m:#x}", f"-{(1 << 32) - m:#x}")}
    wide = [i for i in body if i.op.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32"))]
    return [i for i in wide if not spelled.isdisjoint(re.split(r"[,\s]+", i.operands))]


def _amd_products(body: Body) -> list[Instruction]:
    # A vector product takes its constant from a scalar register.
    holders: set[str] = set()
    found = []
    for i in body:
        parts = re.split(r"[,\s]+", i.operands)
        if i.op.startswith(("v_mad_u64_u32", "v_mul_hi_u32")):
            if not holders.isdisjoint(parts[1:]):
                found.append(i)
        elif i.op == "s_mov_b32":
            holders.discard(parts[0])
            if parts[1] in {f"{m:#x}" for m in MULTIPLIERS}:
                holders.add(parts[0])
    return found
