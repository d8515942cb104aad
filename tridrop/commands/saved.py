"""What autograd keeps for a backward, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_by(function: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """The result of a function, and the tensors that autograd keeps for its backward."""
    kept: list[Tensor] = []  # alive until counted, so that no two have the same address

    def pack(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return function(), kept


def storage_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """The bytes of the storages of tensors; each counts once, and those of ``without`` never."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for t in without:
        found.pop(t.untyped_storage().data_ptr(), None)
    return sum(found.values())
