"""All private names of torch that tridrop uses, in one place.

Each name is here because no public name does the same; :data:`INTERFACES` says what it is for.
Where a version of torch lacks one, importing tridrop raises an ImportError that names it: without
it a recomputation would draw a wrong mask, or a transformation would not see a call.
``tests/project/test_torch_private.py`` checks that each name does what is written here, and that no
other module of tridrop uses a private name of torch.

The attributes of an ``nn.Module`` in :data:`MODULE_ATTRIBUTES` are used where they are needed.
Only their names are private: many libraries rely on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad, profiler

# The versions of torch with which tests/project/test_torch_private.py passes.
CHECKED = ("2.11", "2.12", "2.13", "2.14", "2.15")


class Interface(NamedTuple):
    """A private name of torch: where it is, and what tridrop needs it for."""

    path: str
    purpose: str


INTERFACES = tuple(
    Interface(*line)
    for line in (
        # What a call must know about its surroundings.
        ("torch._C._len_torch_dispatch_stack", "count the dispatch modes"),
        ("torch._C._functorch.peek_interpreter_stack", "see torch.func at work"),
        ("torch._C._get_tracing_state", "see torch.jit.trace and the ONNX exporter"),
        ("torch._C._functorch.is_functorch_wrapped_tensor", "tell torch.func's tensors from data"),
        ("torch._C._functorch.is_legacy_batchedtensor", "tell gradients of is_grads_batched apart"),
        ("torch.autograd.forward_ad._current_level", "see forward-mode derivatives"),
        ("torch.autograd.profiler._is_profiler_enabled", "see a profiler"),
        # Backward and recomputation.
        ("torch._C._current_graph_task_id", "tell whether backward is running"),
        ("torch._C._autograd._top_saved_tensors_default_hooks", "ask the hooks around its own"),
        ("torch.utils.checkpoint._CheckpointFrame", "carry rng blocks to a recomputation"),
        ("torch.Tensor._cdata", "let kernels ask torch's C interface where a tensor is"),
        # Operators.
        ("torch._softmax_backward_data", "compute softmax's gradient from its result"),
        ("torch._ops.OpOverload", "name what a dispatch mode is given"),
        ("torch._ops.OpOverloadPacket", "know an operator that a model stores"),
        ("torch._VF.lstm", "run recurrent layers on other weights"),
        # Classes and functions.
        ("torch.nn.modules.dropout._DropoutNd", "know torch's dropouts"),
        ("torch.nn.modules.module._has_any_global_hook", "see hooks on all modules"),
        ("torch._subclasses.fake_tensor.FakeTensor", "know tensors without data"),
        ("torch._subclasses.functional_tensor.FunctionalTensor", "know a compiler's tensors"),
        ("torch.utils._python_dispatch.TorchDispatchMode", "count operators"),
        ("torch.utils._pytree.tree_leaves", "find the tensors of a result"),
    )
)

# Private attributes of an nn.Module: its hooks, and the modules and buffers that it holds.
MODULE_ATTRIBUTES = (
    "_backward_hooks", "_backward_pre_hooks", "_buffers", "_compiled_call_impl", "_forward_hooks",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_modules",
)  # fmt: skip


def require(interface: Interface) -> None:
    """Raise an ImportError where torch lacks the name."""
    try:
        reduce(getattr, interface.path.split(".")[1:], torch)
    except AttributeError:
        raise ImportError(
            f"torch {torch.__version__} has no {interface.path}, which tridrop needs to "
            f"{interface.purpose}. This tridrop was checked with torch {CHECKED[0]} to "
            f"{CHECKED[-1]}: install one of these, or a newer tridrop"
        ) from None


for _interface in INTERFACES:
    require(_interface)

from torch import _VF as recurrent  # noqa: E402
from torch._ops import OpOverload, OpOverloadPacket  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch._subclasses.functional_tensor import FunctionalTensor  # noqa: E402
from torch.nn.modules.dropout import _DropoutNd as AnyDropout  # noqa: E402
from torch.nn.modules.module import _has_any_global_hook as has_global_hook  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import _CheckpointFrame as CheckpointFrame  # noqa: E402

dispatch_modes = torch._C._len_torch_dispatch_stack
transformation = torch._C._functorch.peek_interpreter_stack
trace_state = torch._C._get_tracing_state
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
backward_task = torch._C._current_graph_task_id
saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
aten_softmax_backward = torch._softmax_backward_data
_is_compiling = torch.compiler.is_compiling

__all__ = [
    "CHECKED", "INTERFACES", "MODULE_ATTRIBUTES", "AnyDropout", "CheckpointFrame", "FakeTensor",
    "FunctionalTensor", "Interface", "OpOverload", "OpOverloadPacket", "TorchDispatchMode",
    "aten_softmax_backward", "backward_task", "constant_when_compiling", "cpu_attention",
    "dispatch_modes", "forward_mode", "functional_collectives", "has_global_hook",
    "is_legacy_batched", "is_traced", "is_wrapped", "partitioner_redraws", "recurrent", "require",
    "saved_tensor_hooks", "schema_of", "sleep", "step_aside", "trace_state", "transformation",
    "tree_leaves", "watched",
]  # fmt: skip


def watched() -> bool:
    """Whether more than the backend must see a call.

    That is so for torch.compile, tracing, a dispatch mode, torch.func, forward-mode derivatives and
    a profiler.
    """
    return (
        _is_compiling()
        or dispatch_modes() > 0
        or transformation() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or trace_state() is not None
    )


def constant_when_compiling(function: Callable[..., Any]) -> None:
    """Let Dynamo call a function while it traces, and keep the result as a constant.

    This is what torch.compiler.assume_constant_result does, which imports the compiler: a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_mode() -> bool:
    """Whether forward-mode derivatives may be asked for."""
    return bool(forward_ad._current_level >= 0)


