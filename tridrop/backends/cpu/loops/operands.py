"""How a kernel finds the elements of the tensors that it reads, and makes sure that they are there.

Python gives two numbers for each tensor, of which a first one of 0 stands for an absent tensor:
(address, dtype code), which says where its elements are; or (handle, wanted). The handle is torch's
own object, ``t._cdata``: the kernel asks torch about it by the functions of torch_library.py, which
takes a tenth of the time that it takes to ask from Python. ``wanted`` is the address of the
operand's description: ``Operand.description`` in cpu/memory.py.
"""

from __future__ import annotations

from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..torch_library import (
    ADDRESS,
    BYTES,
    CODES,
    CONTIGUOUS,
    CPU,
    DESCRIBED,
    DEVICE,
    DIM,
    DTYPE,
    DTYPES,
    NEG,
    NUMEL,
    OF_DIM,
    OFFSET,
    SIZES,
    WIDTHS,
)  # fmt: skip
from .decorators import build_call, part

_WORD, _BYTE = llvm.IntType(64), llvm.IntType(8)
_WORDS = types.int64(types.int64, types.int64)


def word_at(builder, address, number):
    """The word of this number, of those at an address."""
    found = builder.inttoptr(address, _WORD.as_pointer())
    return builder.load(builder.gep(found, [number]))


@intrinsic
def word(context, address, number):
    """The word of this number, of those at an address."""
    return _WORDS, lambda context, builder, signature, arguments: word_at(builder, *arguments)


def function_at(builder, table, number, kind):
    """The function whose address is the table's word of this number, for other intrinsics."""
    return builder.inttoptr(word_at(builder, table, _WORD(number)), kind.as_pointer())


@intrinsic
def ask(context, table, number, handle):
    """What a function of torch's C interface says of a tensor; -1 where it raises."""

    def build(context, builder, signature, arguments):
        table, number, handle = arguments
        # torch takes the address of a Tensor, which is nothing but the handle.
        tensor = cgutils.alloca_once_value(builder, handle)
        answer = cgutils.alloca_once(builder, _WORD)
        builder.store(_WORD(0), answer)  # some answers are shorter than a word
        kind = llvm.FunctionType(llvm.IntType(32), [_WORD.as_pointer()] * 2).as_pointer()
        address = builder.inttoptr(word_at(builder, table, number), kind)
        error = builder.call(address, [tensor, answer])
        good = builder.icmp_signed("==", error, llvm.IntType(32)(0))
        return builder.select(good, builder.load(answer), _WORD(-1))

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic
def is_negated(context, table, handle):
    """Whether a tensor is lazily negated: then its elements are not the numbers in its memory."""

    def build(context, builder, signature, arguments):
        table, handle = arguments
        tensor = cgutils.alloca_once_value(builder, handle)
        kind = llvm.FunctionType(_BYTE, [_WORD.as_pointer()]).as_pointer()
        address = builder.inttoptr(word_at(builder, table, _WORD(NEG)), kind)
        return builder.trunc(builder.call(address, [tensor]), llvm.IntType(1))

    return types.boolean(types.int64, types.int64), build


@intrinsic
def are_equal(context, first, second, count):
    """Whether there are the same words at two addresses."""

    def build(context, builder, signature, arguments):
        pointers = [builder.inttoptr(each, _BYTE.as_pointer()) for each in arguments[:2]]
        kind = llvm.FunctionType(llvm.IntType(32), [_BYTE.as_pointer()] * 2 + [_WORD])
        compare = cgutils.get_or_insert_function(builder.module, kind, "memcmp")
        found = builder.call(compare, [*pointers, builder.mul(arguments[2], _WORD(8))])
        return builder.icmp_signed("==", found, llvm.IntType(32)(0))

    return types.boolean(types.int64, types.int64, types.int64), build


@part(set())
def place(table, given, wanted):
    """The (address, dtype code) of a tensor; the code is -1 if it is not what is wanted.

    Wanted is a contiguous tensor on the CPU, not negated, of certain dtypes, whose storage has so
    many elements; if it was saved, with the dtype and sizes that it had then. ``place`` and
    ``as_saved`` in base/memory.py make the same checks: they say what is wrong, or make a copy.
    """
    if wanted < CODES:  # it is a code, and no address
        return given, wanted
    dimensions = word(wanted, OF_DIM)
    if given == 0:
        return given, (-1 if dimensions >= 0 else 0)
    dtype, code = ask(table, DTYPE, given), 0
    while dtype != word(wanted, DTYPES + code):
        code += 1
        if code == CODES:
            return 0, -1
    if ask(table, DEVICE, given) != word(table, CPU) or is_negated(table, given):
        return 0, -1
    end = (ask(table, OFFSET, given) + word(wanted, NUMEL)) * word(wanted, WIDTHS + code)
    if ask(table, CONTIGUOUS, given) != 1 or end > ask(table, BYTES, given):
        return 0, -1
    if dimensions >= 0:
        if ask(table, DIM, given) != dimensions:
            return 0, -1
        if not are_equal(ask(table, SIZES, given), wanted + 8 * DESCRIBED, dimensions):
            return 0, -1
    address = ask(table, ADDRESS, given)
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
        lowest, matrices = llvm.IntType(64)(0), []
        for i in range(count):
            numbers = [builder.extract_value(each, i) for each in arguments[2:]]
            made = build_call(context, builder, found, [arguments[1], *numbers])
            code = builder.extract_value(made, 1)
            lowest = builder.select(builder.icmp_signed("<", code, lowest), code, lowest)
            matrices.append(made)
        matrices = context.make_tuple(builder, signature.return_type[1], matrices)
        return context.make_tuple(builder, signature.return_type, [lowest, matrices])

    return result(function, types.int64, given, wanted), build
