"""One seed for all processes of a mesh: how it is agreed on, folded and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.torch_private import functional_collectives
from ..contract.mask import as_seed, fold_in, new_seed

_check = os.environ.get("TRIDROP_CHECK_SEEDS", "0") not in ("", "0")


def _groups(where: Any) -> list[Any]:
    """The process groups of a mesh, one a dimension; or the one that was given."""
    if where is None or isinstance(where, dist.ProcessGroup):
        return [dist.group.WORLD if where is None else where]
    return [where.get_group(dim) for dim in range(where.ndim)]


def _device(where: Any) -> torch.device:
    """The device of a mesh's data, or of the group's backend."""
    kind = getattr(where, "device_type", None)
    if kind is None:
        kind = "cuda" if dist.get_backend(where) == "nccl" else "cpu"
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def agree(seed: int | Tensor, mesh: Any = None) -> Tensor:
    """The seed of the first process of ``mesh``, in all of its processes.

    A broadcast of 16 bytes for each dimension of the mesh. Nothing waits for the device: on CUDA
    the host goes on, as with every collective.

    Args:
        seed: an int or a seed tensor; only that of the first process counts.
        mesh: a DeviceMesh or a process group, by default that of all processes.

    >>> seed = agree(new_seed("cpu"), mesh)  # doctest: +SKIP
    """
    agreed = as_seed(seed, None if isinstance(seed, Tensor) else _device(mesh))
    collectives = functional_collectives()
    for group in _groups(mesh):
        agreed = collectives.wait_tensor(collectives.broadcast(agreed, 0, group))
    return agreed


def mesh_seed(
    mesh: Any, *, fold: str | int | Sequence[str | int] = (), seed: int | Tensor | None = None
) -> Tensor:
    """The seed of this process on a mesh: shared along its dimensions, but for those of ``fold``.

    Processes that differ only in other dimensions get the same seed: they hold the same samples,
    or pieces of the same tensors, as in tensor, sequence and context parallelism and pipelines.
    Processes that differ in a dimension of ``fold`` get ``fold_in(seed, number)``, where the number
    counts along these dimensions in row-major order: data parallelism whose ranks, each numbering
    its own samples from 0, are to have masks of their own. (With :func:`batch_slice` they need no
    folding, and the masks are those of one process.)

    Args:
        mesh: a DeviceMesh.
        fold: dimensions of the mesh, by name or number.
        seed: an int or a seed tensor, the same in every process. None draws one from the generator
            of the mesh's first process, and broadcasts its 16 bytes.

    Raises:
        ValueError: a dimension that the mesh does not have.

    >>> with tridrop.rng(mesh_seed(mesh, fold="dp", seed=step)):  # doctest: +SKIP
    ...     model(x).sum().backward()
    """
    device = _device(mesh)
    base = agree(new_seed(device), mesh) if seed is None else as_seed(seed, device)
    folded = [fold] if isinstance(fold, (str, int)) else list(fold)
    known = list(mesh.mesh_dim_names or ())
    dims = []
    for entry in folded:
        if entry in known:
            dims.append(known.index(entry))
        elif isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < mesh.ndim:
            dims.append(entry)
        else:
            raise ValueError(
                f"fold = {entry!r}; the mesh has the dimensions {known or list(range(mesh.ndim))}"
            )
    if not dims:
        return base
    number = 0
    for dim in sorted(set(dims)):
        number = number * mesh.size(dim) + mesh.get_coordinate()[dim]
    return fold_in(base, number)


def check_seed(seed: int | Tensor, mesh: Any = None) -> None:
    """Raise RuntimeError, in every process, unless all processes of ``mesh`` have this seed.

    An all_gather of 16 bytes for each dimension of the mesh, which waits for the device: for
    debugging, or once at the start.

    Args:
        seed: an int or a seed tensor.
        mesh: a DeviceMesh or a process group, by default that of all processes.
    """
    own = as_seed(seed, None if isinstance(seed, Tensor) else _device(mesh))
    found = own[None]
    for group in _groups(mesh):
        pieces = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, found.contiguous(), group=group)
        found = torch.cat(pieces)
    different = {tuple(row) for row in found.tolist()}
    if len(different) > 1:
        raise RuntimeError(
            f"{len(different)} different seeds among {len(found)} processes that share a mask; "
            f"this one has {tuple(own.tolist())}: draw one with "
            "tridrop.distributed.mesh_seed(mesh), or give every process the same int"
        )


@contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Check the seed of every call on DTensors with :func:`check_seed`, inside the block.

    ``TRIDROP_CHECK_SEEDS=1`` in the environment does so in the whole process. Unequal seeds, which
    would silently give the shards masks of different tensors, then end with an error.
    """
    global _check
    before, _check = _check, enabled
    try:
        yield
    finally:
        _check = before


def check_where_asked(seed: Tensor | None, mesh: Any) -> None:
    """:func:`check_seed`, where it is turned on."""
    if _check and seed is not None and not torch.compiler.is_compiling():
        for one in seed.view(-1, 2):  # a product has one for each mask
            check_seed(one, mesh)
