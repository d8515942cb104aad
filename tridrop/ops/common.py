"""What the autograd functions of all families share.

Forward and backward are opaque operators. Forward saves the seed, and inputs only where the
derivative needs them; backward draws the mask again. The derivative of backward is a composition of
plain torch operations, so it can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import elementwise
from ..base import memory
from ..base.memory import PLAIN
from ..base.strides import laid_out, order_of
from ..base.torch_private import watched
from ..distributed import dtensor
from ..spec.operands import as_operands
from .library import Known, plain, unobserved


class Function(torch.autograd.Function):
    """The base class of the autograd functions of all families.

    Where a function is applied inside another one, its ``forward`` must name its arguments: Dynamo
    passes the context too to a forward with a starred argument.
    """

    @staticmethod
    def composed(*arguments: Any) -> Any:
        """The result by torch's own operators; None where the op itself should be called."""
        return None


@cache
def unbound(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without the binding of arguments that torch does first.

    torch binds them to the signature of ``forward`` in each call, for the sake of default values,
    which these functions do not have. It takes a third of the host's time of a call on a CPU.
    """
    if isinstance(vars(torch.autograd.Function)["apply"], classmethod):
        # Up to torch 2.13 this method binds them, and the one that it overrides does not.
        return super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def forward(ctx: Any, *arguments: Any) -> Any:
        result = function.forward(*arguments)
        function.setup_context(ctx, arguments, result)
        return result

    # From torch 2.14 on it is done in C, for classes that have a setup_context of their own.
    own = {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    bare: Any = type(function.__name__, (function,), {**own, "__module__": function.__module__})
    apply: Callable[..., Any] = bare.apply
    return apply


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, by the shortest path with the same result.

    Where no gradient is needed, the autograd function is left out. For DTensors, each process
    computes its piece, as the function's ``sharding`` says.
    """
    if not unobserved(arguments):
        if any(map(dtensor.is_dtensor, arguments)):
            return dtensor.call(function, arguments, apply)
        found = function.composed(*arguments)
        if found is not None:
            return found
        return function.apply(*arguments)
    if torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    ):
        return unbound(function)(*arguments)
    return function.forward(*arguments)


def whole(t: Tensor, name: str) -> Tensor:
    """:func:`tridrop.base.memory.whole`, for a function that is made of torch's own operators."""
    return memory.whole(t, name) if not watched() and plain(t) else t


def apply_in_backward(function: type[Function], *arguments: Any) -> Any:
    """:func:`apply`, inside the backward of another function.

    Dynamo cannot trace an autograd function there, so the compiler gets its forward alone: compiled
    code has no second derivative anyway.
    """
    if torch.compiler.is_compiling():
        return function.forward(*arguments)
    return apply(function, *arguments)


def resume(ctx: Any, packed: tuple[Any, ...] | Known) -> bool:
    """Give ``ctx`` the packed options of a call, and the attributes that :func:`save` noted for it.

    Returns whether some were noted, by an earlier call with the same key that needed the same
    gradients: such calls differ in their tensors alone.
    """
    if type(packed) is not Known:
        ctx.packed, ctx.prepared = packed, None
        return False
    noted = packed.noted.get(ctx.needs_input_grad)
    if noted is None:
        ctx.packed, ctx.prepared = packed.packed, packed.prepared
        return False
    ctx.__dict__.update(noted)
    return True


def save(
    ctx: Any,
    packed: tuple[Any, ...] | Known,
    names: Any,
    *tensors: Tensor | None,
) -> None:
    """``ctx.save_for_backward(*tensors)``, and their facts, with which :func:`unchanged` compares.

    ``packed`` is a known call or the options of another call. For a known call, all attributes that
    ctx has now are noted for :func:`resume`. ``names`` are the tensors' names, or the type of a
    tuple of operands whose last fields they are.
    """
    ctx.save_for_backward(*tensors)
    known = type(packed) is Known
    if known and "facts" in ctx.__dict__:  # resumed
        return
    if isinstance(names, type):
        names = names._fields[-len(tensors) :]  # type: ignore[attr-defined]
    # Under torch.compile, the compiler decides what a graph saves.
    ctx.facts = () if torch.compiler.is_compiling() else memory.facts_of(names, tensors)
    if known:
        ctx.prepared, ctx.uncompared = packed.prepared.held_to(ctx.facts)  # type: ignore[union-attr]
        packed.noted[ctx.needs_input_grad] = dict(ctx.__dict__)  # type: ignore[union-attr]


