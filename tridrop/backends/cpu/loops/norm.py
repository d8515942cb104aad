"""The norm family for CPUs, forward and backward in one pass each over rows that stay in the cache.

The formulas are those of ``backends/reference/norm.py``, the rounding too: fp32 within, the stream
rounded to its dtype before it is normalised. Arguments are as in ``loops/elementwise.py``.
"""

from __future__ import annotations

import numpy as np

from .elementwise import give, load_biased
from .mask import (
    LANES,
    LINE,
    STRIP,
    cut,
    held,
    inline,
    kernel,
    next_piece,
    randoms,
    rule,
    scratch,
    vector,
)
from .steps import (
    ANY_ORDER,
    accumulate,
    accumulate_selected,
    add,
    clear,
    fill,
    multiply,
    multiply_vector,
    row_of,
    select,
    total,
)
from .storage import add_selected, load, of_kind, store, store_rounded, store_selected

_ZERO, _ONE = np.float32(0), np.float32(1)


@inline(ANY_ORDER)
def squares(u, mean):
    found = _ZERO
    for j in range(u.size):
        found += (u[j] - mean) * (u[j] - mean)
    return found


@inline(set())
def find_moments(statistics, u, rows, columns, summed, whole, rms, eps):
    """mean and rstd of the rows, side by side; ``whole`` is the sum of the only one if summed."""
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


