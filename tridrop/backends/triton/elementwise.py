"""The elementwise family: one forward and one backward kernel.

    u   = x + bias                      x: [rows, cols], or [rows, 2 * cols] for gated activations
    v   = f(u)                          gated: f(first half of u) * second half
    out = residual + drop_path(layer_scale * dropout(v))

``layer_scale`` is a vector or a gate, which has one vector per sample, [samples, cols]. With a gate
all rows of a program belong to one sample, so the program sees a vector.

An absent operand is None, which the compiler resolves, so that one kernel serves all combinations.
The body of a kernel loads, calls pure functions of tiles, and stores. Arithmetic is fp32, rounded
once at the store.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.elementwise import Options, output_shape
from ...spec.operands import Elementwise, ElementwiseBackward
from . import launch, mask
from .activations import FUNCTIONS
from .mask import ELEMENTS, NO_MASK, keep_elements, keep_rows, load_key, load_rate, row_coordinates
from .noise import ALPHA, FILL, GAUSSIAN, alpha_shift, gaussian
from .sums import totals
from .tiles import (
    Operands,
    columns,
    in_bounds,
    keep_tile,
    load_branch,
    load_criterion,
    load_matrix,
    load_vector,
    multiple_of,
    store_sum,
)

# What backward writes; None where it is not needed. The last two are partial sums [strips, cols].
Gradients = namedtuple("Gradients", "x bias layer_scale")


@triton.jit
def _load_input(operands, stride, cols, row, col, inside, GATED: tl.constexpr):
    """u = x + bias as (first half, second half); without halves, the same tile twice."""
    u = load_branch(operands, stride, cols, row, col, inside)
    gate = u
    if GATED:
        gate = load_matrix(operands.x + cols, stride, row, col, inside)
        if operands.bias is not None:
            gate += load_vector(operands.bias + cols, col, cols)
    return u, gate


@triton.jit
def _load_gain(operands, sample, col, cols, SAMPLED: tl.constexpr):
    if SAMPLED:
        return load_vector(operands.layer_scale + sample * cols, col, cols)
    else:
        return load_vector(operands.layer_scale, col, cols)


@triton.jit
def _rows(shape, block, STRIP: tl.constexpr, BLOCK_ROWS: tl.constexpr, SAMPLED: tl.constexpr):
    """The rows of one of this program's blocks: (index in the matrix, index below shape.rows,
    sample); see launch.Plan."""
    if SAMPLED:
        samples = tl.num_programs(0) // (
            (shape.rows + (STRIP * BLOCK_ROWS - 1)) // (STRIP * BLOCK_ROWS)
        )
        sample = (tl.program_id(0) % samples).to(tl.int64)
        first = ((tl.program_id(0) // samples).to(tl.int64) * STRIP + block) * BLOCK_ROWS
        local = first + tl.arange(0, BLOCK_ROWS)
        return sample * shape.rows + local, local, sample
    else:
        first = (tl.program_id(0).to(tl.int64) * STRIP + block) * BLOCK_ROWS
        row = first + tl.arange(0, BLOCK_ROWS)
        return row, row, 0


@triton.jit(do_not_specialize=["threshold", "path_threshold"])
def forward_kernel(
    out, operands, shape, origin,
    threshold: tl.int64, scale: tl.float32, path_threshold: tl.int64, path_scale: tl.float32,
    FUNCTIONS: tl.constexpr, MASKS: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = residual + drop_path(layer_scale * dropout(f(x + bias)))"""
    FUNCTION: tl.constexpr = FUNCTIONS[0]
    GATED: tl.constexpr = FUNCTIONS[2]
    MASK: tl.constexpr = MASKS[0]
    PATH: tl.constexpr = MASKS[1]
    NOISE: tl.constexpr = MASKS[2]
    cols = multiple_of(shape.cols, VECTOR)
    x_stride = multiple_of(shape.x_stride, VECTOR)
    other_stride = multiple_of(shape.other_stride, VECTOR)
    row, local, sample = _rows(shape, 0, 1, BLOCK_ROWS, FUNCTIONS[3])
    col, group = columns(cols, origin, BLOCK_COLS)
    inside = in_bounds(local, col, shape.rows, cols, WHOLE)

    u, gate = _load_input(operands, x_stride, cols, row, col, inside, GATED)
    value = FUNCTION(u)
    if GATED:
        value = value * gate
    if operands.layer_scale is not None:
        value = value * _load_gain(operands, sample, col, cols, FUNCTIONS[3])
    if NOISE == GAUSSIAN and MASK != NO_MASK:
        criterion = load_criterion(operands, threshold, scale, path_scale, MASK, PATH)
        value = value * gaussian(row_coordinates(row, origin.leading), group, criterion, MASK)
    elif MASK != NO_MASK or PATH:
        criterion = load_criterion(operands, threshold, scale, path_scale, MASK, PATH)
        table: tl.constexpr = operands.rate is not None
        keep = keep_tile(row, group, origin, criterion, path_threshold, table, MASK, PATH)
        # The selection comes before the scale: a dropped element is exactly 0 even for NaN, and
        # product and sum are one instruction. It is an explicit fma, since Triton 3.10 no longer
        # fuses by default.
        value = tl.where(keep, value, FILL if NOISE == ALPHA else 0.0)
        if NOISE == ALPHA:
            value = value * criterion[2] + alpha_shift(criterion[1], criterion[2])
        elif operands.residual is not None:
            stream = load_matrix(operands.residual, other_stride, row, col, inside)
            value = tl.fma(value, tl.zeros_like(value) + criterion[2], stream)
        else:
            value = value * criterion[2]
    elif operands.residual is not None:
        value += load_matrix(operands.residual, other_stride, row, col, inside)

    offsets = row[:, None] * cols + col[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold", "path_threshold"])
def backward_kernel(
    grad, gradients, operands, shape, origin,
    threshold: tl.int64, scale: tl.float32, path_threshold: tl.int64, path_scale: tl.float32,
    FUNCTIONS: tl.constexpr, MASKS: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of STRIP row blocks, and the strip's sums for bias and layer_scale.

    dx = grad * layer_scale * f'(u) * keep * scale;     dbias = sum over rows of dx
    dlayer_scale = sum over rows of grad * f(u) * keep * scale
    """
    FUNCTION: tl.constexpr = FUNCTIONS[0]
    FUNCTION_GRAD: tl.constexpr = FUNCTIONS[1]
    GATED: tl.constexpr = FUNCTIONS[2]
    MASK: tl.constexpr = MASKS[0]
    PATH: tl.constexpr = MASKS[1]
    NOISE: tl.constexpr = MASKS[2]
    cols = multiple_of(shape.cols, VECTOR)
    x_stride = multiple_of(shape.x_stride, VECTOR)
    other_stride = multiple_of(shape.other_stride, VECTOR)
    WIDTH: tl.constexpr = 2 if GATED else 1
    col, group = columns(cols, origin, BLOCK_COLS)
    if MASK != NO_MASK or PATH:
        criterion = load_criterion(operands, threshold, scale, path_scale, MASK, PATH)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    gate_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    scale_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for block in range(STRIP):
        row, local, sample = _rows(shape, block, STRIP, BLOCK_ROWS, FUNCTIONS[3])
        inside = in_bounds(local, col, shape.rows, cols, WHOLE)
        dvalue = load_matrix(grad, other_stride, row, col, inside)
        keep = tl.full([BLOCK_ROWS, 1], 1, tl.int1)
        factor = 1.0
        if NOISE != GAUSSIAN and (MASK != NO_MASK or PATH):
            table: tl.constexpr = operands.rate is not None
            keep = keep_tile(row, group, origin, criterion, path_threshold, table, MASK, PATH)
            factor = criterion[2]

        if operands.x is not None:
            u, gate = _load_input(operands, x_stride, cols, row, col, inside, GATED)
            if gradients.layer_scale is not None:
                value = FUNCTION(u)
                if GATED:
                    value = value * gate
                value = tl.where(keep, dvalue * value, 0.0) * factor
                scale_sum += tl.where(inside, value, 0.0)
        if operands.layer_scale is not None:
            dvalue = dvalue * _load_gain(operands, sample, col, cols, FUNCTIONS[3])

        # The selection comes last: a dropped element's gradient is 0 whatever its input was.
        offsets = row[:, None] * cols * WIDTH + col[None, :]
        dx = dvalue
        if operands.x is not None:
            dx = dvalue * FUNCTION_GRAD(u)
            if GATED:
                dx = dx * gate
                dgate = tl.where(keep, dvalue * FUNCTION(u), 0.0) * factor
                if gradients.x is not None:
                    at = gradients.x + offsets + cols
                    tl.store(at, dgate.to(gradients.x.dtype.element_ty), mask=inside)
                gate_sum += tl.where(inside, dgate, 0.0)
        if NOISE == GAUSSIAN and MASK != NO_MASK:
            dx = dx * gaussian(row_coordinates(row, origin.leading), group, criterion, MASK)
        else:
            dx = tl.where(keep, dx, 0.0) * factor
        if gradients.x is not None:
            at = gradients.x + offsets
            tl.store(at, dx.to(gradients.x.dtype.element_ty), mask=inside)
        # Outside of the matrix dx may be NaN, from 0 * f'(bias).
        bias_sum += tl.where(inside, dx, 0.0)

    if gradients.bias is not None:
        store_sum(gradients.bias, bias_sum, col, cols, WIDTH)
        if GATED:
            store_sum(gradients.bias + cols, gate_sum, col, cols, WIDTH)
    if gradients.layer_scale is not None:
        store_sum(gradients.layer_scale, scale_sum, col, cols, 1)


@triton.jit(do_not_specialize=["threshold"])
def keep_mask_kernel(
    out, operands, shape, origin, threshold: tl.int64,
    MASK: tl.constexpr, DOMAIN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The mask itself, [rows, cols]: 1 where an element is kept."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col, group = columns(shape.cols, origin, BLOCK_COLS)
    threshold, _ = load_rate(operands.rate, threshold, 1.0)
    key = load_key(operands.seed)
    row_at = row_coordinates(row, origin.leading)
    if MASK == ELEMENTS:
        keep = keep_elements(row_at, group, key, threshold, True, DOMAIN)
    else:
        keep = keep_rows(row_at, key, threshold, True, DOMAIN)[:, None]
        keep = keep & tl.full([BLOCK_ROWS, BLOCK_COLS], 1, tl.int1)
    offsets = row[:, None] * shape.cols + col[None, :]
    tl.store(out + offsets, keep, mask=in_bounds(row, col, shape.rows, shape.cols, False))


def forward(operands: Elementwise, options: Options) -> Tensor:
    """Launch the forward kernel."""
    x, bias, layer_scale, residual, seed, p = operands
    shape = output_shape(x, options.activation)
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty(shape, dtype=dtype, device=x.device)
    samples = _samples(layer_scale)
    plan = launch.plan(shape, options, launch.tile, samples=samples)
    if plan.empty:
        return out
    masks = launch.mask_arguments(plan, p)
    matrix, stride = launch.matrix(x, plan.where.cols * (2 if options.gated else 1))
    other, other_stride = launch.matrix(residual, plan.where.cols)
    launch.run(
        forward_kernel,
        plan,
        out.device,
        out,
        launch.operands(matrix, bias, layer_scale, other, seed, masks),
        plan.sizes(stride, other_stride),
        plan.origin,
        *masks.arguments,
        FUNCTIONS=(*FUNCTIONS[options.function], options.gated, samples is not None),
        MASKS=masks.MASKS,
        WHOLE=plan.whole,
        VECTOR=launch.vector_width(plan.where.cols, stride, other_stride),
    )
    return out


def backward(
    operands: ElementwiseBackward, options: Options, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel, for gradients of x, bias and layer_scale."""
    grad, x, bias, layer_scale, seed, p = operands
    reduces = any(dtype is not None for dtype in dtypes[1:])
    tile_for = launch.gated_reduction_tile if options.gated else launch.reduction_tile
    settings = (tile_for, launch.strip) if reduces else (launch.tile, None)
    samples = _samples(layer_scale)
    plan = launch.plan(tuple(grad.shape), options, *settings, samples=samples)
    width = plan.where.cols * (2 if options.gated else 1)
    dx = None
    if dtypes[0] is not None:
        dx_shape = (*grad.shape[:-1], width) if grad.dim() else ()
        dx = torch.empty(dx_shape, dtype=dtypes[0], device=grad.device)
    partial = launch.partial_sums(
        plan,
        grad.device,
        None if dtypes[1] is None else width,
        None if dtypes[2] is None else plan.where.cols,
    )
    dgain = partial[1]
    if dgain is not None and samples is not None:
        dgain = dgain.view(plan.strips // max(1, samples), samples, plan.where.cols)
    if plan.empty:
        return dx, *totals((partial[0], dgain), dtypes[1:])
    masks = launch.mask_arguments(plan, p)
    incoming, grad_stride = launch.matrix(grad, plan.where.cols)
    matrix, stride = launch.matrix(x, width)
    launch.run(
        backward_kernel,
        plan,
        grad.device,
        incoming,
        Gradients(dx, *partial),
        launch.operands(matrix, bias, layer_scale, None, seed, masks),
        plan.sizes(stride, grad_stride),
        plan.origin,
        *masks.arguments,
        FUNCTIONS=(*FUNCTIONS[options.function], options.gated, samples is not None),
        MASKS=masks.MASKS,
        WHOLE=plan.whole,
        VECTOR=launch.vector_width(plan.where.cols, stride, grad_stride),
        STRIP=plan.strip,
    )
    return dx, *totals((partial[0], dgain), dtypes[1:])


def _samples(layer_scale: Tensor | None) -> int | None:
    """The number of samples of a gate; None if there is no gate."""
    return None if layer_scale is None or layer_scale.dim() < 2 else layer_scale.shape[0]


def keep_mask(
    seed: Tensor, shape: tuple[int, ...], p: Tensor | None, options: Options, domain: str
) -> Tensor:
    """Launch the mask kernel."""
    out = torch.empty(shape, dtype=torch.bool, device=seed.device)
    plan = launch.plan(shape, options, launch.tile)
    if plan.empty:
        return out
    launch.run(
        keep_mask_kernel,
        plan,
        out.device,
        out,
        Operands(None, None, None, None, launch.vector(seed), launch.rate(p)),
        plan.sizes(0, 0),
        plan.origin,
        options.thresholds()[0],
        MASK=plan.element_mask,
        DOMAIN=int(mask.DOMAIN_DROP_PATH if domain == "drop_path" else mask.DOMAIN_ELEMENTS),
    )
    return out
