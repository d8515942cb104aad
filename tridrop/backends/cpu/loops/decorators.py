"""How numba compiles the loops: what kernels call, and what is inlined; kernels.py has the rest.

numba compiles each function for itself: it optimises it with all that it calls, and makes machine
code of it. A kernel and its steps are some forty functions, of which only the kernel's machine code
is ever run. So steps have a pipeline that makes no machine code, and passes are left out that these
functions give nothing to do. With both the first dropout takes two thirds of the time to compile.
No array of a step has an owner, so that steps are compiled without counts of references.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numba
import numpy as np
from llvmlite import ir as llvm
from numba import njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.dispatcher import Dispatcher
from numba.core.lowering import Lower
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


class _NotInlined(Lower):
    def setup_function(self, fndesc):
        super().setup_function(fndesc)
        self.function.attributes.add("noinline")


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerApart(_LowerStep):
    _name = "tridrop_lower_apart"
    lowering_class = _NotInlined


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


class _Apart(_Kernel):
    """The same for functions that stay functions."""

    lowering = _LowerApart


# The pipelines use parts of numba that are not public. They were looked at in these versions; in
# another one numba's own pipeline makes the same loops, in twice the time.
OLDEST, NEWEST = (0, 61), (0, 68)
_KNOWN = OLDEST <= (numba.version_info.major, numba.version_info.minor) <= NEWEST
_INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
OUTER = {"error_model": "numpy", "nogil": True}
_APART = {**_INNER, "forceinline": False}  # else numba takes it over from the caller
if _KNOWN:
    _INNER |= {"_nrt": False, "pipeline_class": _Step}
    _APART |= {"_nrt": False, "pipeline_class": _Apart}
    OUTER["pipeline_class"] = _Kernel


@contextmanager
def no_collections() -> Iterator[None]:
    """Compile without Python's search for garbage.

    It would look again and again at all objects of the process, of which an import of torch leaves
    300,000, and take a twelfth of the time. What numba leaves for it are some 15 MB per loop.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def cached(made, function):
    """A compiled function that is kept on disk."""
    if CACHE and isinstance(made, Dispatcher):  # NUMBA_DISABLE_JIT leaves functions as they are
        made._cache = LoopCache(function)  # enable_caching() does so with numba's own cache
    return made


def part(fastmath):
    """A function that kernels call, compiled with the first kernel that needs it.

    In a kernel it is inlined all the same, since numba hands that option on from caller to callee;
    :func:`apart` is not. ``fastmath`` names all liberties that are taken with floating-point
    numbers: "contract" joins a product and a sum in one instruction; "reassoc" sums in any order.
    """
    return njit(fastmath=fastmath, **_INNER)


def apart(fastmath):
    """A function like :func:`part` that is not inlined.

    It is for steps of several loops that a kernel takes once per call, or rarely: half of the time
    to compile a kernel is LLVM's, which goes into loops. A call takes some 10 ns.
    """
    return njit(fastmath=fastmath, **_APART)


def inline(fastmath):
    """A function that is inlined into its callers; ``fastmath`` as in :func:`part`."""
    return njit(fastmath=fastmath, forceinline=True, **_INNER)


def written_out(function):
    """A function of a line or two, whose text numba puts in place of its calls.

    It is never compiled for itself, which takes 10 to 15 ms for each set of types and literals.
    Liberties with floating-point numbers are those of the caller.
    """
    return njit(inline="always", **_INNER)(function)


def build_call(context, builder, compiled, arguments):
    """Call a compiled function in LLVM's code that an intrinsic builds; returns its result."""
    context.add_linking_libs([compiled.library])
    function = context.declare_function(builder.module, compiled.fndesc)
    result, taken = compiled.signature.return_type, compiled.signature.args
    return context.call_conv.call_function(builder, function, result, taken, arguments)[1]


_LOOPS = types.void(types.int64, types.int64, types.int64, types.int64)


def by_address(fastmath):
    """A function of four integers that kernels call by its address, see :func:`address_of`."""
    made = njit(fastmath=fastmath, no_cpython_wrapper=True, **OUTER)
    return lambda function: cached(made(function), function)


def address_of(made):
    """The address of a function that :func:`by_address` made, which is compiled or loaded now."""
    with no_collections():
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
