"""How numba compiles the loops: what Python calls, what kernels call, and what is inlined.

numba compiles each function for itself: it optimises it with all that it calls, and makes machine
code of it. A kernel and its steps are some forty functions, of which only the kernel's machine code
is ever run. So steps have a pipeline that makes no machine code, and passes are left out that these
functions give nothing to do. With both the first dropout takes two thirds of the time to compile.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numba
import numpy as np
from llvmlite import ir as llvm
from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.dispatcher import Dispatcher
from numba.core.typed_passes import NativeLowering
from numba.extending import intrinsic

from .cache import LoopCache

# 0 as an argument of compiled functions: numba compiles a function once more for a literal.
NOTHING = np.int64(0)

CACHE = os.environ.get("TRIDROP_CPU_CACHE") != "0"

# Passes over Python that is not written here: closures, `with`, raises, array expressions,
# branches on None, and literal_unroll. If another version of numba has other names for them, they
# are run.
_NEEDLESS = {
    "DeadBranchPrune",
    "DumpParforDiagnostics",
    "FindLiterallyCalls",
    "InlineClosureLikes",
    "InlineOverloads",
    "LiteralPropagationSubPipelinePass",
    "LiteralUnroll",
    "MakeFunctionToJitFunction",
    "NoPythonSupportedFeatureValidation",
    "NopythonRewrites",
    "RewriteDynamicRaises",
    "RewriteSemanticConstants",
    "WithLifting",
}


class _NoMachineCode(JITCodeLibrary):
    """The code of a function that other functions are linked with.

    If it is inlined it is optimised there. Sums in any order and other liberties with
    floating-point numbers are taken before, so that results do not depend on the code around.
    """

    alone = True  # whether the function is optimised by itself

    @property
    def codegen(self):
        return SimpleNamespace(set_env=lambda *_: None)  # there is no machine code to set it in

    def _optimize_final_module(self):
        if self.alone:
            super()._optimize_final_module()

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerStep(NativeLowering):
    _name = "tridrop_lower_step"

    def run_pass(self, state):
        library = _NoMachineCode(state.targetctx.codegen(), state.func_id.func_qualname)
        library.alone = not state.flags.forceinline or bool(state.flags.fastmath)
        state.library = library
        return super().run_pass(state)


class _Kernel(CompilerBase):
    """numba's pipeline without needless passes."""

    lowering = NativeLowering

    def define_pipelines(self):
        found = DefaultPassBuilder.define_nopython_pipeline(self.state)
        found.passes = [
            (self.lowering if made is NativeLowering else made, text)
            for made, text in found.passes
            if made.__name__ not in _NEEDLESS
        ]
        found.finalize()
        return [found]


class _Step(_Kernel):
    """The same for functions that only kernels call."""

    lowering = _LowerStep


# The pipelines use parts of numba that are not public. They were looked at in these versions; in
# another one numba's own pipeline makes the same loops, in twice the time.
OLDEST, NEWEST = (0, 61), (0, 68)
_KNOWN = OLDEST <= (numba.version_info.major, numba.version_info.minor) <= NEWEST
_INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_OUTER = {"error_model": "numpy", "nogil": True}
if _KNOWN:
    _INNER["pipeline_class"], _OUTER["pipeline_class"] = _Step, _Kernel


def _cached(made, function):
    """A compiled function that is kept on disk."""
    if CACHE and isinstance(made, Dispatcher):  # NUMBA_DISABLE_JIT leaves functions as they are
        made._cache = LoopCache(function)  # enable_caching() does so with numba's own cache
    return made


def kernel(function):
    """A function ``(start, stop, *arguments)`` of a part of the rows, for Python to call.

    Python calls ``(team, work, arguments)``: see :func:`run_parts`. It is compiled at its
    first call, or loaded from the cache.
    """
    of_part = inline(set())(function)

    def call(team, work, arguments):
        run_parts(of_part, team, work, arguments)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(call, name, getattr(function, name))
    return _cached(njit(no_cfunc_wrapper=True, **_OUTER)(call), call)


@intrinsic
def run_parts(context, kernel, team, work, arguments):
    """Call ``kernel(start, stop, *arguments)`` for all parts of the rows.

    ``work`` says which: the first part's number and the one after the last, how many rows there
    are, and how many of them a part has. ``team`` is the address of ``GOMP_parallel`` and a number
    of threads: with 2 or more, each takes one part after another until none is left.
    """
    index = types.int64
    given = (index, index, *arguments.types)
    kernel.get_call_type(context, given, {})
    found = kernel.dispatcher.overloads[given]

    def build(context, builder, signature, values):
        context.add_linking_libs([found.library])
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
        _build_turn(context, turn, kind, found.fndesc, signature.args[-1])
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


def _build_turn(context, turn, kind, described, arguments):
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
    kernel = context.declare_function(builder.module, described)
    builder.branch(again)
    builder.position_at_end(again)
    number = builder.atomic_rmw("add", next_part, llvm.IntType(64)(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", number, end), take, leave)
    builder.position_at_end(take)
    start = builder.mul(number, step)
    stop = builder.add(start, step)
    stop = builder.select(builder.icmp_signed("<", stop, rows), stop, rows)
    context.call_conv.call_function(
        builder, kernel, described.restype, described.argtypes, [start, stop, *given]
    )
    builder.branch(again)
    builder.position_at_end(leave)
    builder.ret_void()


def part(fastmath):
    """A function that kernels call, compiled with the first kernel that needs it.

    It is for code that would make the kernels several times as long if it were inlined. Handing
    arrays over to it takes as long as some sixty elements. ``fastmath`` names all liberties that
    are taken with floating-point numbers: "contract" joins a product and a sum in one instruction;
    "reassoc" sums in any order.
    """
    return njit(fastmath=fastmath, **_INNER)


def inline(fastmath):
    """A function that is inlined into its callers; ``fastmath`` as in :func:`part`."""
    return njit(fastmath=fastmath, forceinline=True, **_INNER)


def written_out(function):
    """A function of a line or two, whose text numba puts in place of its calls.

    It is never compiled for itself, which takes 10 to 15 ms for each set of types and literals.
    Liberties with floating-point numbers are those of the caller.
    """
    return njit(inline="always", **_INNER)(function)


_LOOPS = types.void(types.int64, types.int64, types.int64, types.int64)


def by_address(fastmath):
    """A function of four integers that kernels call by its address, see :func:`address_of`."""
    made = njit(fastmath=fastmath, no_cpython_wrapper=True, **_OUTER)
    return lambda function: _cached(made(function), function)


def address_of(made):
    """The address of a function that :func:`by_address` made, which is compiled or loaded now."""
    found = made.get_compile_result(_LOOPS)
    return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)


@intrinsic
def call_at(context, address, which, first, second, size):
    """Call the function at an address."""

    def build(context, builder, signature, arguments):
        word, result = llvm.IntType(64), context.get_value_type(types.void)
        function = llvm.FunctionType(result, [word] * 4).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), arguments[1:])

    return types.void(types.int64, *_LOOPS.args), build
