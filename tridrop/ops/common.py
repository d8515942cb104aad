"""What the autograd functions of all families share: what is saved, what is returned.

Forward and backward are opaque operators. Backward saves the seed, and inputs only where the
derivative needs them; the mask is drawn again. The derivative of backward is a composition of plain
torch operations, so it can be differentiated any number of times.
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
from ..base.strides import laid, order_of
from ..base.torch_private import watched
from ..distributed import dtensor
from .library import Known, plain, unobserved


class Function(torch.autograd.Function):
    """What the functions of all families are.

    The ``forward`` of one that is applied inside of another's names its arguments: to one with a
    starred argument Dynamo passes the context as well.
    """

    @staticmethod
    def composed(*arguments: Any) -> Any:
        """The same in torch's own operators; None where the op itself is to be called."""
        return None


@cache
def unbound(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without what torch does first.

    torch binds the arguments to the signature of ``forward``, anew in each call: a third of the
    host's time of a call on a CPU. That is for default values, which there are none of.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, on the shortest way that gives the same.

    Where no gradient is wanted, no autograd function is needed. Of DTensors each process computes
    its piece, as the function's ``sharding`` says.
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
    """:func:`tridrop.base.memory.whole` of a function in torch's own operators."""
    return memory.whole(t, name) if not watched() and plain(t) else t


def apply_in_backward(function: type[Function], *arguments: Any) -> Any:
    """The same, inside the backward of another.

    Dynamo cannot trace one autograd function there, and what it compiles has no second derivative
    anyway.
    """
    if torch.compiler.is_compiling():
        return function.forward(*arguments)
    return apply(function, *arguments)


def resume(ctx: Any, packed: tuple[Any, ...] | Known) -> bool:
    """Give ``ctx`` the packed options of a call, and what :func:`save` noted of an earlier one.

    Returns whether there was one: a call with the same key, of which the same gradients are asked,
    differs from it in its tensors alone.
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
    """``ctx.save_for_backward(*tensors)``, with what these are, for :func:`unchanged` to compare.

    ``packed`` is a known call, or the options of another. What has been written to the ctx of a
    known call by now is noted for :func:`resume`. ``names`` are those of the tensors, or a tuple of
    operands whose last fields they are.
    """
    ctx.save_for_backward(*tensors)
    known = type(packed) is Known
    if known and "given" in ctx.__dict__:  # resumed
        return
    if isinstance(names, type):
        names = names._fields[-len(tensors) :]  # type: ignore[attr-defined]
    # Under torch.compile what is saved is the compiler's business.
    ctx.given = () if torch.compiler.is_compiling() else memory.given(names, tensors)
    if known:
        packed.noted[ctx.needs_input_grad] = dict(ctx.__dict__)  # type: ignore[union-attr]


def unchanged(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
    """``saved``, which is ``ctx.saved_tensors``, where it is what was saved; else ValueError.

    autograd looks for changes in place, and sees neither a new ``.data`` nor what hooks give back.
    """
    found = list(saved)
    for then in ctx.given:
        found[then.place] = memory.still(found[then.place], then)
    return found


def prepared_backward(
    ctx: Any,
    operands: type[tuple[Any, ...]],
    incoming: tuple[Tensor | None, ...],
    saved: Sequence[Tensor | None],
    needed: Any,
) -> Any:
    """The gradients, where the call is known and nothing but the backend has to see them.

    ``operands`` is the tuple of what comes in and what was saved. ``needed`` tells the backend
    which gradients: their dtypes, or whether they are wanted.
    """
    if ctx.prepared is None or torch.is_grad_enabled() or watched():
        return None
    for grad in incoming:
        if grad is not None and not plain(grad):
            return None
    t: Any
    for place, shape, dtype, device, _ in ctx.given:
        t = saved[place]
        if (  # as unchanged() says where it is not so
            type(t) not in PLAIN
            or t.shape != shape
            or t.dtype is not dtype
            or (t.is_cpu or t.device) != device
            or t.is_neg()
        ):
            return None
    return ctx.prepared.backward(operands._make((*incoming, *saved)), needed)  # type: ignore[attr-defined]


def each_sample(
    function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """vmap by calling ``function`` once a sample: coordinates are those of the sample alone.

    Every sample then has the mask that the same call has outside vmap. Samples whose seeds differ
    (randomness="different") have masks of their own.
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
    """The samples in one tensor, each laid out as it is."""
    order = None if samples[0].is_contiguous() else order_of(samples[0])
    found = torch.stack(tuple(samples))
    return found if order is None else laid(found, (0, *(1 + dim for dim in order)))


def wanted(
    results: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for; an operator returns an empty tensor for the others."""
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
    """The derivative of an op's gradients: of the reference composition, in plain torch.

    ``given`` holds the differentiable arguments of ``gradients``; the result has an entry for each.
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