def unchanged(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
    """``saved``, the ``ctx.saved_tensors``, if they are as they were saved; else ValueError.

    autograd itself detects changes in place, but neither a new ``.data`` nor a tensor that a hook
    returns instead.
    """
    found = list(saved)
    for facts in ctx.facts:
        found[facts.place] = memory.as_saved(found[facts.place], facts)
    return found


def prepared_backward(
    ctx: Any,
    operands: type[tuple[Any, ...]],
    incoming: tuple[Tensor | None, ...],
    saved: Sequence[Tensor | None],
    needed: Any,
) -> Any:
    """The gradients, where the call is known and nothing but the backend must see it; else None.

    ``operands`` is the type of the tuple that holds ``incoming`` and ``saved``. ``needed`` tells
    the backend which gradients to compute: by their dtypes, or by bools.
    """
    if ctx.prepared is None or torch.is_grad_enabled() or watched():
        return None
    for grad in incoming:
        if grad is not None and not plain(grad):
            return None
    t: Any
    for t in saved:
        if t is not None and type(t) not in PLAIN:
            return None
    for place, shape, dtype, device, _ in ctx.uncompared:
        t = saved[place]
        if (  # a changed tensor takes the other path, where unchanged() raises
            t is None
            or t.shape != shape
            or t.dtype is not dtype
            or (t.is_cpu or t.device) != device
            or t.is_neg()
        ):
            return None
    return ctx.prepared.backward(as_operands(operands, (*incoming, *saved)), needed)


def each_sample(
    function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """A vmap rule that calls ``function`` once per sample, with the coordinates of a single sample.

    Every sample then has the mask that the same call has outside vmap. Samples with different seeds
    (randomness="different") have different masks.
    """
    outputs = []
    for i in range(info.batch_size):
        picked = [
            a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a
            for a, dim in zip(args, in_dims, strict=True)
        ]
        outputs.append(function(*picked))
    if isinstance(outputs[0], Tensor):
        return _stack(outputs), 0
    stacked = tuple(
        None if column[0] is None else _stack(column) for column in zip(*outputs, strict=True)
    )
    return stacked, tuple(None if column is None else 0 for column in stacked)


def by_sample(function: type[Function]) -> type[Function]:
    """Give an autograd function the vmap rule of :func:`each_sample`."""

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(function.apply, info, in_dims, args)

    function.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return function


def _stack(samples: Sequence[Tensor]) -> Tensor:
    """The samples stacked in one tensor, in which each keeps its strides' order."""
    order = None if samples[0].is_contiguous() else order_of(samples[0])
    found = torch.stack(tuple(samples))
    return found if order is None else laid_out(found, (0, *(1 + dim for dim in order)))


def wanted(
    results: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed; for the others, an operator returned an empty tensor."""
    return tuple(
        None if dtype is None else result for result, dtype in zip(results, dtypes, strict=True)
    )


def differentiate(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    given: dict[str, Tensor | None],
    cotangents: Sequence[Tensor | None],
    drop: Any,
    options: Any,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """The derivative of an op's gradients, by differentiating the reference's formula for them.

    ``given`` holds the differentiable arguments of ``gradients``; the result has one entry for each
    of them.
    """
    names = [name for name, tensor in given.items() if tensor is not None]
    needs = tuple(dtype is not None for dtype in dtypes)

    def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
        computed = dict(zip(names, elementwise.compute(*tensors), strict=True))
        results = gradients(**{**given, **computed}, drop=drop, options=options, needs=needs)
        return tuple(t for t in results if t is not None)

    outputs, pull_back = torch.func.vjp(  # type: ignore[misc]
        wide, *(given[name] for name in names)
    )
    wanted = [c for c, need in zip(cotangents, needs, strict=True) if need]
    filled = tuple(
        torch.zeros_like(o) if c is None else c.to(o.dtype)
        for o, c in zip(outputs, wanted, strict=True)
    )
    found = dict(zip(names, pull_back(filled), strict=True))
    return [found.get(name) for name in given]
