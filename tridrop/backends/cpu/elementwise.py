"""The elementwise family on a CPU, each pass a compiled loop.

The formulas and the rounding are those of the reference, which is handed the calls that the loops
do not serve: fp64, a rate in a tensor, alpha and Gaussian noise, a gate. What does not depend on
data is prepared once for each shape and set of options.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.memory import all_whole, place
from ...spec.elementwise import Options, check_functions, output_shape
from ..reference import elementwise
from . import masks
from .memory import NONE, result, vector
from .selection import Selection, Sum, can_read, selection_of, serves

_NAMES = ("x", "bias", "layer_scale", "residual")
_NO_SUMS = (0, 0)  # the addresses of two absent sums


class PreparedElementwise(NamedTuple):
    """The elementwise family, for calls with results of one shape."""

    drop: Selection
    shape: tuple[int, ...]
    options: Options
    function: elementwise.Function
    # The number of f in activations.FORMS, and whether it is gated: of its form of full precision
    # and of the short one, which is the same object where f has no other.
    full: tuple[int, bool]
    short: tuple[int, bool]
    columns: int
    width: int  # the columns of x: twice those of the result where f is gated

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        """The op; arguments as in ``backends.Backend.forward``."""
        if layer_scale is not None and layer_scale.dim() > 1:  # a gate: the loops take vectors
            names = ("x", "bias", "gate", "residual", "seed")
            tensors = all_whole((x, bias, layer_scale, residual, seed), names)
            return elementwise.forward(*tensors, None, self.options, masks)  # type: ignore[call-arg]
        if not self.drop.drops and self._is_torchs(x, bias, layer_scale, residual):
            nothing = elementwise.Multiplier(None, 1.0)
            x, *others = all_whole((x, bias, layer_scale, residual), _NAMES)
            found = elementwise.compose(x, *others, nothing, self.options, False)  # type: ignore[call-arg]
            return found.clone() if elementwise.is_view(found, x) else found
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
        held = (x, residual, bias, layer_scale, out)
        self.drop.call("forward", seed, held, o, u, b, g, r, self._kind(dtype))
        return out

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The op's gradients; arguments as in ``backends.Backend.backward``."""
        if layer_scale is not None and layer_scale.dim() > 1:
            names = ("grad", "x", "bias", "gate", "seed")
            tensors = all_whole((grad, x, bias, layer_scale, seed), names)
            return elementwise.backward(*tensors, None, self.options, dtypes, masks)  # type: ignore[call-arg]
        gated = self.options.gated
        if not self.drop.drops and not gated and layer_scale is None:
            if self.function.steps == 0 and dtypes == (grad.dtype, None, None):
                return grad, None, None
            backward = self.function.backward
            alike = x is not None and x.dtype == grad.dtype and self._is_torchs(x, bias)
            if x is not None and alike and backward is not None:
                grad, x, bias = all_whole((grad, x, bias), ("grad", "x", "bias"))
                found = backward(grad, x if bias is None else x + bias)
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
        given, kind = (d, u, b, g, at), self._kind(*dtypes)
        held = (_grad, _x, _bias, _scale, dx)
        if dtypes[1] is None and dtypes[2] is None:
            self.drop.call("backward", seed, held, *given, _NO_SUMS, kind)
            return dx, None, None
        sums = (Sum(width, dtypes[1]), Sum(columns, dtypes[2]))
        dbias, dlayer_scale = self.drop.sum("backward", seed, grad, sums, held, *given, kind)
        return dx, dbias, dlayer_scale

    def _kind(self, *dtypes: torch.dtype | None) -> tuple[int, bool]:
        """The form for results of these dtypes: what is rounded to 16 bits needs no more."""
        if self.short is self.full or torch.float32 in dtypes:
            return self.full
        return self.short

    def _is_torchs(self, x: Tensor, *others: Tensor | None) -> bool:
        return elementwise.is_torchs(self.function, self.options.gated, x, *others)


@lru_cache(256)
def _prepare(shape: tuple[int, ...], options: Options) -> PreparedElementwise:
    drop = selection_of(shape, options)
    check_functions(drop.loops.functions, "backends/cpu/loops/activations.FUNCTIONS")
    numbers = drop.loops.functions[options.function]
    full, short = ((number, options.gated) for number in numbers)
    columns = drop.where.cols
    width = 2 * columns if options.gated else columns
    return PreparedElementwise(
        drop, shape, options, elementwise.FUNCTIONS[options.function],
        full, full if short == full else short, columns, width,
    )  # fmt: skip


def prepare(
    shape: tuple[int, ...], options: Options, *tensors: Tensor | None
) -> PreparedElementwise | None:
    """Both directions of calls with results of ``shape`` and such tensors, where loops serve them;
    see :func:`tridrop.backends.cpu.selection.serves`."""
    return _prepare(shape, options) if serves(shape, options, *tensors) else None


def forward(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
) -> Tensor:
    """The op; arguments as in ``backends.Backend.forward``."""
    tensors = (x, bias, layer_scale, residual)
    shape = output_shape(x, options.activation)
    if not serves(shape, options, *tensors) or not can_read(seed, p):
        return elementwise.forward(*tensors, seed, p, options, masks)
    return _prepare(shape, options).forward(*tensors, seed)


def backward(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The op's gradients; arguments as in ``backends.Backend.backward``."""
    tensors = (grad, x, bias, layer_scale)
    shape = tuple(grad.shape)
    if not serves(shape, options, *tensors) or not can_read(seed, p, dtypes):
        return elementwise.backward(*tensors, seed, p, options, dtypes, masks)
    dx, dbias, dlayer_scale = _prepare(shape, options).backward(*tensors, seed, dtypes)
    return dx if dx is None else elementwise.own(dx, grad), dbias, dlayer_scale
