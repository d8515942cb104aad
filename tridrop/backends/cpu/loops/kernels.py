"""Kernels: what Python calls, for a part of the rows or for all of them in several threads."""

from __future__ import annotations

import numpy as np
from llvmlite import ir as llvm
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .decorators import NOTHING, OUTER, apart, build_call, cached, inline, written_out
from .memory import release, scratch, vector
from .operands import place, places
from .steps import behind
from .storage import store


def kernel(function):
    """A function ``(start, stop, given, *arguments)`` of a part of the rows, for Python to call.

    Python calls ``(team, work, given, wanted, arguments)``. ``given`` and ``wanted`` are two
    numbers for each tensor that is read, see operands.py; the function of a part gets their
    matrices. The result is 0, or less if one of the tensors is not what is wanted: then nothing was
    done. The rest is that of :func:`run_parts`. It is compiled at its first call, or loaded from
    the cache.
    """
    of_part = inline(set())(function)

    def call(team, work, given, wanted, arguments):
        lowest, matrices = places(place, team[2], given, wanted)
        if lowest == 0:
            run_parts(of_part, team, work, (matrices, *arguments))
        return lowest

    return named(call, function)


def summing_kernel(function):
    """A :func:`kernel` that sums over the rows as well; its last argument says where.

    That is ``(rows of a part, number of parts, sums)``. A sum is (address, numbers, result): each
    part leaves its own sums at the address, in fp32, those of one part behind those of another; and
    the result, a matrix with one row, gets the sum of all parts. An absent sum has the address 0.
    The fifth number of ``work`` says whether the results are due: 0 where other parts are yet to be
    done.
    """
    of_part = inline(set())(function)

    def call(team, work, given, wanted, arguments):
        lowest, matrices = places(place, team[2], given, wanted)
        if lowest == 0:
            run_parts(of_part, team, work, (matrices, *arguments))
            if work[4] != 0:
                add_parts(arguments[-1])
        return lowest

    return named(call, function)


def named(call, function):
    """``call``, which Python calls by the name of a function: compiled when it is needed."""
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(call, name, getattr(function, name))
    return cached(njit(no_cfunc_wrapper=True, **OUTER)(call), call)


@written_out
def sum_of_part(sums, number, start):
    """The address of a part's own sum; the part begins with the row ``start``."""
    return behind(sums[2][number][0], start // sums[0] * sums[2][number][1])


@apart(set())
def add_parts(sums):
    """Fill the results with the sums of all parts, in fp64 and in their order."""
    count = sums[1]
    for address, width, result in sums[2]:
        if address == 0:
            continue
        memory = scratch(2 * width)
        total, first = vector(memory, width, np.float64), vector(address, width, np.float32)
        for j in range(width):
            total[j] = first[j]
        for number in range(1, count):
            part = vector(behind(address, number * width), width, np.float32)
            for j in range(width):
                total[j] += part[j]
        for j in range(width):
            first[j] = np.float32(total[j])
        store(result, NOTHING, width, first)
        release(memory)


@intrinsic
def run_parts(context, kernel, team, work, arguments):
    """Call ``kernel(start, stop, *arguments)`` for all parts of the rows.

    ``work`` says which: the first part's number and the one after the last, how many rows there
    are, and how many of them a part has; the fifth number is for :func:`summing_kernel`. ``team``
    is the address of ``GOMP_parallel``, a number of threads (with 2 or more, each takes one part
    after another until none is left), and torch's table.
    """
    index = types.int64
    given = (index, index, *arguments.types)
    kernel.get_call_type(context, given, {})
    found = kernel.dispatcher.overloads[given]

    def build(context, builder, signature, values):
        word, byte = llvm.IntType(64), llvm.IntType(8).as_pointer()
        team, work, arguments = values[1:]
        # What the threads share: the number of the next part, and the values of this call.
        kind = llvm.LiteralStructType([work.type, arguments.type])
        shared = cgutils.alloca_once(builder, kind)
        builder.store(work, cgutils.gep_inbounds(builder, shared, 0, 0))
        builder.store(arguments, cgutils.gep_inbounds(builder, shared, 0, 1))
        name = f"{found.fndesc.mangled_name}.parts"
        turn = llvm.Function(builder.module, llvm.FunctionType(llvm.VoidType(), [byte]), name)
        turn.linkage = "internal"
        _build_turn(context, turn, kind, found, signature.args[-1])
        data = builder.bitcast(shared, byte)
        address, threads = (builder.extract_value(team, i) for i in range(2))
        with builder.if_else(builder.icmp_signed("<", threads, word(2))) as (alone, together):
            with alone:
                builder.call(turn, [data])
            with together:
                count = llvm.IntType(32)
                parallel = llvm.FunctionType(
                    llvm.VoidType(), [turn.type, byte, count, count]
                ).as_pointer()
                builder.call(
                    builder.inttoptr(address, parallel),
                    [turn, data, builder.trunc(threads, count), count(0)],
                )
        return context.get_dummy_value()

    return types.void(kernel, team, work, arguments), build


def _build_turn(context, turn, kind, kernel, arguments):
    """The body of what each thread of a team does: take parts until none is left."""
    entry, again, take, leave = (
        turn.append_basic_block(name) for name in ("entry", "again", "take", "leave")
    )
    builder = llvm.IRBuilder(entry)
    shared = builder.bitcast(turn.args[0], kind.as_pointer())
    next_part, end, rows, step = (cgutils.gep_inbounds(builder, shared, 0, 0, i) for i in range(4))
    end, rows, step = map(builder.load, (end, rows, step))
    given = builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))
    given = cgutils.unpack_tuple(builder, given, len(arguments))
    builder.branch(again)
    builder.position_at_end(again)
    number = builder.atomic_rmw("add", next_part, llvm.IntType(64)(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", number, end), take, leave)
    builder.position_at_end(take)
    start = builder.mul(number, step)
    stop = builder.add(start, step)
    stop = builder.select(builder.icmp_signed("<", stop, rows), stop, rows)
    build_call(context, builder, kernel, [start, stop, *given])
    builder.branch(again)
    builder.position_at_end(leave)
    builder.ret_void()
