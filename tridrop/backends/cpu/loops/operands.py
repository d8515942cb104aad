"""How a kernel finds the elements of the tensors that it reads, and makes sure that they are there.

Python gives two numbers for each tensor, of which a first one of 0 stands for an absent tensor:
(address, dtype code), which says where its elements are; or (handle, wanted). The handle is torch's
own object, ``t._cdata``: the kernel asks torch about it by the functions of torch_library.py, which
takes a tenth of the time that it takes to ask from Python. ``wanted`` is the address of the
operand's description: ``Operand.description`` in cpu/memory.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import torch_library as library
from .decorators import part
from .memory import vector
from .storage import BF16, FP16, FP32


@intrinsic
def ask(context, function, handle):
    """What a function of torch's C interface says of a tensor; -1 where it raises."""

    def build(context, builder, signature, arguments):
        word = llvm.IntType(64)
        # torch takes the address of a Tensor, which is nothing but the handle.
        tensor = cgutils.alloca_once(builder, word)
        answer = cgutils.alloca_once(builder, word)
        builder.store(arguments[1], tensor)
        builder.store(word(0), answer)  # some answers are shorter than a word
        kind = llvm.FunctionType(llvm.IntType(32), [word.as_pointer()] * 2).as_pointer()
        error = builder.call(builder.inttoptr(arguments[0], kind), [tensor, answer])
        good = builder.icmp_signed("==", error, llvm.IntType(32)(0))
        return builder.select(good, builder.load(answer), word(-1))

    return types.int64(types.int64, types.int64), build


@intrinsic
def is_negated(context, function, handle):
    """Whether a tensor is lazily negated: then its elements are not the numbers in its memory."""

    def build(context, builder, signature, arguments):
        word, byte = llvm.IntType(64), llvm.IntType(8)
        tensor = cgutils.alloca_once(builder, word)
        builder.store(arguments[1], tensor)
        kind = llvm.FunctionType(byte, [word.as_pointer()]).as_pointer()
        answer = builder.call(builder.inttoptr(arguments[0], kind), [tensor])
        return builder.trunc(answer, llvm.IntType(1))

    return types.boolean(types.int64, types.int64), build


@part(set())
def place(table, given, wanted):
    """The (address, dtype code) of a tensor; the code is -1 if it is not what is wanted.

    Wanted is a contiguous tensor on the CPU, not negated, of certain dtypes, whose storage has so
    many elements; if it was saved, with the dtype and sizes that it had then. ``place`` and
    ``as_saved`` in base/memory.py make the same checks: they say what is wrong, or make a copy.
    """
    if wanted <= FP16:  # the highest code, and no address
        return given, wanted
    want = vector(wanted, library.DESCRIBED, np.int64)
    dimensions = want[library.OF_DIM]
    if given == 0:
        return given, (-1 if dimensions >= 0 else 0)
    torch = vector(table, library.COLUMNS, np.int64)
    dtype, code, size = ask(torch[library.DTYPE], given), -1, 4
    if want[library.KIND] == library.SEED:
        if dtype == torch[library.INT64]:
            code, size = 0, 8
    elif dtype == torch[library.FP32]:
        code = FP32
    elif want[library.KIND] != library.NUMBERS:
        size = 2
        if dtype == torch[library.BF16]:
            code = BF16
        elif dtype == torch[library.FP16]:
            code = FP16
    if code < 0 or ask(torch[library.DEVICE], given) != torch[library.CPU]:
        return 0, -1
    if ask(torch[library.CONTIGUOUS], given) != 1 or is_negated(torch[library.NEG], given):
        return 0, -1
    end = (ask(torch[library.OFFSET], given) + want[library.COUNT]) * size
    if end > ask(torch[library.BYTES], given):
        return 0, -1
    if dimensions >= 0:
        if dtype != want[library.OF_DTYPE] or ask(torch[library.DIM], given) != dimensions:
            return 0, -1
        sizes = vector(ask(torch[library.SIZES], given), dimensions, np.int64)
        saved = vector(wanted + 8 * library.DESCRIBED, dimensions, np.int64)
        for i in range(dimensions):
            if sizes[i] != saved[i]:
                return 0, -1
    address = ask(torch[library.ADDRESS], given)
    return address, (code if address > 0 else -1)


@intrinsic
def places(context, function, table, given, wanted):
    """:func:`place`, the ``function``, of all tensors: (the lowest code, the matrices)."""
    taken = (types.int64,) * 3
    function.get_call_type(context, taken, {})
    found = function.dispatcher.overloads[taken]
    matrix, count = found.signature.return_type, given.count
    result = types.Tuple((types.int64, types.UniTuple(matrix, count)))

    def build(context, builder, signature, arguments):
        context.add_linking_libs([found.library])
        called = context.declare_function(builder.module, found.fndesc)
        lowest, matrices = llvm.IntType(64)(0), []
        for i in range(count):
            numbers = [builder.extract_value(each, i) for each in arguments[2:]]
            _, made = context.call_conv.call_function(
                builder, called, matrix, found.signature.args, [arguments[1], *numbers]
            )
            code = builder.extract_value(made, 1)
            lowest = builder.select(builder.icmp_signed("<", code, lowest), code, lowest)
            matrices.append(made)
        matrices = context.make_tuple(builder, signature.return_type[1], matrices)
        return context.make_tuple(builder, signature.return_type, [lowest, matrices])

    return result(function, types.int64, given, wanted), build
