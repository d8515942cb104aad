"""Which integers of a kernel's TTIR leave their type on the way to an address.

The text is gone through once, with the interval that each integer lies in: arguments are what the
launch gives, program ids what its grid allows. An operation whose result does not fit its type
wraps, and what is widened afterwards is a wrong number; such a fault travels with the value, and
counts where the value is an offset of ``tt.addptr``, or decides as a mask whether memory is
touched. What wraps on purpose, the words of Philox, comes to neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple


class Value(NamedTuple):
    """An integer, or each of a tensor's: its bounds, and what went wrong on the way."""

    lo: int
    hi: int
    faults: frozenset[str] = frozenset()


LOCATION = re.compile(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)")
FUNCTION = re.compile(r"tt\.func public @\w+\((.*)\) attributes")
ARGUMENT = re.compile(r"(%[\w$.-]+): ([^,{]+?)\s*(?:\{[^}]*\})?\s*(?:,|$)")
FOR = re.compile(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)\s*(?:iter_args\((.*?)\) ->)?")
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
# These pass each number on as it is.
SAME = ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi",
        "ttg.convert_layout", "arith.index_cast")  # fmt: skip
AXES = {"x": 0, "y": 1, "z": 2}


def width(kind: str) -> int | None:
    """Bits of an integer type or a tensor of it; None for floats and pointers."""
    found = re.search(r"(?:^|x)i(\d+)>?$", kind)
    return int(found[1]) if found else None


def whole(bits: int, *faults: str) -> Value:
    """Anything of the type."""
    return Value(0, 1, frozenset(faults)) if bits == 1 else Value(
        -(1 << bits - 1), (1 << bits - 1) - 1, frozenset(faults)
    )  # fmt: skip


