"""Dropout, add and norm: one forward and one backward kernel.

    before:  stream = residual + drop_path(layer_scale * dropout(x + bias));  out = affine(stream)
    after:   stream = x;  out = residual + drop_path(dropout(affine(stream)))

    affine(s) = (s - mean) * rstd * weight + norm_bias      over the columns of a row

A program holds whole rows, in one chunk of columns if they fit the registers. Wider rows are read
in several chunks, twice.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .mask import NO_MASK
from .tiles import (
    columns_at,
    first_of,
    in_bounds,
    keep_tile,
    load_branch,
    load_criterion,
    load_matrix,
    load_vector,
    multiple_of,
    to_float,
)

# What forward writes besides out; stream is None where it is not needed.
Kept = namedtuple("Kept", "stream statistics")
# The vectors of the norm's affine part, and eps.
Affine = namedtuple("Affine", "weight bias eps")
# What backward reads: both incoming gradients and what forward kept. All are [rows, cols] with
# contiguous rows, except dout, whose row stride is Shape.other_stride.
Incoming = namedtuple("Incoming", "dout dstream stream statistics")
# What backward writes; None where not needed. The last four are partial sums [strips, cols].
Gradients = namedtuple("Gradients", "x residual weight norm_bias bias layer_scale")


@triton.jit
def _gain(affine, col, cols, ZERO_CENTERED: tl.constexpr):
    gain = load_vector(affine.weight, col, cols)
    if ZERO_CENTERED:
        gain += 1.0
    return gain


@triton.jit
def _keep(operands, origin, criterion, row, group, path_threshold, MASKS: tl.constexpr):
    table: tl.constexpr = operands.rate is not None
    return keep_tile(row, group, origin, criterion, path_threshold, table, MASKS[0], MASKS[1])


@triton.jit(do_not_specialize=["threshold", "path_threshold"])
def norm_forward_kernel(
    out, kept, operands, affine, shape, origin,
    threshold: tl.int64, scale: tl.float32, path_threshold: tl.int64, path_scale: tl.float32,
    NORM: tl.constexpr, MASKS: tl.constexpr, VECTOR: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The formulas at the top of this file, for BLOCK_ROWS rows."""
    LAYER: tl.constexpr = NORM[0]
    ZERO_CENTERED: tl.constexpr = NORM[1]
    AFTER: tl.constexpr = NORM[2]
    STREAM: tl.constexpr = NORM[3]
    DROPS: tl.constexpr = MASKS[0] != NO_MASK or MASKS[1]
    cols = multiple_of(shape.cols, VECTOR)
    x_stride = multiple_of(shape.x_stride, VECTOR)
    other_stride = multiple_of(shape.other_stride, VECTOR)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    criterion = (0, 0, 1.0)
    if DROPS:
        criterion = load_criterion(operands, threshold, scale, path_scale, MASKS[0], MASKS[1])

    mean = tl.zeros([BLOCK_ROWS], tl.float32)
    square = tl.zeros([BLOCK_ROWS], tl.float32)  # sum of squared deviations from the mean
    stream = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for chunk in range(CHUNKS):
        col, group = columns_at(chunk, cols, origin, BLOCK_COLS)
        inside = in_bounds(row, col, shape.rows, cols, False)
        stream = load_branch(operands, x_stride, cols, row, col, inside)
        if not AFTER:
            if operands.layer_scale is not None:
                stream = stream * load_vector(operands.layer_scale, col, cols)
            if DROPS:
                keep = _keep(operands, origin, criterion, row, group, path_threshold, MASKS)
                stream = tl.where(keep, stream, 0.0) * criterion[2]
            if operands.residual is not None:
                stream += load_matrix(operands.residual, other_stride, row, col, inside)
            rounded = stream.to(STREAM)  # the norm reads the stored numbers, as backward does
            if kept.stream is not None:
                tl.store(kept.stream + row[:, None] * cols + col[None, :], rounded, mask=inside)
            stream = to_float(rounded)
        if LAYER:
            # Chan, Golub and LeVeque (1979): join the chunk's moments with those before it.
            start = first_of(chunk, cols, BLOCK_COLS)
            before = tl.minimum(start, cols).to(tl.float32)
            size = tl.minimum(cols - start, BLOCK_COLS).to(tl.float32)
            centre = tl.sum(stream, axis=1) / size
            deviation = tl.where(inside, stream - centre[:, None], 0.0)
            delta = centre - mean
            mean += delta * (size / (before + size))
            square += tl.sum(deviation * deviation, axis=1)
            square += delta * delta * (before * size / (before + size))
        else:
            square += tl.sum(tl.where(inside, stream * stream, 0.0), axis=1)
    rstd = tl.rsqrt(square / cols + affine.eps)
    tl.store(kept.statistics + 2 * row, mean, mask=row < shape.rows)
    tl.store(kept.statistics + 2 * row + 1, rstd, mask=row < shape.rows)

    if CHUNKS > 1:
        tl.debug_barrier()  # what other threads of this program stored is read again
    for chunk in range(CHUNKS):
        col, group = columns_at(chunk, cols, origin, BLOCK_COLS)
        inside = in_bounds(row, col, shape.rows, cols, False)
        if CHUNKS > 1:
            if AFTER:
                stream = load_branch(operands, x_stride, cols, row, col, inside)
            else:
                stream = load_matrix(kept.stream, cols, row, col, inside)
        value = (stream - mean[:, None]) * rstd[:, None]
        if affine.weight is not None:
            value = value * _gain(affine, col, cols, ZERO_CENTERED)
        if affine.bias is not None:
            value += load_vector(affine.bias, col, cols)
        if AFTER:
            if DROPS:
                keep = _keep(operands, origin, criterion, row, group, path_threshold, MASKS)
                value = tl.where(keep, value, 0.0) * criterion[2]
            if operands.residual is not None:
                value += load_matrix(operands.residual, other_stride, row, col, inside)
        offsets = row[:, None] * cols + col[None, :]
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _incoming(
    incoming, operands, affine, shape, origin, criterion, path_threshold, cols, row, chunk,
    NORM: tl.constexpr, MASKS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The affine part's incoming gradient, that times the gain, the normalised row, the mask."""
    DROPS: tl.constexpr = MASKS[0] != NO_MASK or MASKS[1]
    col, group = columns_at(chunk, cols, origin, BLOCK_COLS)
    inside = in_bounds(row, col, shape.rows, cols, False)
    other_stride = multiple_of(shape.other_stride, VECTOR)
    dout = load_matrix(incoming.dout, other_stride, row, col, inside)
    keep = tl.full([row.shape[0], 1], 1, tl.int1)
    if DROPS:
        keep = _keep(operands, origin, criterion, row, group, path_threshold, MASKS)
        if NORM[2]:  # the dropout came after the norm
            dout = tl.where(keep, dout, 0.0) * criterion[2]
    if NORM[2]:
        stride = multiple_of(shape.x_stride, VECTOR)
        stream = load_matrix(incoming.stream, stride, row, col, inside)
    else:
        stream = load_matrix(incoming.stream, cols, row, col, inside)
    mean = tl.load(incoming.statistics + 2 * row, mask=row < shape.rows, other=0.0)
    rstd = tl.load(incoming.statistics + 2 * row + 1, mask=row < shape.rows, other=0.0)
    normed = tl.where(inside, (stream - mean[:, None]) * rstd[:, None], 0.0)
    dnormed = dout
    if affine.weight is not None:
        dnormed = dout * _gain(affine, col, cols, NORM[1])
    return dout, dnormed, normed, keep, rstd, col, inside


@triton.jit
def _finish(
    incoming, gradients, operands, affine, shape, origin, criterion, path_threshold, cols, row,
    chunk, along, total, NORM: tl.constexpr, MASKS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk; return the terms of the sums over rows.

    ``along`` and ``total`` are the sums over the whole row of dn * n and of dn.
    """
    DROPS: tl.constexpr = (MASKS[0] != NO_MASK or MASKS[1]) and not NORM[2]
    dout, dnormed, normed, keep, rstd, col, inside = _incoming(
        incoming, operands, affine, shape, origin, criterion, path_threshold, cols, row, chunk,
        NORM, MASKS, VECTOR, BLOCK_COLS,
    )  # fmt: skip
    offsets = row[:, None] * cols + col[None, :]
    dstream = dnormed - normed * (along / cols)[:, None] - (total / cols)[:, None]
    dstream = tl.where(inside, dstream * rstd[:, None], 0.0)
    if incoming.dstream is not None:
        dstream += load_matrix(incoming.dstream, cols, row, col, inside)
    if gradients.residual is not None:
        element = gradients.residual.dtype.element_ty
        tl.store(gradients.residual + offsets, dstream.to(element), mask=inside)
    dx = dstream
    if operands.layer_scale is not None:
        dx = dstream * load_vector(operands.layer_scale, col, cols)
    if DROPS:
        dx = tl.where(keep, dx, 0.0) * criterion[2]
    if gradients.x is not None:
        tl.store(gradients.x + offsets, dx.to(gradients.x.dtype.element_ty), mask=inside)
    dscale = dx
    if gradients.layer_scale is not None:
        x_stride = multiple_of(shape.x_stride, VECTOR)
        dscale = dstream * load_branch(operands, x_stride, cols, row, col, inside)
        if DROPS:
            dscale = tl.where(keep, dscale, 0.0) * criterion[2]
        dscale = tl.where(inside, dscale, 0.0)  # outside, the bias may be NaN
    return dout * normed, dout, dx, dscale


@triton.jit
def _add_sum(pointer, term, col, cols, block):
    """Add a term's sum over rows to this program's row of the partial sums."""
    inside = (col >= 0) & (col < cols)
    at = pointer + tl.program_id(0).to(tl.int64) * cols + col
    total = tl.sum(term, axis=0)
    if block > 0:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit
def _add_sums(gradients, terms, chunk, cols, origin, block, BLOCK_COLS: tl.constexpr):
    col, _ = columns_at(chunk, cols, origin, BLOCK_COLS)
    if gradients.weight is not None:
        _add_sum(gradients.weight, terms[0], col, cols, block)
    if gradients.norm_bias is not None:
        _add_sum(gradients.norm_bias, terms[1], col, cols, block)
    if gradients.bias is not None:
        _add_sum(gradients.bias, terms[2], col, cols, block)
    if gradients.layer_scale is not None:
        _add_sum(gradients.layer_scale, terms[3], col, cols, block)


@triton.jit(do_not_specialize=["threshold", "path_threshold"])
def norm_backward_kernel(
    incoming, gradients, operands, affine, shape, origin,
    threshold: tl.int64, scale: tl.float32, path_threshold: tl.int64, path_scale: tl.float32,
    NORM: tl.constexpr, MASKS: tl.constexpr, VECTOR: tl.constexpr, LOOPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of row blocks, and the strip's sums.

    dn = dout * gain;  ds = (dn - mean(dn) - n * mean(dn * n)) * rstd + dstream;  dresidual = ds
    dx = ds * layer_scale * keep * scale;  dbias = sum of dx;  dweight = sum of dout * n
    dnorm_bias = sum of dout;  dlayer_scale = sum of ds * (x + bias) * keep * scale
    """
    STRIP: tl.constexpr = LOOPS[0]
    CHUNKS: tl.constexpr = LOOPS[1]
    cols = multiple_of(shape.cols, VECTOR)
    criterion = (0, 0, 1.0)
    if MASKS[0] != NO_MASK or MASKS[1]:
        criterion = load_criterion(operands, threshold, scale, path_scale, MASKS[0], MASKS[1])
    # Sums over the rows of a strip: in registers where a row is one chunk, else in memory.
    weight_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    norm_bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    scale_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for block in tl.range(0, STRIP, num_stages=LOOPS[2]):
        start = (tl.program_id(0).to(tl.int64) * STRIP + block) * BLOCK_ROWS
        row = start + tl.arange(0, BLOCK_ROWS)
        along = tl.zeros([BLOCK_ROWS], tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        for chunk in range(CHUNKS):
            _, dnormed, normed, _, _, _, _ = _incoming(
                incoming, operands, affine, shape, origin, criterion, path_threshold, cols, row,
                chunk, NORM, MASKS, VECTOR, BLOCK_COLS,
            )  # fmt: skip
            along += tl.sum(dnormed * normed, axis=1)
            if NORM[0]:
                total += tl.sum(dnormed, axis=1)
        for chunk in range(CHUNKS):
            terms = _finish(
                incoming, gradients, operands, affine, shape, origin, criterion, path_threshold,
                cols, row, chunk, along, total, NORM, MASKS, VECTOR, BLOCK_COLS,
            )  # fmt: skip
            if CHUNKS == 1:
                weight_sum += terms[0]
                norm_bias_sum += terms[1]
                bias_sum += terms[2]
                scale_sum += terms[3]
            else:
                _add_sums(gradients, terms, chunk, cols, origin, block, BLOCK_COLS)
        if CHUNKS > 1:
            tl.debug_barrier()  # the next row block reads these sums again
    if CHUNKS == 1:
        sums = (weight_sum, norm_bias_sum, bias_sum, scale_sum)
        _add_sums(gradients, sums, 0, cols, origin, 0, BLOCK_COLS)
