"""The norm family for CPUs, forward and backward in one pass each over rows that stay in the cache.

The formulas and the rounding are those of ``backends/reference/norm.py``: fp32 within, and the
stream is rounded to its dtype before it is normalised. loops/elementwise.py describes the
arguments.
"""

from __future__ import annotations

import numpy as np

from .decorators import NOTHING, apart, inline, written_out
from .kernels import kernel, sum_of_part, summing_kernel
from .mask import (
    LANES,
    STRIP,
    last_and_factor,
    next_piece,
    randoms,
)
from .memory import LINE, part_of, release, scratch, vector
from .steps import (
    ANY_ORDER,
    accumulate,
    accumulate_selected,
    add,
    add_vector,
    clear,
    copy,
    fill,
    multiply,
    multiply_vector,
    row_of,
    select,
    total,
)
from .storage import add_selected, for_each_dtype, load, store, store_rounded, store_selected

_ZERO, _ONE = np.float32(0), np.float32(1)


@inline(ANY_ORDER)
def squares(u, mean):
    found = _ZERO
    for j in range(u.size):
        found += (u[j] - mean) * (u[j] - mean)
    return found


@inline(set())
def find_moments(statistics, u, rows, columns, summed, whole, rms, eps):
    """(mean, rstd) of each row; if ``summed``, there is one row, and ``whole`` is its sum."""
    size = np.float32(columns)
    for k in range(rows):
        v = row_of(u, k, columns)
        if not summed:
            whole = total(v)
        mean = _ZERO if rms else whole / size
        rstd = _ONE / np.sqrt(squares(v, mean) / size + np.float32(eps))
        statistics[2 * k], statistics[2 * k + 1] = mean, rstd


@inline({"contract"})
def affine(value, mean, rstd, gain, shift):
    return (value - mean) * rstd * gain + shift


@inline(set())
def normalise(u, rows, columns, statistics, gain, shift):
    """u = (u - mean) * rstd * gain + shift."""
    for k in range(rows):
        mean, rstd, v = statistics[2 * k], statistics[2 * k + 1], row_of(u, k, columns)
        for j in range(columns):
            v[j] = affine(v[j], mean, rstd, gain[j], shift[j])


@for_each_dtype(set())
def store_normalised(read, write):
    """The elements = (u - mean) * rstd * gain + shift."""

    def loop(elements, u, rows, columns, statistics, gain, shift):
        for k in range(rows):
            mean, rstd = statistics[2 * k], statistics[2 * k + 1]
            row, v = row_of(elements, k, columns), row_of(u, k, columns)
            for j in range(columns):
                row[j] = write(affine(v[j], mean, rstd, gain[j], shift[j]))

    return loop


@inline(ANY_ORDER)
def gather(d, u, mean, rstd, gain, dweight, dbias):
    """Normalise a row u of the stream, add its terms to dweight and dbias, and sum along the row.

    The sums along the row are of d * gain * u and of d * gain.
    """
    along, whole = _ZERO, _ZERO
    for j in range(u.size):
        normed = (u[j] - mean) * rstd
        u[j] = normed
        grad = d[j]
        dbias[j] += grad
        dweight[j] += grad * normed
        grad *= gain[j]
        along += grad * normed
        whole += grad
    return along, whole


@inline({"contract"})
def project(d, normed, gain, along, mean, rstd):
    """d = (d * gain - normed * along - mean) * rstd."""
    for j in range(d.size):
        d[j] = (d[j] * gain[j] - normed[j] * along - mean) * rstd


@inline(set())
def differentiate(d, u, rows, columns, statistics, gain, dweight, dbias, rms):
    """Replace d, the gradients of the affine part's result, by those of the rows of the stream u.

    The rows' terms are added to dweight and dbias.
    """
    size = np.float32(columns)
    for k in range(rows):
        v, n = row_of(d, k, columns), row_of(u, k, columns)
        mean, rstd = statistics[2 * k], statistics[2 * k + 1]
        along, whole = gather(v, n, mean, rstd, gain, dweight, dbias)
        project(v, n, gain, along / size, _ZERO if rms else whole / size, rstd)


# Vectors are read once per part of the rows, and so by a function that is not inlined: three loops
# for each of them, one per dtype, would be a fifth of the kernels.
@apart(set())
def load_vector(matrix, size, into):
    load(matrix, NOTHING, size, into)


@inline(set())
def gains(weight, centred, into):
    """into = the weight, or 1 + weight if ``centred``, or 1 where there is no weight."""
    if weight[0] == 0:
        fill(into, into.size, _ONE)
        return
    load_vector(weight, into.size, into)
    if centred:
        for j in range(into.size):
            into[j] += _ONE