@of_kind(set())
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
    """Normalise a row of the stream, and make the sums over the rows and along this one.

    Those along it are of d * gain * u and of d * gain.
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
    """The gradients of rows of the stream ``u`` take the place of those of their affine parts, d.

    The sums over the rows are added to.
    """
    size = np.float32(columns)
    for k in range(rows):
        v, n = row_of(d, k, columns), row_of(u, k, columns)
        mean, rstd = statistics[2 * k], statistics[2 * k + 1]
        along, whole = gather(v, n, mean, rstd, gain, dweight, dbias)
        project(v, n, gain, along / size, _ZERO if rms else whole / size, rstd)


@inline(set())
def gains(weight, centred, into):
    """into = what a norm multiplies by: the weight, or that and 1; 1 where there is none."""
    if weight[0] == 0:
        fill(into, into.size, _ONE)
        return
    load(weight, 0, into.size, into)
    if centred:
        for j in range(into.size):
            into[j] += _ONE


@inline(set())
def bits_of_row(columns):
    """How many bits a row takes, which may begin and end inside a group, or several short ones."""
    return max(STRIP * LANES, (columns // LINE + 2) * LINE)


@inline(set())
def rows_of_scratch(memory, k, columns):
    """Array number k, of a row or several short ones, as many as there are bits."""
    width = bits_of_row(columns)
    return cut(memory, 4 * STRIP + k * width, width, np.float32)


@inline(set())
def row_bits(bits, words, mask, row, stop, columns):
    """Make the bits of a whole row, or of several short ones: (rows, lane)."""
    rows, lane, done = next_piece(bits, words, mask, row, 0, stop, columns)
    while done < columns:
        done += next_piece(bits[lane + done :], words, mask, row, done, stop, columns)[2]
    return rows, lane


@kernel
def forward(start, stop, columns, mask, scale, out, x, stream, residual, found, vectors, options):
    """out, stream, and mean and rstd of the rows from start to stop.

    ``found`` is the address of the last two, side by side; ``vectors`` are bias,
    layer_scale, weight, norm_bias, the last two as matrices of a row; ``options`` whether it is
    RMSNorm, whether the dropout comes after the norm, whether 1 is added to the weight, and eps.
    Where the stream is not kept, only its kind counts.
    """
    bias, layer_scale, weight, norm_bias = vectors
    rms, after, centred, eps = options
    width = bits_of_row(columns)
    memory = scratch(4 * STRIP + 5 * width)
    bits, words = randoms(memory, width, mask[5])
    u, spare = rows_of_scratch(memory, 1, columns), rows_of_scratch(memory, 2, columns)
    gain, shift = rows_of_scratch(memory, 3, columns), rows_of_scratch(memory, 4, columns)
    statistics = vector(found, 2 * stop, np.float32)
    short = 2 * columns <= STRIP * LANES
    gains(weight, centred, gain[:columns])
    fill(shift, columns, _ZERO)
    if norm_bias[0] != 0:
        load(norm_bias, 0, columns, shift)
    unkept = (spare.ctypes.data, stream[1])
    r = start
    while r < stop:
        rows, lane = row_bits(bits, words, mask, r, stop, columns)
        last, factor = rule(mask, scale, r)
        at, count, whole = r * columns, rows * columns, _ZERO
        kept = bits[lane : lane + count]
        load_biased(x, bias, r, rows, columns, 0, columns, u)
        if not after:
            multiply_vector(u, rows, columns, layer_scale, 0)
            if residual[0] != 0:
                add_selected(residual, at, count, u, kept, last, factor)
            else:
                select(u, count, kept, last, factor)
            # What is normalised is what backward reads.
            if stream[0] != 0:
                whole = store_rounded(stream, at, count, u)
            else:
                whole = store_rounded(unkept, 0, count, u)
        # Not by the number of rows: a row's sum is always the same.
        moments = statistics[2 * r : 2 * (r + rows)]
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
    held(memory)


@kernel
def backward(start, stop, columns, mask, scale, given, found, vectors, results, sums, options):
    """Gradients of the rows from start to stop.

    ``given`` are dout, dstream, stream and x; ``found`` and ``vectors`` as in :func:`forward`,
    without norm_bias; ``results`` dx and dresidual; ``sums`` where the gradients of bias,
    layer_scale, weight and norm_bias go, of these rows alone, the last two as matrices of a row;
    ``options`` as in :func:`forward`, without eps.
    """
    dout, dstream, stream, x = given
    bias, layer_scale, weight = vectors
    dx, dresidual = results
    dbias, dscale, dweight, dnorm_bias = sums
    rms, after, centred = options
    width = bits_of_row(columns)
    memory = scratch(4 * STRIP + 6 * width)
    bits, words = randoms(memory, width, mask[5])
    d, u = rows_of_scratch(memory, 1, columns), rows_of_scratch(memory, 2, columns)
    gain = rows_of_scratch(memory, 3, columns)
    of_weight, of_bias = rows_of_scratch(memory, 4, columns), rows_of_scratch(memory, 5, columns)
    statistics = vector(found, 2 * stop, np.float32)
    gains(weight, centred, gain[:columns])
    fill(of_weight, columns, _ZERO)
    fill(of_bias, columns, _ZERO)
    clear(dbias, 0, columns)
    clear(dscale, 0, columns)
    r = start
    while r < stop:
        rows, lane = row_bits(bits, words, mask, r, stop, columns)
        last, factor = rule(mask, scale, r)
        at, count = r * columns, rows * columns
        kept = bits[lane : lane + count]
        load(dout, at, count, d)
        if after:
            select(d, count, kept, last, factor)
        load(stream, at, count, u)
        moments = statistics[2 * r : 2 * (r + rows)]
        differentiate(d, u, rows, columns, moments, gain, of_weight, of_bias, rms)
        if dstream[0] != 0:
            load(dstream, at, count, u)
            add(d, count, u)
        if after:
            if dx[0] != 0:
                store(dx, at, count, d)
            accumulate(dbias, 0, rows, columns, d)
        else:
            if dresidual[0] != 0:
                store(dresidual, at, count, d)
            if dscale != 0:
                load_biased(x, bias, r, rows, columns, 0, columns, u)
                multiply(u, count, d)
                accumulate_selected(dscale, 0, rows, columns, u, kept, last, factor)
            multiply_vector(d, rows, columns, layer_scale, 0)
            give(dx, dbias, r, rows, columns, 0, columns, d, kept, last, factor)
        r += rows
    if dweight[0] != 0:
        store(dweight, 0, columns, of_weight)
    if dnorm_bias[0] != 0:
        store(dnorm_bias, 0, columns, of_bias)
    held(memory)
