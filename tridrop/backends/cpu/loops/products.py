"""Products of the matrices of heads by torch, each in one thread and several at a time.

``torch.baddbmm`` multiplies one pair of matrices after another where the results are not one block
of memory, as where the heads of a token are adjacent, and shares each product among all threads.
But the matrices of a head are small: at 256 tokens and 64 columns, two threads take 0.7 of the time
of one. Here each thread multiplies whole matrices, by torch's function for two matrices.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..torch_library import (
    ADD_PRODUCT,
    ADDRESS,
    BYTES,
    CPU,
    CREATE,
    DELETE,
    DEVICE,
    DIM,
    DTYPE,
    FLOAT,
    OFFSET,
    SIZES,
    STRIDES,
)
from .decorators import NOTHING, apart, inline, part, written_out
from .kernels import named, run_parts
from .memory import release, scratch, vector
from .operands import ask, function_at, is_negated, place, places, word, word_at

_WORD, _INT, _DOUBLE = llvm.IntType(64), llvm.IntType(32), llvm.DoubleType()
_WORDS, _BYTES = _WORD.as_pointer(), llvm.IntType(8).as_pointer()
# create_tensor_from_blob(data, dimensions, sizes, strides, offset, dtype, device, its index, made)
_CREATE = llvm.FunctionType(_INT, [_BYTES, _WORD, _WORDS, _WORDS, _WORD, _INT, _INT, _INT, _WORDS])
_ADD = llvm.FunctionType(_INT, [_WORD, _WORD, _WORD, _WORD, _DOUBLE, _DOUBLE])
_DELETE = llvm.FunctionType(_INT, [_WORD])


@part(set())
def lie(table, given, _):
    """(address, code, sizes and strides) of a tensor [B, H, M, N] by its handle, ten numbers.

    The code is 0, or -1 unless it is an fp32 tensor on the CPU, not negated, whose elements are all
    inside its storage. An absent tensor has the handle 0 and the address 0.
    """
    if given == 0:
        return 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    if ask(table, DEVICE, given) != word(table, CPU) or is_negated(table, given):
        return 0, -1, 0, 0, 0, 0, 0, 0, 0, 0
    if ask(table, DTYPE, given) != word(table, FLOAT) or ask(table, DIM, given) != 4:
        return 0, -1, 0, 0, 0, 0, 0, 0, 0, 0
    sizes, strides = ask(table, SIZES, given), ask(table, STRIDES, given)
    end, least = ask(table, OFFSET, given) + 1, 1
    for i in range(4):
        end += (word(sizes, i) - 1) * word(strides, i)
        least = min(least, word(sizes, i))
    if least < 1 or 4 * end > ask(table, BYTES, given):
        return 0, -1, 0, 0, 0, 0, 0, 0, 0, 0
    address = ask(table, ADDRESS, given)
    return (
        address, 0 if address > 0 else -1,
        word(sizes, 0), word(sizes, 1), word(sizes, 2), word(sizes, 3),
        word(strides, 0), word(strides, 1), word(strides, 2), word(strides, 3),
    )  # fmt: skip


@written_out
def rows_of(tensor, sample, head, first, count):
    """(address, rows, columns, and their strides) of some rows of one head's matrix."""
    begin = sample * tensor[6] + head * tensor[7] + first * tensor[8]
    return tensor[0] + 4 * begin, count, tensor[5], tensor[8], tensor[9]


@written_out
def from_column(matrix, first):
    """The columns of a matrix from ``first`` on."""
    return matrix[0] + 4 * first * matrix[4], matrix[1], matrix[2], matrix[3], matrix[4]


@written_out
def turned(matrix):
    """The transposed matrix."""
    return matrix[0], matrix[2], matrix[1], matrix[4], matrix[3]


@intrinsic
def add_product(context, table, out, left, right, beta, alpha):
    """out = beta * out + alpha * left @ right, of three matrices; not 0 where torch raised."""

    def build(context, builder, signature, arguments):
        table, *matrices, beta, alpha = arguments
        failed, tensors = _INT(0), []
        kind = [builder.trunc(word_at(builder, table, _WORD(i)), _INT) for i in (FLOAT, CPU)]
        for matrix in matrices:
            address, *numbers = (builder.extract_value(matrix, i) for i in range(5))
            dims = cgutils.alloca_once(builder, llvm.ArrayType(_WORD, 4))
            for i, value in enumerate(numbers):
                builder.store(value, cgutils.gep_inbounds(builder, dims, 0, i))
            sizes, strides = (cgutils.gep_inbounds(builder, dims, 0, i) for i in (0, 2))
            made = cgutils.alloca_once(builder, _WORD)
            builder.store(_WORD(0), made)
            error = builder.call(
                function_at(builder, table, CREATE, _CREATE),
                [
                    builder.inttoptr(address, _BYTES), _WORD(2), sizes, strides, _WORD(0),
                    *kind, _INT(0), made,
                ],
            )  # fmt: skip
            failed = builder.or_(failed, error)
            tensors.append(builder.load(made))
        result = cgutils.alloca_once_value(builder, failed)
        with builder.if_then(builder.icmp_signed("==", failed, _INT(0)), likely=True):
            out, left, right = tensors
            multiply = function_at(builder, table, ADD_PRODUCT, _ADD)
            builder.store(builder.call(multiply, [out, out, left, right, beta, alpha]), result)
        for tensor in tensors:
            with builder.if_then(builder.icmp_signed("!=", tensor, _WORD(0)), likely=True):
                builder.call(function_at(builder, table, DELETE, _DELETE), [tensor])
        return builder.sext(builder.load(result), _WORD)

    return types.int64(table, out, left, right, beta, alpha), build


@apart(set())
def product(call, out, left, right, beta, alpha):
    """:func:`add_product`; ``call`` is torch's table, and where a number other than 0 is left."""
    error = add_product(call[0], out, left, right, beta, alpha)
    if error != 0:
        vector(call[1], 1, np.int64)[0] = error


def multiplying(function):
    """Make what Python calls of a function ``(start, stop, given, *arguments, tensors, call)``.

    Python calls it as :func:`tridrop.backends.cpu.loops.kernels.kernel` says, with one more
    argument, the handles of tensors [B, H, M, N]. The function gets what :func:`lie` says of them,
    and what :func:`product` takes. The result is also less than 0 where ``lie`` refuses one, and
    more than 0 where torch could not multiply.
    """
    of_part = inline(set())(function)

    def call(team, work, given, wanted, arguments):
        table, handles = team[2], arguments[-1]
        lowest, matrices = places(place, table, given, wanted)
        lowest_code, tensors = places(lie, table, handles, handles)
        if lowest != 0 or lowest_code != 0:
            return -1
        memory = scratch(2)
        failed = vector(memory, 1, np.int64)
        failed[0] = 0
        run_parts(of_part, team, work, (matrices, *arguments[:-1], tensors, (table, memory)))
        found = failed[0]
        release(memory)
        return found

    return named(call, function)


@multiplying
def multiply(start, stop, given, beta, alpha, tensors, call):
    """out = beta * out + alpha * left @ right, of three tensors, for the heads from start to stop.

    Nothing else is ``given``. The sizes of the tensors fit.
    """
    out, left, right = tensors
    for number in range(start, stop):
        sample, head = number // out[3], number % out[3]
        product(
            call,
            rows_of(out, sample, head, NOTHING, out[4]),
            rows_of(left, sample, head, NOTHING, left[4]),
            rows_of(right, sample, head, NOTHING, right[4]),
            beta,
            alpha,
        )
