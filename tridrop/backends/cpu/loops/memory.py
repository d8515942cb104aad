"""Memory by its address: arrays in it, scratch memory for a kernel, and the bits of numbers.

These are intrinsics, which numba puts into the functions that use them. ``carray``, ``np.empty``
and ``view`` do the same by two to four functions of numba for each dtype, whose compilation was a
sixth of the first dropout's. An array by address has no owner: if it had one, numba would count
references atomically wherever it goes into a tuple.
"""

from __future__ import annotations

from llvmlite import ir as llvm
from numba import types
from numba.core.runtime.context import NRTContext
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, np_cfarray

LINE = 16  # words of a cache line
_WORD, _POINTER = llvm.IntType(64), llvm.IntType(8).as_pointer()


@intrinsic
def vector(context, address, shape, dtype):
    """The numbers at an address, as an array. Callers of kernels keep the memory alive."""
    dimensions = len(shape) if isinstance(shape, types.BaseTuple) else 1
    array = types.Array(dtype.dtype, dimensions, "C")

    def build(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _POINTER)
        given = array(types.voidptr, *signature.args[1:])
        return np_cfarray(context, builder, given, (pointer, *arguments[1:]))

    return array(types.int64, shape, dtype), build


def array_at(context, builder, address, size, element):
    """:func:`vector` for other intrinsics, which build LLVM's code themselves."""
    given = types.Array(element, 1, "C")(types.voidptr, types.int64, types.DType(element))
    pointer = builder.inttoptr(address, _POINTER)
    return np_cfarray(context, builder, given, (pointer, size))


@intrinsic
def part_of(context, array, start, size):
    """``array[start : start + size]``, which must lie inside: indices are not looked at."""

    def build(context, builder, signature, arguments):
        data = make_array(array)(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), _POINTER)
        given = array(types.voidptr, size, types.DType(array.dtype))
        return np_cfarray(context, builder, given, (pointer, arguments[2]))

    return array(array, types.int64, types.int64), build


@intrinsic
def scratch(context, size):
    """The address of new memory for ``size`` words, where a cache line begins.

    Kernels end with :func:`release`.
    """

    def build(context, builder, signature, arguments):
        # The word before the line says where the memory begins.
        size = builder.mul(arguments[0], _WORD(4))
        begin = NRTContext(context, True).allocate(builder, builder.add(size, _WORD(8 + 4 * LINE)))
        begin = builder.ptrtoint(begin, _WORD)
        address = builder.and_(builder.add(begin, _WORD(7 + 4 * LINE)), _WORD(-4 * LINE))
        builder.store(begin, _begin(builder, address))
        return address

    return types.int64(types.int64), build


@intrinsic
def release(context, address):
    """Free what :func:`scratch` returned."""

    def build(context, builder, signature, arguments):
        begin = builder.load(_begin(builder, arguments[0]))
        NRTContext(context, True).free(builder, builder.inttoptr(begin, _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), build


def _begin(builder, address):
    return builder.inttoptr(builder.sub(address, _WORD(8)), _WORD.as_pointer())


@intrinsic
def bits_of(context, value):
    """The bits of an fp32 number."""
    return types.uint32(types.float32), _reinterpret


@intrinsic
def value_of(context, bits):
    """The fp32 number with these bits."""
    return types.float32(types.uint32), _reinterpret


def _reinterpret(context, builder, signature, arguments):
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


_FOUR, _FOUR_WIDE = llvm.VectorType(llvm.IntType(32), 4), llvm.VectorType(_WORD, 4)


@intrinsic
def store_columns(context, words, start, bits, at):
    """The bits of eight columns from four adjacent words, each of which decides two columns.

    A word is the bits of the first of its two columns; its halves in the other order are those of
    the second one. As a loop this is not made into vector instructions, and takes seven times as
    long. Nothing is looked at: indices count from the arrays' beginnings.
    """

    def build(context, builder, signature, arguments):
        given = _load_four(context, builder, words, arguments[0], arguments[1])
        _store_columns(context, builder, bits, arguments[2], arguments[3], given)
        return context.get_dummy_value()

    return types.void(words, types.int64, bits, types.int64), build


@intrinsic
def store_groups(context, words, start, stride, bits, at):
    """The bits of four groups of eight columns, from the words of four calls.

    Word i of the calls is at ``start`` + i * ``stride`` in ``words``, call after call.
    """

    def build(context, builder, signature, arguments):
        array, start, stride, into, at = arguments
        rows = []
        for _ in range(4):
            rows.append(_load_four(context, builder, words, array, start))
            start = builder.add(start, stride)

        def shuffled(first, second, *places):
            order = llvm.Constant(_FOUR, list(places))
            return builder.shuffle_vector(first, second, order)

        for pair in ((0, 4, 1, 5), (2, 6, 3, 7)):  # the words of calls 0 and 1, then of 2 and 3
            low = shuffled(rows[0], rows[1], *pair)
            high = shuffled(rows[2], rows[3], *pair)
            for half in ((0, 1, 4, 5), (2, 3, 6, 7)):
                call = shuffled(low, high, *half)
                _store_columns(context, builder, bits, into, at, call)
                at = builder.add(at, _WORD(8))
        return context.get_dummy_value()

    index = types.int64
    return types.void(words, index, index, bits, index), build


def _pointer(context, builder, kind, array, at, to):
    data = make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), to.as_pointer())


def _load_four(context, builder, kind, array, at):
    found = builder.load(_pointer(context, builder, kind, array, at, _FOUR))
    found.align = 4
    return found


def _store_columns(context, builder, kind, array, at, four):
    word = builder.zext(four, _FOUR_WIDE)
    half, three = (llvm.Constant(_FOUR_WIDE, [count] * 4) for count in (16, 48))
    # The second column's bits are above: the word's low half at the top, its high half below that.
    upper = builder.shl(builder.lshr(word, half), builder.add(half, half))
    both = builder.or_(builder.or_(word, upper), builder.shl(word, three))
    builder.store(both, _pointer(context, builder, kind, array, at, _FOUR_WIDE)).align = 4