def partitioner_redraws() -> bool:
    """Whether torch.compile may compute random numbers again in backward to save memory."""
    from torch._functorch import config  # imported here, since only torch.compile imports it

    return bool(config.activation_memory_budget < 1 or config.aggressive_recomputation)


def functional_collectives() -> Any:
    """The collectives that torch.compile can trace: torch.distributed's own work in place."""
    from torch.distributed import _functional_collectives

    return _functional_collectives


def schema_of(operator: OpOverload) -> Any:
    """The arguments of an operator: each has a name, and may have a default value."""
    return operator._schema.arguments


def is_traced(x: Any) -> bool:
    """Whether it is a tensor that stands for one, while a compiler traces."""
    return isinstance(x, (FakeTensor, FunctionalTensor))


def step_aside(pack: Any, around: Any) -> Callable[[], None]:
    """Have selective checkpoints not take a hook on saved tensors for one of the user's.

    From 2.14 on they ask so of the innermost hooks: those of a user are to get what they keep, too.
    ``around`` are the hooks around ``pack``, which they then look at. The result ends it, as the
    hook is left: what was saved holds the hook, and is not to hold what is around it.
    """
    if around is not None and getattr(around[0], "_checkpoint_internal", False):
        around = around[0]._user_hooks
    pack._checkpoint_internal, pack._user_hooks = True, around
    return partial(delattr, pack, "_user_hooks")


def cpu_attention(backward: bool) -> Any:
    """The operator by which torch's attention runs on a CPU; None where its arguments have changed.

    Without it, tridrop's own formulas compute attention that drops nothing.
    """
    name = "_scaled_dot_product_flash_attention_for_cpu" + ("_backward" if backward else "")
    found = getattr(getattr(torch.ops.aten, name, None), "default", None)
    named = () if found is None else {argument.name for argument in schema_of(found)}
    return found if {"dropout_p", "is_causal", "attn_mask", "scale"} <= set(named) else None


def sleep(cycles: int) -> None:
    """Keep a GPU busy for ``cycles``, so that its queue fills before a measurement."""
    torch.cuda._sleep(cycles)
