"""The elementwise family on a CPU: one compiled loop each for forward and backward.

The formulas and the rounding are those of the reference, to which calls go that the loops do not
serve: fp64, a ``p`` in a tensor, alpha and Gaussian noise, gates. What does not depend on data is
prepared once per shape and set of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.memory import Facts
from ...spec.elementwise import Options, check_functions
from ...spec.operands import Elementwise, ElementwiseBackward, Operands, checked
from ..reference import elementwise
from .memory import NONE, NUMBERS, SEED, Operand, Reads, blanks, result, vectors
from .selection import ABSENT, Selection, Sum, selection_of, serves

_NO_SUMS = (1, 1, (ABSENT, ABSENT))  # see loops/kernels.py's summing_kernel
_NOTHING = elementwise.Multiplier(None, 1.0)  # drops nothing


class PreparedElementwise(NamedTuple):
    """The elementwise family, for calls whose results have one shape."""

    drop: Selection
    options: Options
    function: elementwise.Function
    # The loops' forms of f (activations.Form). ``full`` has full precision; ``short`` serves
    # results of 16 bits, and is the same object where f has one form alone.
    full: Any
    short: Any
    gated: bool
    # How results are made: of the shape of out, and of the shape of x, which is twice as wide where
    # f is gated; and what the loops read, the seed first.
    like_out: dict[torch.dtype, Tensor]
    like_x: dict[torch.dtype, Tensor]
    forward_reads: Reads
    backward_reads: Reads
    sizes: tuple[int, int]  # the columns of x and of the result

    def forward(self, operands: Elementwise) -> Tensor:
        """The op."""
        x, bias, layer_scale, residual, seed, _ = operands
        if not self.drop.drops and self._is_torchs(x, bias, layer_scale, residual):
            whole = checked(operands)
            found = elementwise.compose(whole, _NOTHING, self.options, False)
            return found.clone() if found is whole.x else found
        reads = self.forward_reads
        bias, layer_scale = vectors(bias, layer_scale, reads)
        dtype = x.dtype if residual is None else residual.dtype
        out, o = result(self.like_out[dtype])
        tensors = (seed, x, bias, layer_scale, residual)
        self.drop.call("forward", tensors, reads, out, o, self._form(dtype))
        return out

    def backward(
        self, operands: ElementwiseBackward, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and layer_scale."""
        grad, x, bias, layer_scale, seed, _ = operands
        if not self.drop.drops and not self.gated and layer_scale is None:
            if self.function.steps == 0 and dtypes == (grad.dtype, None, None):
                return grad, None, None
            backward = self.function.backward
            by_torch = x is not None and x.dtype == grad.dtype and self._is_torchs(x, bias)
            if x is not None and by_torch and backward is not None:
                saved = self.backward_reads.as_saved((seed, grad, x, bias, layer_scale))
                whole = checked(operands._replace(x=saved[2], bias=saved[3]))
                assert whole.x is not None
                biased = whole.x if whole.bias is None else whole.x + whole.bias
                found = backward(whole.grad, biased)
                dbias = None if dtypes[1] is None else elementwise.sum_rows(found)
                return (None if dtypes[0] is None else found), dbias, None
        dx, at = None, NONE
        if dtypes[0] is not None:
            dx, at = result(self.like_x[dtypes[0]])
        reads = self.backward_reads
        bias, layer_scale = vectors(bias, layer_scale, reads)
        tensors = (seed, grad, x, bias, layer_scale)
        form = self._form(*dtypes)
        if dtypes[1] is None and dtypes[2] is None:
            self.drop.call("backward", tensors, reads, dx, at, form, _NO_SUMS)
            return dx, None, None
        sums = tuple(map(Sum, self.sizes, dtypes[1:]))
        dbias, dlayer_scale = self.drop.sum("backward", tensors, reads, sums, dx, at, form)
        return dx, dbias, dlayer_scale

    def held_to(self, saved: tuple[Facts, ...]) -> tuple[PreparedElementwise, tuple[Facts, ...]]:
        """See :class:`tridrop.spec.operands.Prepared`."""
        reads, others = self.backward_reads.held_to(saved)
        return self._replace(backward_reads=reads), others

    def _form(self, *dtypes: torch.dtype | None) -> tuple[int, bool]:
        """The address of f's loops for results of these dtypes, and whether f is gated.

        Loops of the short form serve if all results are rounded to 16 bits.
        """
        full = self.short is self.full or torch.float32 in dtypes
        return (self.full if full else self.short).address, self.gated

    def _is_torchs(self, x: Tensor, *others: Tensor | None) -> bool:
        return elementwise.is_torchs(self.function, self.options.gated, x, *others)


@lru_cache(256)
def _prepare(shape: tuple[int, ...], options: Options) -> PreparedElementwise:
    drop = selection_of(shape, options)
    check_functions(drop.loops.functions, "backends/cpu/loops/activations.FUNCTIONS")
    full, short = drop.loops.functions[options.function]
    columns, count = drop.where.cols, drop.count
    halves = 2 if options.gated else 1
    x, grad = Operand("x", halves * count), Operand("grad", count)
    bias = Operand("bias", halves * columns, NUMBERS)
    layer_scale = Operand("layer_scale", columns, NUMBERS)
    like_out = blanks(shape)
    return PreparedElementwise(
        drop, options, elementwise.FUNCTIONS[options.function], full, short, options.gated,
        like_out, blanks((*shape[:-1], 2 * shape[-1])) if options.gated else like_out,
        Reads.of(SEED, x, bias, layer_scale, Operand("residual", count)),
        Reads.of(SEED, grad, x, bias, layer_scale),
        (halves * columns, columns),
    )  # fmt: skip


def prepare(
    shape: tuple[int, ...], options: Options, operands: Operands, wanted: Sequence[Any]
) -> PreparedElementwise | None:
    """Both directions for calls with such operands and results of ``shape``; None if not served."""
    return _prepare(shape, options) if serves(shape, options, operands, wanted) else None
