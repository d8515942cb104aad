"""The rows that are timed: those of the table of cases, at the sizes of a transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..check import CASES, Case

SOFTMAX, ATTENTION = "softmax_dropout", "scaled_dot_product_attention"
OPS = tuple(dict.fromkeys(case.op for case in CASES if case.at is not None))
# The combinations that models use. --all-rows takes every row that can have other sizes.
USUAL = (
    "dropout: plain",
    "activation_dropout: gelu",
    "activation_dropout: swiglu, bias",
    "dropout_add: plain",
    "dropout_add: bias",
    "dropout_add: bias, layer_scale, drop_path",
    "dropout_add_layer_norm: weight, norm_bias, bias",
    "dropout_add_layer_norm: weight, norm_bias, prenorm, float32 stream",
    "dropout_add_rms_norm: weight, bias",
    "dropout_add_rms_norm: weight, prenorm, float32 stream",
    "layer_norm_dropout: weight, norm_bias, no residual",
    "rms_norm_dropout: weight, no residual",
    "softmax_dropout: plain",
    "softmax_dropout: causal",
    "scaled_dot_product_attention: plain",
    "scaled_dot_product_attention: causal",
)
# With more scores than this, only one head of one sequence is compared in fp64.
MOST_SCORES = 2**24


@dataclass(frozen=True)
class Attention:
    """The sizes of attention: lengths and head dimensions, for fixed tokens and features."""

    tokens: int
    width: int
    lengths: Sequence[int]
    head_dims: Sequence[int]

    def shapes(self) -> list[tuple[int, ...]]:
        """[B, H, S, D] for each length and head dimension."""
        for name, given, whole in (
            ("length", self.lengths, self.tokens),
            ("head dimension", self.head_dims, self.width),
        ):
            for n in given:
                if not 1 <= n <= whole:
                    raise ValueError(f"{name} {n}: give one from 1 to {whole}")
        return [
            (self.tokens // length, self.width // dim, length, dim)
            for length in self.lengths
            for dim in self.head_dims
        ]


@dataclass(frozen=True)
class Row:
    """A row of the table at a size; ``shape`` is the shape of the result."""

    case: Case
    shape: tuple[int, ...]

    @property
    def op(self) -> str:
        """The public function."""
        return self.case.op

    @property
    def label(self) -> str:
        """The row's name without its shape."""
        return label(self.case)

    def sized(self, p: float) -> Case:
        """The case that is timed."""
        return self._at(self.shape, p, apart=True)

    def checked(self, p: float) -> Case:
        """The case whose values are compared: with one head, if all would be too large in fp64."""
        shape, case = self.shape, self._at(self.shape, p)
        if case.mask_over is not None and math.prod(case.mask_shape) > MOST_SCORES:
            shape = (*(1 for _ in shape[:-2]), *shape[-2:])
        return self._at(shape, p)

    def tiny(self, p: float) -> Case:
        """The case at [8, 64], whose time is the host's alone."""
        return self._at((1, 1, 8, 64) if self.op == ATTENTION else (1, 8, 64), p, apart=True)

    def _at(self, shape: tuple[int, ...], p: float, apart: bool = False) -> Case:
        assert self.case.at is not None
        return self.case.at(shape, p, apart=apart)

    @property
    def flops(self) -> float:
        """FLOPs of attention's forward: 4 B H S^2 D, or half of that if causal. 0 for other ops."""
        if self.op != ATTENTION:
            return 0.0
        batch, heads, length, width = self.shape
        return 4.0 * batch * heads * length**2 * width * (0.5 if "causal" in self.label else 1.0)


def label(case: Case) -> str:
    """The name of a case without its shape."""
    return case.name.split(" [")[0]


def parse_size(text: str) -> tuple[int, int]:
    """ROWSxCOLS as two numbers; raises ValueError for any other text."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"size {text!r}: give ROWSxCOLS, such as 8192x4096")
    return int(parts[0]), int(parts[1])


def shape_of(op: str, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape [samples, tokens, columns] for a size; scores become square, if possible."""
    rows, columns = size
    if op == SOFTMAX:
        queries = columns if rows % columns == 0 else rows
        return rows // queries, queries, columns
    samples = math.gcd(rows, 8)
    return samples, rows // samples, columns


def table(
    ops: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    attention: Attention,
    *,
    every: bool = False,
    first: bool = False,
) -> list[Row]:
    """The rows of the ops at the sizes: first all rows at the first size, and so on.

    Args:
        ops: names of public functions.
        sizes: (rows, columns) for all ops except attention.
        attention: the sizes of attention.
        every: take all rows of the table, not only the usual ones.
        first: take one row per op.
    """
    found: dict[str, Case] = {}
    for case in CASES:
        name = label(case)
        if case.op in ops and case.at is not None and (every or name in USUAL):
            found.setdefault(name, case)
    if first:
        found = {label(case): case for case in {c.op: c for c in reversed(found.values())}.values()}
    placed = [
        (at, Row(case, shape))
        for op in ops
        for case in found.values()
        if case.op == op
        for at, shape in enumerate(
            attention.shapes() if op == ATTENTION else [shape_of(op, size) for size in sizes]
        )
    ]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
