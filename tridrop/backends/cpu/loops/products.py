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
from .decorators import inline, part, written_out
from .kernels import called, run_parts
from .memory import release, scratch, vector
from .operands import ask, function_at, is_negated, word, word_at

_WORD, _INT, _DOUBLE = llvm.IntType(64), llvm.IntType(32), llvm.DoubleType()
_WORDS, _BYTES = _WORD.as_pointer(), llvm.IntType(8).as_pointer()
# create_tensor_from_blob(data, dimensions, sizes, strides, offset, dtype, device, its index, made)
_CREATE = llvm.FunctionType(_INT, [_BYTES, _WORD, _WORDS, _WORDS, _WORD, _INT, _INT, _INT, _WORDS])
_ADD = llvm.FunctionType(_INT, [_WORD, _WORD, _WORD, _WORD, _DOUBLE, _DOUBLE])
_DELETE = llvm.FunctionType(_INT, [_WORD])


@part(set())
def lie(table, given):
    """(address, sizes and strides) of a tensor [B, H, M, N], nine numbers in all.

    The address is 0 unless it is an fp32 tensor on the CPU, not negated, whose elements are all
    inside its storage.
    """
    if ask(table, DEVICE, given) != word(table, CPU) or is_negated(table, given):
        return 0, 0, 0, 0, 0, 0, 0, 0, 0
    if ask(table, DTYPE, given) != word(table, FLOAT) or ask(table, DIM, given) != 4:
        return 0, 0, 0, 0, 0, 0, 0, 0, 0
    sizes, strides = ask(table, SIZES, given), ask(table, STRIDES, given)
    end, least = ask(table, OFFSET, given) + 1, 1
    for i in range(4):
        end += (word(sizes, i) - 1) * word(strides, i)
        least = min(least, word(sizes, i))
    if least < 1 or 4 * end > ask(table, BYTES, given):
        return 0, 0, 0, 0, 0, 0, 0, 0, 0
    return (
        ask(table, ADDRESS, given),
        word(sizes, 0), word(sizes, 1), word(sizes, 2), word(sizes, 3),
        word(strides, 0), word(strides, 1), word(strides, 2), word(strides, 3),
    )  # fmt: skip


@written_out
def matrix_of(tensor, sample, head):
    """(address, rows, columns, and their strides) of one head's matrix."""
    first = sample * tensor[5] + head * tensor[6]
    return tensor[0] + 4 * first, tensor[3], tensor[4], tensor[7], tensor[8]


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


@inline(set())
def products_of(start, stop, table, failed, out, left, right, beta, alpha):
    """The products of the heads from start to stop; what torch raises is left at ``failed``."""
    for number in range(start, stop):
        sample, head = number // out[2], number % out[2]
        error = add_product(
            table,
            matrix_of(out, sample, head),
            matrix_of(left, sample, head),
            matrix_of(right, sample, head),
            beta,
            alpha,
        )
        if error != 0:
            vector(failed, 1, np.int64)[0] = error


@called
def multiply(team, out, left, right, beta, alpha):
    """out = beta * out + alpha * left @ right, of three tensors [B, H, M, K] by their handles.

    The result is 0. It is -1 if one of them is not what :func:`lie` takes, or if their sizes do not
    fit: then nothing was done. It is another number if torch raised. ``team`` is as in
    :func:`run_parts`.
    """
    table = team[2]
    into, first, second = lie(table, out), lie(table, left), lie(table, right)
    if into[0] <= 0 or first[0] <= 0 or second[0] <= 0:
        return -1
    if into[1:3] != first[1:3] or into[1:3] != second[1:3]:
        return -1
    if into[3] != first[3] or first[4] != second[3] or into[4] != second[4]:
        return -1
    memory, count = scratch(2), into[1] * into[2]
    failed = vector(memory, 1, np.int64)
    failed[0] = 0
    work = 0, count, count, 1, 1
    run_parts(products_of, team, work, (table, memory, into, first, second, beta, alpha))
    found = failed[0]
    release(memory)
    return found
