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

from ...base.memory import place
from ...spec.elementwise import Options, check_functions
from ...spec.operands import Elementwise, ElementwiseBackward, Operands, checked
from ..reference import elementwise
from .memory import NONE, result, vector
from .selection import Selection, Sum, selection_of, serves

_NO_SUMS = (1, 0, 0)  # rows of a part, and the addresses of two absent sums
_NOTHING = elementwise.Multiplier(None, 1.0)  # drops nothing


class PreparedElementwise(NamedTuple):
    """The elementwise family, for calls whose results have one shape."""

    drop: Selection
    shape: tuple[int, ...]
    options: Options
    function: elementwise.Function
    # The loops' forms of f (activations.Form). ``full`` has full precision; ``short`` serves
    # results of 16 bits, and is the same object where f has one form alone.
    full: Any
    short: Any
    gated: bool
    columns: int
    width: int  # the columns of x: twice those of the result where f is gated

    def forward(self, operands: Elementwise) -> Tensor:
        """The op."""
        x, bias, layer_scale, residual, seed, _ = operands
        if not self.drop.drops and self._is_torchs(x, bias, layer_scale, residual):
            whole = checked(operands)
            found = elementwise.compose(whole, _NOTHING, self.options, False)
            return found.clone() if found is whole.x else found
        columns, width, count = self.columns, self.width, self.drop.count
        x, u = place(x, count if width == columns else 2 * count, "x")
        b = g = 0
        r = NONE
        if bias is not None:
            bias, b = vector(bias, width, "bias")
        if layer_scale is not None:
            layer_scale, g = vector(layer_scale, columns, "layer_scale")
        dtype = x.dtype
        if residual is not None:
            residual, r = place(residual, count, "residual")
            dtype = residual.dtype
        out, o = result(x, dtype, None if width == columns else self.shape)
        keep_alive = (x, residual, bias, layer_scale, out)
        self.drop.call("forward", seed, keep_alive, o, u, b, g, r, self._form(dtype))
        return out

    def backward(
        self, operands: ElementwiseBackward, dtypes: tuple[torch.dtype | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and layer_scale."""
        grad, x, bias, layer_scale, seed, _ = operands
        gated = self.options.gated
        if not self.drop.drops and not gated and layer_scale is None:
            if self.function.steps == 0 and dtypes == (grad.dtype, None, None):
                return grad, None, None
            backward = self.function.backward
            by_torch = x is not None and x.dtype == grad.dtype and self._is_torchs(x, bias)
            if x is not None and by_torch and backward is not None:
                whole = checked(operands)
                assert whole.x is not None
                biased = whole.x if whole.bias is None else whole.x + whole.bias
                found = backward(whole.grad, biased)
                dbias = None if dtypes[1] is None else elementwise.sum_rows(found)
                return (None if dtypes[0] is None else found), dbias, None
        columns, width, count = self.columns, self.width, self.drop.count
        _grad, d = place(grad, count, "grad")
        _x = _bias = _scale = dx = None
        u = at = NONE
        b = g = 0
        if x is not None:
            _x, u = place(x, 2 * count if gated else count, "x")
        if bias is not None:
            _bias, b = vector(bias, width, "bias")
        if layer_scale is not None:
            _scale, g = vector(layer_scale, columns, "layer_scale")
        if dtypes[0] is not None:
            shape = (*self.shape[:-1], width) if gated else None
            dx, at = result(_grad, dtypes[0], shape)
        arguments, form = (d, u, b, g, at), self._form(*dtypes)
        keep_alive = (_grad, _x, _bias, _scale, dx)
        if dtypes[1] is None and dtypes[2] is None:
            self.drop.call("backward", seed, keep_alive, *arguments, _NO_SUMS, form)
            return dx, None, None
        sums = (Sum(width, dtypes[1]), Sum(columns, dtypes[2]))
        vectors = self.drop.sum("backward", seed, grad, sums, keep_alive, *arguments, form)
        dbias, dlayer_scale = vectors
        return dx, dbias, dlayer_scale

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
    columns = drop.where.cols
    width = 2 * columns if options.gated else columns
    return PreparedElementwise(
        drop, shape, options, elementwise.FUNCTIONS[options.function],
        full, short, options.gated, columns, width,
    )  # fmt: skip


def prepare(
    shape: tuple[int, ...], options: Options, operands: Operands, wanted: Sequence[Any]
) -> PreparedElementwise | None:
    """Both directions for calls with such operands and results of ``shape``; None if not served."""
    return _prepare(shape, options) if serves(shape, options, operands, wanted) else None
