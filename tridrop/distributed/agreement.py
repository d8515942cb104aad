"""Agrees on one seed for all processes of a mesh, folds it and checks it."""

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
    """The process groups of a mesh, one per dimension; or the given group."""
    if where is None or isinstance(where, dist.ProcessGroup):
        return [dist.group.WORLD if where is None else where]
    return [where.get_group(dim) for dim in range(where.ndim)]


def _device(where: Any) -> torch.device:
    """The device of a mesh, or of a group's backend."""
    kind = getattr(where, "device_type", None)
    if kind is None:
        kind = "cuda" if dist.get_backend(where) == "nccl" else "cpu"
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def agree(seed: int | Tensor, mesh: Any = None) -> Tensor:
    """Give all processes of ``mesh`` the seed of its first process.

    It broadcasts 16 bytes per dimension of the mesh. The host does not wait for the device.

    Args:
        seed: an int or a seed tensor; only that of the first process counts.
        mesh: a DeviceMesh or a process group; by default the group of all processes.

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
    """The seed of this process on a mesh: shared along all dimensions except those of ``fold``.

    Processes that differ only in dimensions not in ``fold`` get the same seed. Use this where they
    hold the same samples or pieces of the same tensors, as in tensor, sequence and context
    parallelism and in pipelines. Processes that differ in a dimension of ``fold`` get
    ``fold_in(seed, number)``, where the number counts along these dimensions in row-major order.
    Use this for data parallelism in which each rank numbers its samples from 0, so that ranks get
    different masks. (With :func:`batch_slice` no folding is needed, and the masks are those of a
    single process.)

    Args:
        mesh: a DeviceMesh.
        fold: dimensions of the mesh, by name or number.
        seed: an int or a seed tensor, the same in every process. If None, the first process of the
            mesh draws one from its generator and broadcasts its 16 bytes.

    Raises:
        ValueError: the mesh has no such dimension.

    >>> with tridrop.rng(mesh_seed(mesh, fold="dp", seed=step)):  # doctest: +SKIP
    ...     model(x).sum().backward()
    """
    device = _device(mesh)
    base = agree(new_seed(device), mesh) if seed is None else as_seed(seed, device)
    folded = [fold] if isinstance(fold, (str, int)) else list(fold)
    names = list(mesh.mesh_dim_names or ())
    dims = []
    for entry in folded:
        if entry in names:
            dims.append(names.index(entry))
        elif isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < mesh.ndim:
            dims.append(entry)
        else:
            raise ValueError(
                f"fold = {entry!r}; the mesh has the dimensions {names or list(range(mesh.ndim))}"
            )
    if not dims:
        return base
    number = 0
    for dim in sorted(set(dims)):
        number = number * mesh.size(dim) + mesh.get_coordinate()[dim]
    return fold_in(base, number)


def check_seed(seed: int | Tensor, mesh: Any = None) -> None:
    """Raise RuntimeError in every process unless all processes of ``mesh`` have this seed.

    It gathers 16 bytes per dimension of the mesh and waits for the device: use it for debugging, or
    once at the start.

    Args:
        seed: an int or a seed tensor.
        mesh: a DeviceMesh or a process group; by default the group of all processes.
    """
    local = as_seed(seed, None if isinstance(seed, Tensor) else _device(mesh))
    found = local[None]
    for group in _groups(mesh):
        pieces = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, found.contiguous(), group=group)
        found = torch.cat(pieces)
    different = {tuple(row) for row in found.tolist()}
    if len(different) > 1:
        raise RuntimeError(
            f"{len(different)} different seeds among {len(found)} processes that share a mask; "
            f"this one has {tuple(local.tolist())}: draw one with "
            "tridrop.distributed.mesh_seed(mesh), or give every process the same int"
        )


@contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Inside this context, check the seed of every call on DTensors with :func:`check_seed`.

    ``TRIDROP_CHECK_SEEDS=1`` in the environment does this in the whole process. Different seeds,
    which would silently give the shards pieces of different masks, then raise an error.
    """
    global _check
    before, _check = _check, enabled
    try:
        yield
    finally:
        _check = before


def check_where_asked(seed: Tensor | None, mesh: Any) -> None:
    """Call :func:`check_seed` if checking is turned on."""
    if _check and seed is not None and not torch.compiler.is_compiling():
        for one in seed.view(-1, 2):  # a product has one seed per mask
            check_seed(one, mesh)