class Kernel:
    """The analysis of one kernel, launched once.

    Args:
        text: its TTIR.
        numbers: the numbers among its arguments; those that Triton makes constants, integers equal
            to 1, may be left in.
        grid: its programs along each axis.
        loaded: bounds of the integers that it reads from memory, such as offsets of sequences.
    """

    def __init__(
        self,
        text: str,
        numbers: Sequence[float],
        grid: Sequence[int],
        loaded: tuple[int, int] | None = None,
    ) -> None:
        self.grid, self.loaded = (*grid, 1, 1)[:3], loaded
        self.values: dict[str, Value] = {}
        self.faults: set[str] = set()
        self.addresses = 0
        lines = [LOCATION.sub("", line).strip() for line in text.splitlines()]
        for line in lines:
            if "tt.func" in line:
                self._arguments(line, [n for n in numbers if n != 1 or isinstance(n, float)])
            else:
                self._line(line)

    def _arguments(self, line: str, numbers: list[float]) -> None:
        found = FUNCTION.search(line)
        assert found, line
        scalars = [(n, k) for n, k in ARGUMENT.findall(found[1]) if "ptr" not in k]
        assert len(scalars) == len(numbers), (scalars, numbers)
        for (name, kind), number in zip(scalars, numbers, strict=True):
            if width(kind):
                assert isinstance(number, int), (name, kind, number)
                self.values[name] = Value(number, number)

    def _line(self, line: str) -> None:
        if found := FOR.search(line):
            self._loop(line, found)
            return
        results, _, operation = line.rpartition(" = ") if line.startswith("%") else ("", "", line)
        if " = " in results:  # an attribute, such as {end = 4096 : i32, start = 0 : i32}
            results, _, operation = line.partition(" = ")
        op = operation.split(" ", 1)[0].rstrip("(")
        head, _, kinds = operation.partition(" : ")
        names = NAME.findall(head)
        operands = [self.values[n] for n in names if n in self.values]
        if op == "tt.addptr":
            self.addresses += 1
            self._meet(names[1], operation)
        elif op in ("tt.load", "tt.store") and len(names) > 1:
            last = names[1:] if op == "tt.load" else names[2:]
            for name in last[:1]:  # the mask; a load's third operand is what stands outside it
                self._meet(name, operation)
        if not results:
            return
        kind = kinds.rsplit(" to ", 1)[-1].rsplit(" -> ", 1)[-1].strip()
        if op == "tt.load":
            kind = re.sub(r"!tt\.ptr<(\w+)>", r"\1", kind)
        bits = width(kind.removesuffix("{").strip())
        name = results.strip().split(":")[0]
        if bits is None:
            self.values.pop(name, None)  # one of the same name in another region
            return
        if op == "arith.cmpi":
            self.values[name] = Value(0, 1, self._all(operands))
            return
        self.values[name] = self._fits(self._result(op, operation, operands, bits), bits, operation)

    def _loop(self, line: str, found: re.Match[str]) -> None:
        index, start, stop, _, carried = found.groups()
        low, high = self.values[start], self.values[stop]
        self.values[index] = Value(low.lo, max(low.lo, high.hi - 1), self._all([low, high]))
        results = line.split(" = scf.for")[0] if line.startswith("%") else ""
        # no type has a comma outside its brackets
        kinds = line.rsplit("-> (", 1)[1].split(") : ")[0] if carried else ""
        types = re.findall(r"(?:[^,<>]|<(?:[^<>]|<[^<>]*>)*>)+", kinds)
        names = [pair.split(" = ")[0].strip() for pair in carried.split(", ")] if carried else []
        base = results.split(":")[0]
        for i, (name, kind) in enumerate(zip(names, types, strict=True)):
            outside = base if len(names) == 1 else f"{base}#{i}"
            for n in (name, outside):
                if bits := width(kind):
                    self.values[n] = whole(bits, f"carried by a loop: {name}")
                else:
                    self.values.pop(n, None)

    @staticmethod
    def _all(operands: Sequence[Value]) -> frozenset[str]:
        return frozenset().union(*(v.faults for v in operands))

    def _meet(self, name: str, operation: str) -> None:
        assert name in self.values, f"nothing is known of {name} in {operation}"
        self.faults |= self.values[name].faults

    def _fits(self, value: Value, bits: int, operation: str) -> Value:
        limits = whole(bits)
        if bits == 1 or limits.lo <= value.lo <= value.hi <= limits.hi:
            return value
        fault = f"{operation} reaches {value.lo if value.lo < limits.lo else value.hi}"
        return whole(bits, *value.faults, fault)

    def _result(self, op: str, operation: str, operands: list[Value], bits: int) -> Value:
        faults = self._all(operands)
        a, b = (*operands, *[Value(0, 0)] * 2)[:2]
        corners = list(product((a.lo, a.hi), (b.lo, b.hi)))
        if op == "arith.constant":
            text = re.search(r"(?:dense<)?(-?\d+|true|false)", operation.split("constant ")[1])
            assert text, operation
            n = {"true": 1, "false": 0}.get(text[1])
            n = int(text[1]) if n is None else n
            return Value(n, n)
        if op == "tt.make_range":
            end, start = (re.search(rf"{k} = (\d+)", operation) for k in ("end", "start"))
            assert end, operation
            assert start, operation
            return Value(int(start[1]), int(end[1]) - 1)
        if op == "tt.get_program_id":
            return Value(0, self.grid[AXES[operation.split()[1]]] - 1)
        if op == "tt.get_num_programs":
            n = self.grid[AXES[operation.split()[1]]]
            return Value(n, n)
        if op == "tt.load":
            if self.loaded is None:
                return whole(bits, *faults, f"read from memory: {operation}")
            return Value(*self.loaded, faults)
        if op in SAME or op == "arith.trunci":
            return Value(a.lo, a.hi, faults)
        if op == "arith.addi":
            return Value(a.lo + b.lo, a.hi + b.hi, faults)
        if op == "arith.subi":
            return Value(a.lo - b.hi, a.hi - b.lo, faults)
        if op == "arith.muli":
            found = [x * y for x, y in corners]
            return Value(min(found), max(found), faults)
        if op in ("arith.minsi", "arith.maxsi"):
            choose = min if op == "arith.minsi" else max
            return Value(choose(a.lo, b.lo), choose(a.hi, b.hi), faults)
        if op == "arith.select" and len(operands) == 3:
            return Value(min(v.lo for v in operands[1:]), max(v.hi for v in operands[1:]), faults)
        if op == "arith.divsi" and b.lo > 0:
            found = [abs(x) // y * (1 if x >= 0 else -1) for x, y in corners]
            return Value(min(found), max(found), faults)
        if op == "arith.remsi" and b.lo > 0:
            largest = min(b.hi - 1, max(abs(a.lo), abs(a.hi)))
            return Value(0 if a.lo >= 0 else -largest, largest if a.hi > 0 else 0, faults)
        if op == "arith.extui" and a.lo >= 0:
            return Value(a.lo, a.hi, faults)
        if bits == 1:  # and, or, xor of conditions
            return Value(0, 1, faults)
        return whole(bits, *faults, f"not followed: {operation}")
