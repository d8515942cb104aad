"""The elementwise family: one forward and one backward kernel.

    u   = x + bias                      x: [rows, cols], or [rows, 2 * cols] for gated activations
    v   = f(u)                          gated: f(first half of u) * second half
    out = residual + drop_path(layer_scale * dropout(v))

An operand that is not given is None, which the compiler resolves: there is no kernel a variant. The
body of a kernel is load, pure functions of tiles, store. Arithmetic is fp32, rounded once at the
store.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .mask import (
    DOMAIN_DROP_PATH,
    DOMAIN_ELEMENTS,
    ELEMENTS,
    LANES,
    NO_MASK,
    keep_elements,
    keep_rows,
    load_key,
    load_rate,
    row_coordinates,
)

# grid axis 1 holds at most 65,535 column blocks; axis 2 goes on where that is not enough
MAX_GRID_Y = tl.constexpr(65535)

# Operands of both kernels; None where absent. `rate` is the (threshold, scale) pair on the device.
Operands = namedtuple("Operands", "x bias layer_scale residual seed rate")
# Sizes, and the strides between rows of x and of the second matrix that is read (the residual in
# forward, the gradient in backward). Columns always have stride 1.
Shape = namedtuple("Shape", "rows cols x_stride other_stride")
# Where the tile lies in the contract's coordinates: mask.Coordinates.leading for elements and for
# drop_path, the first column's group, and how far into that group the first column is.
Origin = namedtuple("Origin", "leading path_leading group shift")
# What backward writes; None where not needed. The last two are partial sums [strips, cols].
Gradients = namedtuple("Gradients", "x bias layer_scale")


@triton.jit
def _to_float(x):
    """fp32 of a tile."""
    if x.dtype == tl.bfloat16:
        # A shift, which LLVM merges with the unpacking of a 32-bit word: one instruction a value
        # where the conversion takes one and a half.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _columns(cols, origin, BLOCK_COLS: tl.constexpr):
    """Local columns of this program, [BLOCK_COLS], and the column groups of its masks."""
    block = tl.program_id(1) + tl.program_id(2) * MAX_GRID_Y
    # 64 bits only where the row length needs them: Triton types cols by its value.
    start = block.to((tl.zeros([], tl.int32) + cols).dtype) * BLOCK_COLS
    # A shard may begin inside a group: tiles begin where groups do, so some columns lie outside.
    col = start - origin.shift + tl.arange(0, BLOCK_COLS)
    group = origin.group + (start // LANES).to(tl.int64) + tl.arange(0, BLOCK_COLS // LANES)
    return col, group


@triton.jit
def _known(n, VECTOR: tl.constexpr):
    """``n``, a multiple of VECTOR, said so that the compiler sees it and loads 16 bytes at once."""
    return n // VECTOR * VECTOR


@triton.jit
def _in_bounds(row, col, rows, cols, WHOLE: tl.constexpr):
    if WHOLE:  # the blocks divide the matrix: the compiler drops the constant
        return tl.full([row.shape[0], col.shape[0]], 1, tl.int1)
    else:
        return (row < rows)[:, None] & ((col >= 0) & (col < cols))[None, :]


@triton.jit
def _load_matrix(pointer, stride, row, col, inside):
    offsets = row[:, None] * stride + col[None, :]
    return _to_float(tl.load(pointer + offsets, mask=inside, other=0.0))


@triton.jit
def _load_vector(pointer, col, cols):
    inside = (col >= 0) & (col < cols)
    return _to_float(tl.load(pointer + col, mask=inside, other=0.0))[None, :]


@triton.jit
def _load_input(operands, stride, cols, row, col, inside, GATED: tl.constexpr):
    """u = x + bias: (first half, second half); one tile twice where there are no halves."""
    u = _load_matrix(operands.x, stride, row, col, inside)
    if operands.bias is not None:
        u += _load_vector(operands.bias, col, cols)
    gate = u
    if GATED:
        gate = _load_matrix(operands.x + cols, stride, row, col, inside)
        if operands.bias is not None:
            gate += _load_vector(operands.bias + cols, col, cols)
    return u, gate


@triton.jit
def _load_rule(operands, threshold, scale, path_scale, MASK: tl.constexpr, PATH: tl.constexpr):
    """The Philox key, the elements' threshold and the product of the scales."""
    if MASK != NO_MASK:
        threshold, scale = load_rate(operands.rate, threshold, scale)
        if PATH:
            scale = scale * path_scale
    else:
        scale = path_scale
    return load_key(operands.seed), threshold, scale


