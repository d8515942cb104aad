"""vmap of the elementwise and norm ops in one call for all samples.

Under vmap a sample has the mask that it would have alone. Where all samples have one seed that is a
mask shared along the dimension of the samples: it has index 0 there, and so the coordinates that
are left are those of a sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .common import each_sample


def all_samples(
    function: Callable[..., Any],
    operands: type[Any],
    info: Any,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
) -> tuple[Any, Any]:
    """The vmap rule of a forward, ``function(*operands, packed)``.

    Samples with seeds or vectors of their own, those with a mask of drop_path or a gate, whose
    first dimension would no longer be the first, and numbers are left to :func:`each_sample`.
    """
    *tensors, packed = args
    given = operands(*tensors)
    # Options have dimensions of their own, so only those of tensors are looked at.
    dims = dict(zip(operands._fields, in_dims, strict=False))
    batched = {name for name, dim in dims.items() if dim is not None}
    numbers = given.x.dim() == ("x" in batched)
    gain = given.layer_scale
    by_sample = packed.drop_path > 0 or (gain is not None and gain.dim() > 1)
    if not batched <= {"x", "residual"} or by_sample or numbers:
        return each_sample(function, info, in_dims, args)
    batch = info.batch_size

    def in_front(name: str) -> Tensor | None:
        t, dim = getattr(given, name), dims[name]
        if t is None:
            return None
        return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    moved = given._replace(x=in_front("x"), residual=in_front("residual"))
    results = function(*moved, _with_samples(packed, batch))
    if isinstance(results, Tensor):
        return results, 0
    # A norm: a stream that is not kept is empty, of one dimension.
    return results, tuple(0 if t.dim() == results[0].dim() else None for t in results)


def _with_samples(packed: Any, batch: int) -> Any:
    """Packed options with a dimension of samples in front, along which the mask is shared."""
    packed = packed._replace(shared=[0, *(dim + 1 for dim in packed.shared)])
    if not packed.global_shape:
        return packed
    return packed._replace(global_shape=[batch, *packed.global_shape], origin=[0, *packed.origin])
