"""Ops on DTensors: each process computes its piece, with its part of the whole mask.

The options of an op include the position of a tensor in a larger one, which the kernels use. So a
call on DTensors is a call on local tensors with other options, between DTensor.to_local and
DTensor.from_local, which are differentiable. Operators need no sharding rules in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.strides import order_of
from .agreement import check_where_asked
from .layouts import SHARED, Layout, Operand, Piece

_PARTIAL = "partial sum"  # marks a mesh dimension along which the result must still be summed


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor. This does not import the module of DTensor."""
    return type(x).__name__ == "DTensor" and isinstance(x, Tensor)


def is_distributed(x: Any) -> bool:
    """Whether ``x`` is a DTensor, or the result of a collective that may still be running."""
    return is_dtensor(x) or type(x).__name__ == "AsyncCollectiveTensor"


def call(function: Any, arguments: Sequence[Any], run: Callable[..., Any]) -> Any:
    """``run(function, *arguments)`` for arguments of which some are DTensors."""
    # Dynamo cannot trace whether a function has an attribute.
    if not torch.compiler.is_compiling() and not hasattr(function, "sharding"):
        raise TypeError(
            f"{function.__name__} takes no DTensors: give it t.full_tensor(), or t.to_local() with "
            "a different seed in each process"
        )
    layout: Layout = function.sharding(*arguments)
    given = {
        name: (o, getattr(layout.tensors, name))
        for name, o in layout.operands.items()
        if isinstance(getattr(layout.tensors, name), Tensor)
    }
    mesh = _mesh(list(given.values()))
    tensors = [(o, t, name in layout.linear) for name, (o, t) in given.items()]
    spread = [t for t in tensors if is_dtensor(t[1])]
    cuts = tuple(_cut(layout, spread, dim) for dim in range(mesh.ndim))
    sizes = {n: size for o, t, _ in tensors for n, size in zip(o.names, t.shape, strict=True)}
    for name, like in layout.even.items():
        _check_even(mesh, cuts, sizes, name, like)
    pieces = _pieces(mesh, cuts, sizes, layout)
    local = {
        name: _local(t, o, mesh, cuts, pieces, layout, name in layout.linear)
        for name, (o, t) in given.items()
    }
    check_where_asked(layout.seed, mesh)
    results = run(function, *layout.tensors._replace(**local), layout.settle(pieces))
    single = isinstance(results, Tensor)
    found = [
        t if names is None or t.dim() != len(names) else _whole(t, names, mesh, cuts, sizes)
        for t, names in zip((results,) if single else results, _names(layout, results), strict=True)
    ]
    return found[0] if single else tuple(found)


def _names(layout: Layout, results: Any) -> list[Any]:
    count = 1 if isinstance(results, Tensor) else len(results)
    return [*layout.results, *(None,) * (count - len(layout.results))]