@inline(set())
def bits_of_row(columns):
    """Room for the bits of several short rows, or of one that begins and ends inside a group."""
    return max(STRIP * LANES, (columns // LINE + 2) * LINE)


@written_out
def rows_of_scratch(memory, k, columns):
    """Array number k, for one row or several short ones, as long as the bits."""
    width = bits_of_row(columns)
    return vector(memory + 16 * STRIP + 4 * k * width, width, np.float32)


@inline(set())
def row_bits(bits, words, seed, decisions, row, stop, columns):
    """Fill ``bits`` for one whole row, or for several short ones: (rows, lane)."""
    rows, lane, done = next_piece(bits, words, seed, decisions, row, NOTHING, stop, columns)
    while done < columns:
        rest = bits[lane + done :]
        done += next_piece(rest, words, seed, decisions, row, done, stop, columns)[2]
    return rows, lane


@kernel
def forward(start, stop, given, columns, decisions, scale, out, stream, found, options):
    """out, stream, and (mean, rstd) of the rows from start to stop.

    ``given`` are the seed, x, bias, layer_scale, residual, weight and norm_bias, the last two as
    matrices with one row. ``found`` is the address of the pairs (mean, rstd). ``options`` say
    whether it is RMSNorm, whether the dropout comes after the norm, whether 1 is added to the
    weight, and eps. Where the stream is not kept, only its dtype code counts.
    """
    seed, x, (bias, _), (layer_scale, _), residual, weight, norm_bias = given
    rms, after, centred, eps = options
    width = bits_of_row(columns)
    memory = scratch(4 * STRIP + 5 * width)
    bits, words = randoms(memory, width, decisions[4])
    u, spare = rows_of_scratch(memory, 1, columns), rows_of_scratch(memory, 2, columns)
    gain, shift = rows_of_scratch(memory, 3, columns), rows_of_scratch(memory, 4, columns)
    statistics = vector(found, 2 * stop, np.float32)
    short = 2 * columns <= STRIP * LANES
    gains(weight, centred, gain[:columns])
    fill(shift, columns, _ZERO)
    if norm_bias[0] != 0:
        load_vector(norm_bias, columns, shift)
    unkept = (np.int64(spare.ctypes.data), stream[1])
    r = start
    while r < stop:
        rows, lane = row_bits(bits, words, seed, decisions, r, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
        at, count, whole = r * columns, rows * columns, _ZERO
        kept = part_of(bits, lane, count)
        load(x, at, count, u)
        add_vector(u, rows, columns, bias, NOTHING)
        if not after:
            multiply_vector(u, rows, columns, layer_scale, NOTHING)
            if residual[0] != 0:
                add_selected(residual, at, count, u, kept, last, factor)
            else:
                select(u, count, kept, last, factor)
            # The stream is rounded first: forward normalises the numbers that backward reads.
            into, begin = (stream, at) if stream[0] != 0 else (unkept, NOTHING)
            whole = store_rounded(into, begin, count, u)
        # Sizes alone decide how a row is summed, so its sum does not depend on the rows beside it.
        moments = part_of(statistics, 2 * r, 2 * rows)
        find_moments(moments, u, rows, columns, not (short or after), whole, rms, eps)
        if after:
            normalise(u, rows, columns, moments, gain, shift)
        else:
            store_normalised(out, at, count, u, rows, columns, moments, gain, shift)
        if after and residual[0] != 0:
            add_selected(residual, at, count, u, kept, last, factor)
            store(out, at, count, u)
        elif after:
            store_selected(out, at, count, u, kept, last, factor)
        r += rows
    release(memory)


@summing_kernel
def backward(start, stop, given, columns, decisions, scale, results, options, sums):
    """Gradients from the rows from start to stop.

    ``given`` are the seed, dout, dstream, stream, x, the pairs (mean, rstd), bias, layer_scale and
    weight. ``results`` are dx and dresidual. ``options`` are as in :func:`forward`, without eps.
    ``sums`` say where the gradients of bias, layer_scale, weight and norm_bias go, see
    :func:`summing_kernel`.
    """
    seed, dout, dstream, stream, x, (found, _), (bias, _), (layer_scale, _), weight = given
    dx, dresidual = results
    dbias, dscale = sum_of_part(sums, 0, start), sum_of_part(sums, 1, start)
    dweight, dnorm_bias = sum_of_part(sums, 2, start), sum_of_part(sums, 3, start)
    rms, after, centred = options
    width = bits_of_row(columns)
    memory = scratch(4 * STRIP + 6 * width)
    bits, words = randoms(memory, width, decisions[4])
    d, u = rows_of_scratch(memory, 1, columns), rows_of_scratch(memory, 2, columns)
    gain = rows_of_scratch(memory, 3, columns)
    of_weight, of_bias = rows_of_scratch(memory, 4, columns), rows_of_scratch(memory, 5, columns)
    statistics = vector(found, 2 * stop, np.float32)
    gains(weight, centred, gain[:columns])
    fill(of_weight, columns, _ZERO)
    fill(of_bias, columns, _ZERO)
    clear(dbias, NOTHING, columns)
    clear(dscale, NOTHING, columns)
    r = start
    while r < stop:
        rows, lane = row_bits(bits, words, seed, decisions, r, stop, columns)
        last, factor = last_and_factor(decisions, scale, r)
        at, count = r * columns, rows * columns
        kept = part_of(bits, lane, count)
        load(dout, at, count, d)
        if after:
            select(d, count, kept, last, factor)
        load(stream, at, count, u)
        moments = part_of(statistics, 2 * r, 2 * rows)
        differentiate(d, u, rows, columns, moments, gain, of_weight, of_bias, rms)
        if dstream[0] != 0:
            load(dstream, at, count, u)
            add(d, count, u)
        if after:
            if dx[0] != 0:
                store(dx, at, count, d)
            accumulate(dbias, NOTHING, rows, columns, d)
        else:
            if dresidual[0] != 0:
                store(dresidual, at, count, d)
            if dscale != 0:
                load(x, at, count, u)
                add_vector(u, rows, columns, bias, NOTHING)
                multiply(u, count, d)
                accumulate_selected(dscale, NOTHING, rows, columns, u, kept, last, factor)
            multiply_vector(d, rows, columns, layer_scale, NOTHING)
            accumulate_selected(dbias, NOTHING, rows, columns, d, kept, last, factor)
            if dx[0] != 0:
                store_selected(dx, at, count, d, kept, last, factor)
        r += rows
    if dweight != 0:
        copy(of_weight, columns, vector(dweight, columns, np.float32))
    if dnorm_bias != 0:
        copy(of_bias, columns, vector(dnorm_bias, columns, np.float32))
    release(memory)