@triton.jit
def _keep(
    row, group, origin, rule, path_threshold, MAYBE_ZERO: tl.constexpr,
    MASK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Whether an element and its sample are kept: [BLOCK_ROWS, BLOCK_COLS or 1]."""
    keep = tl.full([row.shape[0], 1], 1, tl.int1)
    if MASK != NO_MASK:
        row_at = row_coordinates(row, origin.leading)
        if MASK == ELEMENTS:
            keep = keep_elements(row_at, group, rule[0], rule[1], MAYBE_ZERO, DOMAIN_ELEMENTS)
        else:
            keep = keep_rows(row_at, rule[0], rule[1], MAYBE_ZERO, DOMAIN_ELEMENTS)[:, None]
    if PATH:
        row_at = row_coordinates(row, origin.path_leading)
        keep = keep & keep_rows(row_at, rule[0], path_threshold, False, DOMAIN_DROP_PATH)[:, None]
    return keep


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
    cols = _known(shape.cols, VECTOR)
    x_stride = _known(shape.x_stride, VECTOR)
    other_stride = _known(shape.other_stride, VECTOR)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col, group = _columns(cols, origin, BLOCK_COLS)
    inside = _in_bounds(row, col, shape.rows, cols, WHOLE)

    u, gate = _load_input(operands, x_stride, cols, row, col, inside, GATED)
    value = FUNCTION(u)
    if GATED:
        value = value * gate
    if operands.layer_scale is not None:
        value = value * _load_vector(operands.layer_scale, col, cols)
    if MASK != NO_MASK or PATH:
        rule = _load_rule(operands, threshold, scale, path_scale, MASK, PATH)
        table: tl.constexpr = operands.rate is not None
        keep = _keep(row, group, origin, rule, path_threshold, table, MASK, PATH)
        # Selected first, scaled after: dropped is exactly 0 even for NaN, and the product is one
        # instruction with the sum. Said as fma, since Triton 3.10 no longer fuses by itself.
        value = tl.where(keep, value, 0.0)
        if operands.residual is not None:
            stream = _load_matrix(operands.residual, other_stride, row, col, inside)
            value = tl.fma(value, tl.zeros_like(value) + rule[2], stream)
        else:
            value = value * rule[2]
    elif operands.residual is not None:
        value += _load_matrix(operands.residual, other_stride, row, col, inside)

    offsets = row[:, None] * cols + col[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_sum(pointer, total, col, cols, WIDTH: tl.constexpr):
    """A strip's sum over rows, as row `strip` of the partial sums [strips, WIDTH * cols]."""
    inside = (col >= 0) & (col < cols)
    offsets = tl.program_id(0).to(tl.int64) * cols * WIDTH + col
    tl.store(pointer + offsets, tl.sum(total, axis=0), mask=inside)


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
    cols = _known(shape.cols, VECTOR)
    x_stride = _known(shape.x_stride, VECTOR)
    other_stride = _known(shape.other_stride, VECTOR)
    WIDTH: tl.constexpr = 2 if GATED else 1
    col, group = _columns(cols, origin, BLOCK_COLS)
    if MASK != NO_MASK or PATH:
        rule = _load_rule(operands, threshold, scale, path_scale, MASK, PATH)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    gate_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    scale_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for block in range(STRIP):
        first = (tl.program_id(0).to(tl.int64) * STRIP + block) * BLOCK_ROWS
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = _in_bounds(row, col, shape.rows, cols, WHOLE)
        dvalue = _load_matrix(grad, other_stride, row, col, inside)
        keep = tl.full([BLOCK_ROWS, 1], 1, tl.int1)
        factor = 1.0
        if MASK != NO_MASK or PATH:
            table: tl.constexpr = operands.rate is not None
            keep = _keep(row, group, origin, rule, path_threshold, table, MASK, PATH)
            factor = rule[2]

        if operands.x is not None:
            u, gate = _load_input(operands, x_stride, cols, row, col, inside, GATED)
            if gradients.layer_scale is not None:
                value = FUNCTION(u)
                if GATED:
                    value = value * gate
                value = tl.where(keep, dvalue * value, 0.0) * factor
                scale_sum += tl.where(inside, value, 0.0)
        if operands.layer_scale is not None:
            dvalue = dvalue * _load_vector(operands.layer_scale, col, cols)

        # As in forward, the selection comes last: dropped is 0 whatever the input was.
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
        dx = tl.where(keep, dx, 0.0) * factor
        if gradients.x is not None:
            at = gradients.x + offsets
            tl.store(at, dx.to(gradients.x.dtype.element_ty), mask=inside)
        # Outside the matrix dx may be NaN: 0 * f'(bias).
        bias_sum += tl.where(inside, dx, 0.0)

    if gradients.bias is not None:
        _store_sum(gradients.bias, bias_sum, col, cols, WIDTH)
        if GATED:
            _store_sum(gradients.bias + cols, gate_sum, col, cols, WIDTH)
    if gradients.layer_scale is not None:
        _store_sum(gradients.layer_scale, scale_sum, col, cols, 1)


@triton.jit(do_not_specialize=["threshold"])
def keep_mask_kernel(
    out, operands, shape, origin, threshold: tl.int64,
    MASK: tl.constexpr, DOMAIN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The mask itself, [rows, cols]: 1 where an element is kept."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col, group = _columns(shape.cols, origin, BLOCK_COLS)
    threshold, _ = load_rate(operands.rate, threshold, 1.0)
    key = load_key(operands.seed)
    row_at = row_coordinates(row, origin.leading)
    if MASK == ELEMENTS:
        keep = keep_elements(row_at, group, key, threshold, True, DOMAIN)
    else:
        keep = keep_rows(row_at, key, threshold, True, DOMAIN)[:, None]
        keep = keep & tl.full([BLOCK_ROWS, BLOCK_COLS], 1, tl.int1)
    offsets = row[:, None] * shape.cols + col[None, :]
    tl.store(out + offsets, keep, mask=_in_bounds(row, col, shape.rows, shape.cols, False))