def _mesh(given: Sequence[tuple[Operand, Any]]) -> Any:
    """The mesh of the operands, which must be the same for all."""
    spread = {o.label: t for o, t in given if is_dtensor(t)}
    first, one = next(iter(spread.items()), (None, None))
    if one is None:
        raise TypeError(
            "a seed or a rate is a DTensor: give a plain tensor, the same in every process"
        )
    mesh = one.device_mesh
    for o, t in given:
        if not is_dtensor(t):
            if o.plain and not t.requires_grad:
                continue
            raise TypeError(
                f"{o.label} is a plain tensor and {first} is a DTensor: make both DTensors, with "
                f"distribute_tensor({o.label}, mesh, placements) from a whole tensor, or "
                f"DTensor.from_local({o.label}, mesh, placements) from the pieces"
            )
        if t.device_mesh != mesh:
            raise ValueError(
                f"{o.label} is on the mesh {t.device_mesh} and {first} on {mesh}: redistribute one "
                "of them, so that both are on one mesh"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process is not in the mesh {mesh}: call the op in its processes")
    return mesh


def _name_of(mesh: Any, dim: int) -> str:
    names = mesh.mesh_dim_names
    return f"dimension {dim} of the mesh" if names is None else f"the mesh's {names[dim]!r}"


def _advice(o: Operand, t: Any, dim: int, placement: Any) -> str:
    wanted = list(t.placements)
    wanted[dim] = placement
    return f"{o.label}.redistribute(placements={wanted})"


def _where(o: Operand, t: Any, dim: int) -> str:
    """For messages alone: Dynamo of torch 2.14 cannot make text of a placement."""
    return f"{o.label} has placement {t.placements[dim]} on {_name_of(t.device_mesh, dim)}"


def _cut(layout: Layout, spread: Sequence[tuple[Operand, Any, bool]], dim: int) -> str | None:
    """The named dimension that a mesh dimension cuts; None, or "partial sum", if it cuts none.

    Raises ValueError if the placements of the operands do not fit each other.
    """
    from torch.distributed.tensor import Replicate

    chosen: str | None = None
    first: tuple[Operand, Any] | None = None
    for o, t, linear in spread:
        placement = t.placements[dim]
        if placement.is_replicate():
            continue
        if placement.is_partial():
            if not linear or placement.reduce_op != "sum":
                raise ValueError(
                    f"{_where(o, t, dim)}, and the result is not linear in it: sum it first, with "
                    f"{_advice(o, t, dim, Replicate())} or a Shard(...) there"
                )
            name = _PARTIAL
        elif not placement.is_shard():  # Dynamo in torch 2.11 cannot trace types of placements
            raise ValueError(
                f"{_where(o, t, dim)}; only Replicate, Shard and Partial are supported: use "
                f"{_advice(o, t, dim, Replicate())}"
            )
        else:
            name = o.names[placement.dim]
            name = layout.even.get(name, name)
        if name == SHARED or name in layout.whole:
            why = layout.whole.get(name, "it has size 1 there, which all share")
            raise ValueError(
                f"{_where(o, t, dim)}, but {why}: use {_advice(o, t, dim, Replicate())}"
            )
        if chosen not in (None, name):
            assert first is not None
            other, its = first
            raise ValueError(
                f"{_where(o, t, dim)}, and {other.label} has {its.placements[dim]}, which cuts "
                f"another dimension: give both the same, for instance with "
                f"{_advice(o, t, dim, Replicate())}"
            )
        chosen, first = name, (o, t)
    if chosen == _PARTIAL:
        placements = {t.placements[dim] for _, t, linear in spread if linear}
        if len(placements) > 1:
            o, t, _ = next(s for s in spread if s[2] and s[1].placements[dim].is_partial())
            raise ValueError(
                f"{_where(o, t, dim)}, "
                f"and the operands have {sorted(map(str, placements))}: a whole operand would be "
                f"added once per process. Sum first, with {_advice(o, t, dim, Replicate())}"
            )
    return chosen


def _check_even(
    mesh: Any, cuts: Sequence[str | None], sizes: dict[str, int], name: str, like: str
) -> None:
    """Raise ValueError unless each group of heads that shares a key head stays together."""
    count = 1
    for dim, cut in enumerate(cuts):
        count *= mesh.size(dim) if cut == like else 1
    if name in sizes and sizes[name] % count:
        raise ValueError(
            f"{sizes[name]} {name} for {sizes[like]} {like} cannot be cut into {count} parts of "
            "whole groups: repeat the key heads first, or redistribute query, key and value to "
            "Replicate() there"
        )


def _pieces(
    mesh: Any, cuts: Sequence[str | None], sizes: Mapping[str, int], layout: Layout
) -> dict[str, Piece]:
    """The piece of every named dimension in this process, cut as torch.chunk cuts."""
    coordinate = mesh.get_coordinate()
    pieces = {}
    for name, whole in sizes.items():
        start, size = 0, whole
        for dim, cut in enumerate(cuts):
            if cut == layout.even.get(name, name) and name != SHARED:
                step = -(-size // mesh.size(dim))
                before = min(step * coordinate[dim], size)
                start, size = start + before, min(step, size - before)
        pieces[name] = Piece(size, start, whole)
    return pieces


def _local(
    t: Any,
    o: Operand,
    mesh: Any,
    cuts: Sequence[str | None],
    pieces: Mapping[str, Piece],
    layout: Layout,
    linear: bool,
) -> Tensor:
    """The piece of an operand that this process needs."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    keys = [layout.even.get(name, name) for name in o.names]
    if not is_dtensor(t):  # it is whole in every process
        for dim, name in enumerate(o.names):
            if name in pieces and pieces[name].size != t.shape[dim] and name != SHARED:
                t = t.narrow(dim, pieces[name].start, pieces[name].size)
        return t
    wanted, gradient = [], []
    for placement, cut in zip(t.placements, cuts, strict=True):
        if cut == _PARTIAL:
            wanted.append(placement)
            gradient.append(Replicate() if linear else Partial())
        elif cut in keys:
            wanted.append(Shard(keys.index(cut)))
            gradient.append(wanted[-1])
        else:
            wanted.append(Replicate())
            gradient.append(Replicate() if cut is None else Partial())
    # only whole operands are cut here, which sends nothing
    if tuple(wanted) != tuple(t.placements):
        t = t.redistribute(placements=wanted)
    local = t.to_local(grad_placements=gradient)
    if not local.requires_grad:
        return local
    found: Tensor = _Ordered.apply(local, sorted(range(t.dim()), key=t.stride, reverse=True))
    return found


class _Ordered(torch.autograd.Function):
    """Returns the tensor unchanged; its gradient gets a memory layout with this order of
    dimensions.

    A dimension of size 1 may have any stride, and with uneven shards only some processes have size
    1. torch computes the strides of a gradient's DTensor from those of its piece, and copies a
    gradient whose strides differ from its leaf's. In torch 2.11 the copy uses collectives, which
    would wait for the processes that see no difference.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, order: Sequence[int]) -> Tensor:
        ctx.order = order
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        strides = _strides(grad.shape, ctx.order)
        if grad.stride() == strides:
            return grad, None
        return grad.permute(ctx.order).contiguous().as_strided(grad.shape, strides), None


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor with its dimensions in ``order`` in memory, outermost first."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def _whole(
    t: Tensor, names: Sequence[str], mesh: Any, cuts: Sequence[str | None], sizes: Mapping[str, int]
) -> Tensor:
    """The DTensor whose local piece in this process is ``t``."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    placements = [
        Replicate() if cut is None else Shard(names.index(cut)) if cut in names else Partial()
        for cut in cuts
    ]
    shape = torch.Size(sizes[name] for name in names)
    strides = _strides(shape, order_of(t) or range(len(names)))
    return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape, stride=strides)
